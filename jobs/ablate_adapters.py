"""What each choice of rapf and calfuse is worth: a class-incremental stream on features that are computed once.

    python jobs/ablate_adapters.py --data DATA/caltech101 --increment 10 --seeds 0,1,2 --work WORK

Every row changes some settings of one of the two; the fits are those of `condu-ray learn`, and the class vectors answer
alone, without Gaussians (`--memory.discriminant no`). Killed, the same command goes on. Avg and Last as in
docs/class_incremental.md (all test pictures of the classes learned so far, all of these classes compete). `unlike`: the
share of the last answers that are others when every training feature is changed by one part in a million, first seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ending import job
from numpy.typing import NDArray

from condu_ray import reports
from condu_ray.benchmark.increments import increments
from condu_ray.config import ModelSpec, SessionConfig
from condu_ray.data import PictureSet, Split, open_task, prompts
from condu_ray.data.loading import BATCH, in_batches
from condu_ray.engine.progress import stage
from condu_ray.engine.scoring import threads_of
from condu_ray.fusion.layout import Layout
from condu_ray.methods import adapter
from condu_ray.methods.adapter_fit import fit
from condu_ray.methods.protocol import Features
from condu_ray.models.clip import Clip, class_embeddings
from condu_ray.models.head import Head
from condu_ray.models.load import load
from condu_ray.sources import resolve
from condu_ray.store.documents import read, write

SHAKEN = 1e-6  # standard deviation of that change, relative
ROWS: dict[str, dict[str, Any]] = {
    "rapf": {"method": "rapf"},
    "rapf, its shrinkage": {"method": "rapf", "memory.shrinkage": "rapf"},
    "calfuse": {"method": "calfuse"},
    "calfuse, svd": {"method": "calfuse", "adapter.basis": "svd"},
    "calfuse, no basis": {"method": "calfuse", "adapter.basis": "identity"},
    "calfuse, by direction, bias 0.1": {
        "method": "calfuse",
        "adapter.weights": "direction",
        "adapter.mix_bias": 0.1,
    },
    "calfuse, constant": {"method": "calfuse", "adapter.weights": "constant"},
    "calfuse, not fused": {"method": "calfuse", "adapter.basis": "none"},
    "calfuse, share 1": {"method": "calfuse", "adapter.calibration": "none"},
    "calfuse, share fixed": {"method": "calfuse", "adapter.calibration": "fixed"},
    "calfuse, share scheduled": {"method": "calfuse", "adapter.calibration": "schedule"},
    "calfuse, share learned": {"method": "calfuse", "adapter.calibration": "learnable"},
    "calfuse, share fixed, raw mix": {
        "method": "calfuse",
        "adapter.calibration": "fixed",
        "adapter.mix": "raw",
    },
    "calfuse, no distillation": {"method": "calfuse", "adapter.distillation": 0.0},
    "calfuse, no hinge": {"method": "calfuse", "adapter.hinge": 0.0},
    "calfuse, diagonal": {"method": "calfuse", "memory.covariance": "diagonal"},
    "calfuse, not shrunk": {"method": "calfuse", "memory.shrinkage": "none"},
    "calfuse, no replay": {"method": "calfuse", "memory.per_epoch": 0},
}


@dataclass(frozen=True, eq=False)
class Session:
    """What θ⁰ sees of a session's pictures. test: unit features f32[N, D]; labels count within the session."""

    name: str
    train: Features
    test: NDArray[np.float32]
    labels: NDArray[np.int64]


def sessions(clip: Clip, tasks: Mapping[str, str], work: Path) -> list[Session]:
    """The sessions of a stream; features are computed once a source and kept in `work`."""
    found = []
    for name, source in tasks.items():
        task = open_task(name, source)
        path = work / f"{task.fingerprint[:24]}-{clip.sha256[:12]}.npz"
        if not path.exists():
            with stage(f"features of {name}"):
                train, test = (_seen(clip, split) for split in (task.train, task.test))
            texts = class_embeddings(clip, [prompts(each, task.templates) for each in task.classes]).numpy()
            arrays: dict[str, Any] = {"train": train[0] * train[1][:, None], "test": test[0], "texts": texts}
            labels: dict[str, Any] = {"train_labels": task.train.labels, "test_labels": task.test.labels}
            work.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(part, **arrays, **labels)
            part.replace(path)  # a run that is killed leaves no half of it under its name
        with np.load(path) as kept:
            features = Features(kept["train"], kept["train_labels"], kept["texts"])
            found.append(Session(name, features, kept["test"], kept["test_labels"]))
    return found


