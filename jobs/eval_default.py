"""Measures the shipped model (or any open_clip model) on every webdataset folder in a folder and on drawn pictures.

    python jobs/eval_default.py --data DATA [--text-targets TARGETS] [--model local-dir:FOLDER] [--fine-tune] [--json]

Prints zero-shot top-1 and top-5, chance and a linear probe for each set, pictures per second and bytes. At most 1,000
test pictures and 4,000 training pictures (for the probe) a set. The last set is drawn: the classes of the captioned
world that pretraining never saw. The model is loaded by open_clip alone. --fine-tune also trains every set by itself
with the package's defaults, at most 300 steps of 32 pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from captioned_world import CLASSES, draw
from ending import job
from PIL import Image
from pretraining import names_found, read_targets
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from condu_ray.config import ModelSpec, SessionConfig
from condu_ray.data import TaskData, load_picture, open_task, prompts, sample
from condu_ray.errors import DataError
from condu_ray.methods import registry
from condu_ray.methods.training import steps_for, train_task
from condu_ray.models.clip import class_embeddings
from condu_ray.models.load import SHIPPED, load

SEEN = {"tiny_imagenet"}  # trained on its train split; its classes are no news to the model
TEST_PICTURES, PROBE_PICTURES, MOST_STEPS = 1000, 4000, 300
GENERATED = "generated_held_out"

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Material:
    """RGB pictures and their labels, int64[n]."""

    pictures: Sequence[Image.Image]
    labels: Tensor


@dataclass(frozen=True)
class Set:
    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Material
    test: Material
    task: TaskData | None = None


def opened(folder: Path) -> Set:
    """A set; of a large one, a sample."""
    task = open_task(folder.name, folder)
    train, test = sample(task.train, PROBE_PICTURES, 0), sample(task.test, TEST_PICTURES, 0)
    known, asked = (Material([load_picture(p) for p in s.pictures], torch.from_numpy(s.labels)) for s in (train, test))
    return Set(task.name, task.classes, task.templates, known, asked, task)


def generated() -> Set:
    """Eight pictures for the probe and eight to test on, of each class that was held out of pretraining."""
    held = [one for one in CLASSES if one.held_out]
    train, test = (
        Material(
            [Image.fromarray(draw(one, np.random.default_rng((99, part, k)))) for one in held for k in range(8)],
            torch.arange(len(held)).repeat_interleave(8),
        )
        for part in (0, 1)
    )
    templates = ("a photo of a {c}.", "a picture of a {c}.")
    return Set(GENERATED, tuple(one.caption for one in held), templates, train, test)


def image_vectors(model: open_clip.CLIP, preprocess: Transform, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit image vectors [n, embed_dim]; every core takes batches of 50."""

    @torch.no_grad()
    def encode(batch: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(picture) for picture in batch])
        return F.normalize(model.encode_image(pixels.contiguous(memory_format=torch.channels_last)), dim=-1)

    batches = [pictures[k : k + 50] for k in range(0, len(pictures), 50)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = torch.cat(list(pool.map(encode, batches)))
    torch.set_num_threads(threads)
    return found


@torch.no_grad()
def class_vectors(model: open_clip.CLIP, tokenizer: Callable[[list[str]], Tensor], of: Set) -> Tensor:
    """One unit vector a class: the mean over the set's prompt templates."""
    texts = [prompts(name, of.templates) for name in of.classes]
    each = [model.encode_text(tokenizer([row[k] for row in texts]), normalize=True) for k in range(len(of.templates))]
    return F.normalize(torch.stack(each).mean(0), dim=-1)


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a logistic regression on the image vectors, scaled by 10 so that the default penalty suits them."""
    regression = LogisticRegression(max_iter=1000).fit(10 * train.numpy(), train_labels.numpy())
    return float(regression.score(10 * test.numpy(), test_labels.numpy()))


def fine_tuned(spec: ModelSpec, of: Set) -> tuple[float, float]:
    """Accuracy of the model fine-tuned on this set alone, and the seconds that its training took."""
    assert of.task is not None
    config = SessionConfig(method="finetune")
    steps = min(MOST_STEPS, steps_for(len(of.task.train), config))
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    clip, method = load(spec), registry.get("finetune")
    layout = method.layout(clip, config)
    begun = time.monotonic()
    trained = train_task(clip, method, layout, of.task, config)
    seconds = time.monotonic() - begun
    expert = method.expert(clip, layout, config, trained.delta)
    with torch.no_grad():
        classes = class_embeddings(clip, [prompts(name, of.templates) for name in of.classes], expert)
        parts = [of.test.pictures[k : k + 100] for k in range(0, len(of.test.pictures), 100)]
        said = [clip.images(torch.stack([clip.eval_transform(p) for p in part]), expert) for part in parts]
    return float(((torch.cat(said) @ classes.T).argmax(1) == of.test.labels).float().mean()), seconds


@job
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of webdataset folders")
    parser.add_argument("--model", default=f"local-dir:{SHIPPED}", help="open_clip name (default: the shipped model)")
    parser.add_argument("--text-targets", type=Path, help="folder with the targets, to find held-out names again")
    parser.add_argument("--fine-tune", action="store_true", help="also fine-tune on every set")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    model, _, preprocess = open_clip.create_model_and_transforms(options.model)
    tokenizer = open_clip.get_tokenizer(options.model)
    model.eval().to(memory_format=torch.channels_last)
    folders = sorted(path.parent for path in options.data.glob("*/classnames.txt"))
    if not folders:
        raise DataError(f"{options.data} holds no webdataset folder", "NAME/classnames.txt, NAME/test/0.tar are sought")
    sets, seconds, count = [], 0.0, 0
    if not options.json:
        print(f"{'set':20} {'classes':>7} {'chance':>7} {'top-1':>7} {'top-5':>7} {'probe':>7}")
    for make in [*((lambda folder=folder: opened(folder)) for folder in folders), generated]:
        of = make()
        begun = time.monotonic()
        images = image_vectors(model, preprocess, of.test.pictures)
        seconds, count = seconds + time.monotonic() - begun, count + len(images)
        classes = class_vectors(model, tokenizer, of)
        best = (images @ classes.T).topk(min(5, len(classes))).indices == of.test.labels[:, None]
        known = image_vectors(model, preprocess, of.train.pictures)
        row: dict[str, Any] = {
            "name": of.name,
            "seen": of.name in SEEN,
            "classes": len(classes),
            "chance": round(1 / len(classes), 4),
            "top1": round(float(best[:, 0].float().mean()), 4),
            "top5": round(float(best.any(1).float().mean()), 4),
            "linear_probe": round(probe(known, of.train.labels, images, of.test.labels), 4),
        }
        if options.fine_tune and of.task is not None and not row["seen"]:
            right, spent = fine_tuned(ModelSpec(name=options.model), of)
            row |= {"fine_tuned": round(right, 4), "fine_tune_seconds": round(spent, 1)}
        sets.append(row)
        if not options.json:
            figures = " ".join(f"{100 * row[k]:6.1f}%" for k in ("chance", "top1", "top5", "linear_probe"))
            tuned = f"  fine-tuned {100 * right:.1f}% in {spent:.0f} s" if "fine_tuned" in row else ""
            print(
                f"{of.name:20} {row['classes']:7} {figures}{'  (trained on)' if row['seen'] else ''}{tuned}", flush=True
            )

    weights = Path(options.model.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    found = names_found(model, read_targets(options.text_targets)) if options.text_targets else None
    result = {
        "sets": sets,
        "images_per_second": round(count / seconds, 1),
        "bytes": weights.stat().st_size if weights.exists() else None,
        "held_out_names_top1": None if found is None else round(found, 4),
    }
    if options.json:
        print(json.dumps(result))
        return
    unseen = [row for row in sets if not row["seen"] and row["name"] != GENERATED]
    ratio = sum(row["top1"] / row["chance"] for row in unseen) / len(unseen)
    print(f"mean over the {len(unseen)} unseen sets: {ratio:.1f} times chance")
    print(f"{result['images_per_second']} pictures/s on {os.cpu_count()} cores, {result['bytes']} bytes")
    if found is not None:
        print(f"names held out of text training, found among all names: {100 * found:.1f}%")


if __name__ == "__main__":
    main()
