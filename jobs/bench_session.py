"""What a session costs beside what it is for: its steps beside a plain loop's, two workers beside one, fixed seconds.

    uv run python jobs/bench_session.py --work WORK            all of it, about 10 min on two cores
    uv run python jobs/bench_session.py --work WORK --json     the same numbers as one JSON object
    uv run python jobs/bench_session.py --work WORK --parts fixed

steps: the default model, one worker with all cores, beside the same step in a loop without Ray in this process, before
it and after it. workers: a ViT-B-32 of random weights on two nodes of one core each (ray.cluster_utils), beside one.
fixed: `condu-ray learn` of one task and of three, two steps each; what training, rescaling and evaluation take, by the
session's own clock, is taken off. Pictures are drawn (condu_ray/benchmark/worlds.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of the nodes it starts

import open_clip
import ray
import torch
from ending import job, some_of
from ray.cluster_utils import Cluster as Nodes
from torch import nn

from condu_ray import reports
from condu_ray.benchmark.worlds import write_worlds
from condu_ray.config import SessionConfig
from condu_ray.data import TaskData, prompts
from condu_ray.engine.cluster import NAMESPACE, Cluster, connect, connected
from condu_ray.engine.keys import train_key
from condu_ray.engine.plan import header_of, open_data
from condu_ray.engine.progress import Update, stage
from condu_ray.engine.train import train
from condu_ray.engine.work import BASE, Job
from condu_ray.methods import registry
from condu_ray.methods.batches import batches
from condu_ray.methods.training import learning_rate_for, schedule
from condu_ray.models.load import load
from condu_ray.sources import resolve
from condu_ray.store import create_store

PARTS = ("steps", "workers", "fixed")
BEGIN = 0.2  # of the steps, left out: caches fill, clocks settle
STEPS, LARGE_STEPS = 200, 12
THREE = ("textures", "shapes", "metal")


def config_of(work: Path, name: str, **settings: Any) -> SessionConfig:
    """Settings of a session that learns one drawn task into a store of its own. `__` stands for a dot."""
    tasks = {name: str(work / "pictures" / name)}
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return resolve({"method": "finetune", "gpu": "no", "tracking": "off", "tasks": tasks, **given})[0]


class Pace:
    """Steps a second, from when each further step was seen first."""

    def __init__(self, steps: int) -> None:
        self.first, self.seen = int(BEGIN * steps), list[tuple[float, int]]()

    def __call__(self, done: int) -> None:
        if done >= self.first and (not self.seen or done > self.seen[-1][1]):
            self.seen.append((time.monotonic(), done))

    def rate(self) -> float:
        (begun, first), (ended, last) = self.seen[0], self.seen[-1]
        return (last - first) / (ended - begun)


# ---- a step


def plain(config: SessionConfig, task: TaskData, steps: int) -> tuple[float, float]:
    """(steps a second of a loop as one would write it, share of its time that it waits for pictures), same batches."""
    torch.set_num_threads(os.cpu_count() or 1)
    clip, method = load(config.model_spec), registry.get(config.method)
    model, parameters = method.prepare(clip, method.layout(clip, config), config, None)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    words = clip.tokenizer([prompts(name, task.templates)[0] for name in task.classes])
    peak = learning_rate_for(clip.parameter_count(), config)
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=peak, weight_decay=config.train.weight_decay)
    pace, waited, begun = Pace(steps), 0.0, time.monotonic()
    drawn = iter(batches(task, clip, config, range(steps)))
    for step in range(steps):
        asked = time.monotonic()
        pixels, labels = next(drawn)
        waited += time.monotonic() - asked
        for group in optimiser.param_groups:
            group["lr"] = peak * schedule(step, steps, config.train.warmup)
        optimiser.zero_grad()
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(words, normalize=True)  # type: ignore[operator]
        loss: Any = nn.functional.cross_entropy(
            model.logit_scale.exp() * image @ text.T,  # type: ignore[operator]
            labels,
            label_smoothing=config.train.label_smoothing,
        )
        loss.backward()
        optimiser.step()
        loss.item()
        pace(step + 1)
    return pace.rate(), waited / (time.monotonic() - begun)


def with_ray(config: SessionConfig, task: TaskData, steps: int, cluster: Cluster) -> float:
    """Steps a second of the training run of a session."""
    store = create_store(config.store, header_of(config)[0])
    pace = Pace(steps)
    update: Update = lambda done, total, note: pace(done)  # noqa: E731
    job = Job(train_key(store.header.model_sha256, config, task, BASE), task)
    train(store, config, [job], cluster, update)
    shutil.rmtree(config.store)
    return pace.rate()


def steps_part(work: Path) -> dict[str, Any]:
    config = config_of(work, "textures", train__steps=STEPS, workers=1, store=str(work / "steps-store"))
    (task,) = open_data(config, stage)
    before, share = plain(config, task, STEPS)
    with connected() as cluster:
        inside = with_ray(config, task, STEPS, cluster)
    after, _ = plain(config, task, STEPS)
    return {
        "loading_share": share,
        "train_ratio_to_plain": 2 * inside / (before + after),
        "steps_per_second": inside,
        "plain_steps_per_second": [before, after],
    }


# ---- two workers


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Cluster]:
    """So many nodes of one core each, beside a head of none."""
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(count):
            found.add_node(num_cpus=1)
        ray.init(address=found.address, namespace=NAMESPACE, log_to_driver=False)
        yield connect()
    finally:
        ray.shutdown()
        found.shutdown()


def workers_part(work: Path) -> dict[str, Any]:
    checkpoint = work / "ViT-B-32.pt"
    if not checkpoint.exists():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), checkpoint)
    large = {"model": "ViT-B-32", "pretrained": str(checkpoint), "train__towers": "image", "train__steps": LARGE_STEPS}
    rates = {}
    for count in (1, 2):
        place = {"store": str(work / f"workers-{count}"), "workers": count, "parallel": "data"}
        config = config_of(work, "textures", **large, **place)
        (task,) = open_data(config, stage)
        with nodes(count) as cluster:
            rates[count] = with_ray(config, task, LARGE_STEPS, cluster)
    return {"two_worker_speedup": rates[2] / rates[1], "steps_per_second_of_workers": rates}


# ---- what is fixed


def learned(work: Path, names: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """(seconds of the whole command, seconds by step) of `condu-ray learn` of these tasks, two steps each."""
    store = work / f"fixed-{len(names)}"
    shutil.rmtree(store, ignore_errors=True)
    asked = [f"--task={name}={work / 'pictures' / name}" for name in names]
    options = ["--store", str(store), "--train.steps", "2", "--gpu", "no", "--json"]
    begun = time.monotonic()
    command = [str(Path(sys.executable).with_name("condu-ray")), "learn", *asked, *options]
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - begun
    by_step: dict[str, float] = {}
    for path in sorted((store / "versions").iterdir()):
        for step, seconds in json.loads(path.read_text())["seconds"].items():
            by_step[step] = by_step.get(step, 0.0) + seconds
    by_step["start, commit, tracking"] = whole - sum(by_step.values())
    return whole, by_step


def fixed_part(work: Path) -> dict[str, Any]:
    def fixed(by_step: dict[str, float]) -> float:
        return sum(seconds for step, seconds in by_step.items() if step not in ("evaluate", "rescale"))

    learned(work, THREE[:1])  # byte code and files are in memory after it
    one, three = learned(work, THREE[:1])[1], learned(work, THREE)[1]
    return {
        "fixed_seconds": fixed(one),
        "fixed_seconds_a_further_task": (fixed(three) - fixed(one)) / (len(THREE) - 1),
        "by_step": {"one task": one, "three tasks": three},
    }


@job
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and stores")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    write_worlds(work / "pictures")
    makers = {"steps": steps_part, "workers": workers_part, "fixed": fixed_part}
    found: dict[str, Any] = {"cores": os.cpu_count()}
    for part in options.parts:
        found |= makers[part](work)
    if options.json:
        reports.emit(found)
        return
    reports.show_table("a session's cost", ("figure", "value"), [(name, str(value)) for name, value in found.items()])


if __name__ == "__main__":
    main()
