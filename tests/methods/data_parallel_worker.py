"""One of two processes that train a task together; started by test_data_parallel.py.

Arguments: folder of the model, JSON of pictures, labels and settings, rank, number of processes, folder for results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from condu_ray.config import ModelSpec
from condu_ray.data import TaskData
from condu_ray.data.task import Picture, Sizes, Split
from condu_ray.errors import TrainingError
from condu_ray.methods import registry
from condu_ray.methods.training import Place, Resume, train_task
from condu_ray.models.load import load
from condu_ray.sources import from_dotted


def main(model: str, given: str, rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{out / 'rendezvous'}", rank=rank, world_size=size)
    told = json.loads(given)
    split = Split(tuple(Picture(path) for path in told["pictures"]), np.array(told["labels"]))
    sizes = Sizes((32, 32, 32), (32, 32, 32))
    task = TaskData("colours", "", ("red", "blue"), ("a photo of a {c}.",), split, split, (), "", sizes, True, 0)
    clip, config = load(ModelSpec(name=f"local-dir:{model}")), from_dotted(told["settings"])
    method = registry.get(config.method)
    layout = method.layout(clip, config)

    def save(checkpoint: dict[str, np.ndarray]) -> None:
        first = [values.ravel() for name, values in checkpoint.items() if name.startswith("first/")]
        if not (out / "gradient.npy").exists():
            np.save(out / "gradient.npy", np.concatenate(first))

    place = Place(rank, size, lambda module: DistributedDataParallel(module, static_graph=True))
    trained = train_task(clip, method, layout, task, config, place=place, resume=Resume(save=save))
    np.save(out / f"delta-{rank}.npy", trained.delta)

    bad_start = np.zeros(layout.total, np.float32)
    if rank == 1:  # this process alone sees a loss that is not finite
        layout.views(bad_start)["text_projection"][:] = np.nan
    try:
        wrapped = Place(rank, size, lambda module: DistributedDataParallel(module, init_sync=False))
        train_task(clip, method, layout, task, config, start=bad_start, place=wrapped)
    except TrainingError as error:
        (out / f"error-{rank}.txt").write_text(str(error), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