def _seen(clip: Clip, split: Split) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(unit features f32[N, D], their lengths f32[N] before they were made unit)"""
    with torch.no_grad():
        parts = [clip.features(pixels) for pixels, _ in in_batches(PictureSet(split, clip.eval_transform), BATCH)]
    return torch.cat([each.unit for each in parts]).numpy(), torch.cat([each.lengths for each in parts]).numpy()


def learned(clip: Clip, stream: Sequence[Session], config: SessionConfig) -> tuple[list[float], NDArray[np.int64]]:
    """(accuracy after each session in percent, the answers after the last)."""
    layout: Layout = adapter.layout(clip, config)
    state = adapter.empty(layout, config)
    accuracies, said = [], np.empty(0, np.int64)
    for number, session in enumerate(stream, start=1):
        old = [state.memory[name] for name in state.tasks]
        start = adapter.adapter_of(layout, state.latest) if state.latest is not None else None
        fitted = fit(session.name, session.train, old, start, clip.logit_scale, config)
        memory = {session.name: {**fitted.gaussians.arrays(), "texts": session.train.texts}}
        state = state.add(session.name, adapter.delta_of(layout, fitted.adapter), memory)
        assert state.latest is not None
        head = adapter.head(clip, layout, config, state.latest, state.memory)
        said, truth = answers(stream[:number], head)
        accuracies.append(100 * float((said == truth).mean()))
    return accuracies, said


def answers(seen: Sequence[Session], head: Head | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(answers, right ones) for all test pictures of these sessions, all their classes competing."""
    texts = torch.tensor(np.concatenate([each.train.texts for each in seen]))
    offsets = np.cumsum([0, *(len(each.train.texts) for each in seen)])
    unit = torch.tensor(np.concatenate([each.test for each in seen]))
    truth = np.concatenate([each.labels + offset for each, offset in zip(seen, offsets[:-1], strict=True)])
    return ((head(unit) if head else unit) @ texts.T).argmax(dim=1).numpy(), truth


def shaken(stream: Sequence[Session]) -> list[Session]:
    """The same sessions with every training feature changed by one part in a million."""
    random = np.random.default_rng(0)

    def moved(raw: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(raw * (1 + SHAKEN * random.standard_normal(raw.shape)), np.float32)

    return [
        Session(each.name, Features(moved(each.train.raw), each.train.labels, each.train.texts), each.test, each.labels)
        for each in stream
    ]


def measured(clip: Clip, stream: Sequence[Session], config: SessionConfig, first: bool, path: Path) -> dict[str, Any]:
    """Figures of a row's settings; read from `path` where they are there already."""
    found: dict[str, Any] | None = read(path)
    if found is not None:
        return found
    with threads_of(1):  # torch's threads and NumPy's, which draws features, would wait for each other
        accuracies, said = learned(clip, stream, config)
        found = {"avg": statistics.fmean(accuracies), "last": accuracies[-1]}
        if first:
            found["unlike"] = 100 * float((learned(clip, shaken(stream), config)[1] != said).mean())
    write(path, found)
    return found


def _digest(stream: Sequence[Session]) -> str:
    """sha256 (hex) of all that the figures follow from."""
    told = hashlib.sha256()
    for each in stream:
        for array in (each.train.raw, each.train.labels, each.train.texts, each.test, each.labels):
            told.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def _key(digest: str, config: SessionConfig) -> str:
    told = config.model_dump_json(include={"method", "seed", "adapter", "memory"})
    return hashlib.sha256(f"{digest} {told}".encode()).hexdigest()[:24]


def measure(
    clip: Clip, stream: Sequence[Session], seeds: Sequence[int], rows: Mapping[str, Mapping[str, Any]], work: Path
) -> list[dict[str, Any]]:
    digest = _digest(stream)
    zero_shot = []
    for number in range(1, len(stream) + 1):
        said, truth = answers(stream[:number], None)
        zero_shot.append(100 * float((said == truth).mean()))
    found: list[dict[str, Any]] = [{"row": "zero-shot", "avg": [statistics.fmean(zero_shot)], "last": [zero_shot[-1]]}]
    for name, settings in rows.items():
        with stage(name):
            configs = [resolve({**settings, "seed": seed})[0] for seed in seeds]
            runs = [
                measured(clip, stream, each, each is configs[0], work / f"row-{_key(digest, each)}.json")
                for each in configs
            ]
        figures = {key: [run[key] for run in runs if key in run] for key in ("avg", "last", "unlike")}
        found.append({"row": name, **figures})
    return found


@job
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the set, or several, as for jobs/benchmark.py --protocol b0")
    parser.add_argument("--increment", type=int, required=True, metavar="N", help="classes a session")
    parser.add_argument("--base", type=int, default=0, metavar="M", help="classes of the first session [default: N]")
    parser.add_argument("--seeds", default="0", help="of fits [default: 0]")
    parser.add_argument("--rows", help="names of rows, separated by ';' [default: all]")
    parser.add_argument("--start", default="default", help="of the first adapter: default or identity [default]")
    parser.add_argument("--model", default="default", help="as for `condu-ray learn`")
    parser.add_argument("--pretrained", help="as for `condu-ray learn`")
    parser.add_argument("--work", type=Path, required=True, help="folder for features and figures")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    rows = options.rows.split(";") if options.rows else list(ROWS)
    if strange := [name for name in rows if name not in ROWS]:
        parser.error(f"no row {strange[0]!r}; there are {'; '.join(ROWS)}")
    chosen = {name: {**ROWS[name], "adapter.init": options.start} for name in rows}
    clip = load(ModelSpec(name=options.model, pretrained=options.pretrained))
    tasks = increments(f"b{options.base}", options.data, options.increment, None).tasks
    stream = sessions(clip, tasks, options.work)
    found = measure(clip, stream, [int(seed) for seed in options.seeds.split(",")], chosen, options.work)
    if options.json:
        print(json.dumps({"data": options.data, "sessions": list(tasks), "rows": found}))
        return
    table = [tuple(_spread(each.get(key)) if key != "row" else each["row"] for key in KEYS) for each in found]
    reports.show_table(f"{options.data}, {len(tasks)} sessions, percent", ("row", "Avg", "Last", "unlike"), table)


KEYS = ("row", "avg", "last", "unlike")


def _spread(values: Sequence[float] | None) -> str | None:
    if not values:
        return None
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
