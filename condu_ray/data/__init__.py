"""Pictures in: opens a task's data from a folder, webdataset tars, a CSV or torchvision, checks it and hands it out."""

from condu_ray.data.loading import PictureSet
from condu_ray.data.open import classes_of, open_pictures, open_task
from condu_ray.data.picture import load_picture
from condu_ray.data.report import describe
from condu_ray.data.split import sample
from condu_ray.data.task import Picture, Sizes, Skipped, Split, TaskData
from condu_ray.data.templates import DEFAULT_TEMPLATES, prompts

__all__ = [
    "DEFAULT_TEMPLATES",
    "Picture",
    "PictureSet",
    "Sizes",
    "Skipped",
    "Split",
    "TaskData",
    "classes_of",
    "describe",
    "load_picture",
    "open_pictures",
    "open_task",
    "prompts",
    "sample",
]
