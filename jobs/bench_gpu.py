"""What a GPU waits for: steps and features a second, by how many processes and threads decode pictures for it.

    python jobs/bench_gpu.py birds=DATA/birds --model ViT-B-32 --pretrained openai

Each figure is one process with one GPU; the last row of training hands out one batch again and again. `--json` prints
one object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from ending import job

from condu_ray.config import ModelSpec, SessionConfig
from condu_ray.data import TaskData, open_task
from condu_ray.data.loading import PictureSet, in_batches
from condu_ray.errors import ConfigError
from condu_ray.methods import registry, training
from condu_ray.methods.batches import batches
from condu_ray.models.clip import Clip
from condu_ray.models.load import load
from condu_ray.sources import from_dotted

BATCH, SKIPPED = 64, 5  # pictures a pass; first steps, in which kernels are chosen


def steps_per_second(clip: Clip, task: TaskData, config: SessionConfig) -> float:
    """Of training, without its first steps."""
    method, stamps = registry.get(config.method), [0.0]
    layout = method.layout(clip, config)
    training.train_task(clip, method, layout, task, config, on_step=lambda step: stamps.append(time.perf_counter()))
    return float((len(stamps) - 1 - SKIPPED) / (stamps[-1] - stamps[SKIPPED]))


def one_batch(task: TaskData, clip: Clip, config: SessionConfig, steps: range, *place: int) -> Iterator[Any]:
    """The first batch at every step: training as fast as the GPU goes."""
    first = next(iter(batches(task, clip, config, range(1))))
    for _ in steps:
        yield first


def features_per_second(clip: Clip, task: TaskData, threads: int) -> float:
    """Pictures a second through the base model."""
    pictures = PictureSet(task.train.take(range(min(512, len(task.train)))), clip.eval_transform)
    with torch.no_grad():
        clip.features(next(iter(in_batches(pictures, BATCH)))[0])
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for pixels, _ in in_batches(pictures, BATCH, threads):
            clip.features(pixels)
        torch.cuda.synchronize()
    return len(pictures) / (time.perf_counter() - begun)


def measure(clip: Clip, task: TaskData, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Steps a second by precision and loader processes, and pictures a second by threads."""
    found: dict[str, dict[str, float]] = {}
    most = min(8, (os.cpu_count() or 1) - 1)
    for precision in ("bf16", "fp32"):
        rates = found[f"steps/s, {precision}"] = {}
        for loaders in sorted({0, min(2, most), min(4, most), most}):
            given = {**settings, "train.precision": precision, "train.loader_processes": loaders}
            rates[f"{loaders} processes"] = steps_per_second(clip, task, from_dotted(given))
        with patch.object(training, "batches", one_batch):
            rates["nothing to decode"] = steps_per_second(
                clip, task, from_dotted({**settings, "train.precision": precision})
            )
    threads = sorted({1, min(4, most), most})
    found["features/s"] = {f"{count} threads": features_per_second(clip, task, count) for count in threads}
    return found


@job
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", metavar="NAME=PATH", help="a task, as for `condu-ray learn`")
    parser.add_argument("--model", default="default", help="as for `condu-ray learn`")
    parser.add_argument("--pretrained", help="as for `condu-ray learn`")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", "run this job on a machine that has one")
    name, _, path = options.task.partition("=")
    clip = load(ModelSpec(name=options.model, pretrained=options.pretrained), "cuda")
    found = measure(clip, open_task(name, path), {"train.steps": max(SKIPPED + 2, options.steps)})
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "model": options.model, **found}, indent=1))
        return
    print(f"{torch.cuda.get_device_name()}, model {options.model}")
    for what, rates in found.items():
        for how, rate in rates.items():
            print(f"{what:18} {how:18} {rate:8.1f}")


if __name__ == "__main__":
    main()
