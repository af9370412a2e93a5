"""What sweeps cost: ASHA beside the full grid, configurations of the vote scored a minute, what a kill repeats.

    python jobs/bench_sweep.py --work WORK
    python jobs/bench_sweep.py --work WORK --stream birds=DATA/birds,signs=DATA/signs --json

On scikit-learn's digits the full grid of 16 configurations is trained to the end, then the same 16 are searched with
early stopping; six members of a population train with rates that change on the way. A short sweep is killed in the
middle and given again. Settings of the vote are searched on --stream (without it: the demo's five worlds) with all
classes competing. docs/sweeps.md defines every figure. Sweeps stay in --work: given again, what is finished is not
done again; the timed part is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import yaml
from ending import job, some_of
from PIL import Image

from condu_ray import reports
from condu_ray.benchmark.stream import parse_stream
from condu_ray.benchmark.worlds import WORLDS, write_worlds
from condu_ray.data.cache import fill
from condu_ray.data.listing import CLASS_FILE, TEMPLATE_FILE
from condu_ray.engine.cluster import connected
from condu_ray.engine.plan import open_data, store_for
from condu_ray.engine.progress import stage
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.methods import registry
from condu_ray.methods.training import Resume, train_task
from condu_ray.models.load import load as load_model
from condu_ray.tuning import answers, command
from condu_ray.tuning.cache import prepare
from condu_ray.tuning.records import Trials
from condu_ray.tuning.settings import read_sweep
from condu_ray.tuning.space import applied
from condu_ray.tuning.trial import accuracy

TRAIN_EACH, TEST_EACH = 120, 20  # digits a class: more than the demo has, so that a point is more than one picture
STEPS, SHORT = 54, 9
MEMBERS = 6  # of the population: about as many steps as ASHA takes
GRID = {
    "train.lr": {"choice": [3e-5, 2e-4, 1e-3, 5e-3]},
    "train.label_smoothing": {"choice": [0.0, 0.1]},
    "train.warmup": {"choice": [0.0, 0.2]},
}
VOTE = {
    "vote.k": {"integer": [1, 8]},
    "vote.router": {"choice": ["lda", "cosine"]},
    "vote.union": {"choice": ["own", "routed", "joint"]},
    "vote.combine": {"choice": ["weighted", "mean_logits"]},
    "vote.average": {"choice": ["logits", "probabilities"]},
    "vote.temperature": {"log": [0.005, 1.0]},
    "vote.base_weight": {"uniform": [0.0, 0.9]},
    "vote.adaptive": {"choice": [True, False]},
    "vote.coverage": {"uniform": [0.5, 0.999]},
    "vote.gap": {"uniform": [0.0, 0.3]},
    "vote.prototypes": {"choice": ["both", "image", "text"]},
}
SCORED = 4000
KILLED_AFTER = 3  # trials that had ended
PATIENCE_S = 600


def write_digits(folder: Path) -> Path:
    """The demo's digits, more of them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return fill(folder, _draw_digits)


def _draw_digits(folder: Path) -> None:
    (world,) = (each for each in WORLDS if each.name == "digits")
    for name in world.classes:
        for number, pixels in enumerate(world.pictures(name, TRAIN_EACH + TEST_EACH, 0)):
            place = folder / ("train" if number < TRAIN_EACH else "test") / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place)
    for file, lines in ((CLASS_FILE, world.classes), (TEMPLATE_FILE, world.templates)):
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_sweep(path: Path, tasks: dict[str, str], space: dict[str, Any], steps: int, **others: Any) -> Path:
    train = {"steps": steps, "towers": "image"}
    session = {"tasks": tasks, "train": train, "eval_pictures": 200, "tracking": "off"}
    found = {"session": session, "space": space, **others}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return path


def beside_the_grid(work: Path) -> dict[str, Any]:
    """ASHA over the 16 configurations of a grid, in random order, beside all of them trained to the end."""
    digits = {"digits": str(write_digits(work / "digits"))}
    whole = write_sweep(work / "grid.yaml", digits, GRID, STEPS, search="grid", early_stopping="none")
    asha = write_sweep(work / "asha.yaml", digits, GRID, STEPS, search="random")
    all_of_it, early = (command.run(path, path.with_suffix(""), stage) for path in (whole, asha))
    best = [found["best"]["values"]["accuracy"] for found in (all_of_it, early)]
    return {
        "asha_step_share": early["steps"] / all_of_it["steps"],
        "asha_gap_points": best[0] - best[1],
        "grid_best": best[0],
        "grid_steps": all_of_it["steps"],
        "asha_best": best[1],
        "asha_trials": early["trials"],
    }


class _Paused(Exception):
    """A member of the population has reached the next rung."""


def population(work: Path) -> dict[str, Any]:
    """Population-based training of the rate (arXiv 1711.09846): at each third of the steps the worst third of the
    members goes on from copies of the best, at a rate times 0.8 or 1.25."""
    digits = {"digits": str(write_digits(work / "digits"))}
    sweep = read_sweep(write_sweep(work / "grid.yaml", digits, GRID, STEPS, search="grid", early_stopping="none"))
    config = applied(sweep.config, {"train.checkpoint_seconds": 1e-9})
    (task,) = open_data(config, stage, sweep.validation_share)
    clip, method = load_model(config.model_spec), registry.get(config.method)
    layout, dice = method.layout(clip, config), np.random.default_rng(config.seed)
    low, high = GRID["train.lr"]["choice"][0], GRID["train.lr"]["choice"][-1]
    rates = list(np.exp(dice.uniform(np.log(low), np.log(high), MEMBERS)))
    weights: list[Any] = [None] * MEMBERS
    reached = [0.0] * MEMBERS
    for mark in (STEPS // 3, 2 * STEPS // 3, STEPS):
        for member in range(MEMBERS):
            kept: list[Any] = [weights[member]]

            def save(checkpoint: Any, kept: list[Any] = kept, mark: int = mark) -> None:
                if int(checkpoint["step"][0]) == mark:
                    kept[0] = {name: np.array(values) for name, values in checkpoint.items()}
                    raise _Paused

            def watch(step: int, model: Any, member: int = member, mark: int = mark) -> None:
                if step == mark:
                    reached[member] = accuracy(clip, model, task, task.test, config)

            resume = Resume(partial(kept.__getitem__, 0), save)
            with suppress(_Paused):
                rated = applied(config, {"train.lr": float(rates[member])})
                train_task(clip, method, layout, task, rated, resume=resume, watch=watch)
            weights[member] = kept[0]
        if mark < STEPS:
            order = np.argsort(reached, kind="stable")
            for worst, best in zip(order[: MEMBERS // 3], order[::-1], strict=False):
                weights[worst], rates[worst] = weights[best], rates[best] * dice.choice([0.8, 1.25])
    return {"pbt_best": max(reached), "pbt_steps": MEMBERS * STEPS}


def ended(folder: Path) -> dict[int, bytes]:
    """The files of the trials that have ended, by number."""
    trials = Trials(folder)
    return {each.number: trials.path(each.settings).read_bytes() for each in trials.all() if each.ended}


def killed(work: Path) -> dict[str, Any]:
    """Kills a sweep in the middle, with kill -9, and gives it again."""
    file = write_sweep(work / "killed.yaml", {"digits": str(work / "digits")}, GRID, SHORT, search="random")
    folder = file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    given = [sys.executable, "-m", "condu_ray.cli", "sweep", str(file), "--json"]
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while len(ended(folder)) < KILLED_AFTER and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # the cluster's own processes notice, and end
    before = ended(folder)
    subprocess.run(given, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE_S)
    after = ended(folder)
    return {
        "repeated_trials": sum(after.get(number) != content for number, content in before.items()),
        "ended_before_the_kill": len(before),
        "ended_after": len(after),
    }


def scored_again(work: Path, stream: str | None) -> dict[str, Any]:
    """Settings of the vote on a whole stream; the clock starts before the processes that score do."""
    tasks = parse_stream(stream).tasks if stream else write_worlds(work / "worlds")
    told = {name: str(place) for name, place in tasks.items()}
    file = write_sweep(work / "vote.yaml", told, VOTE, SHORT, trials=SCORED)
    sweep, folder = read_sweep(file), file.with_suffix("")
    (folder / "scores.jsonl").unlink(missing_ok=True)
    config = sweep.config.model_copy(update={"store": str(folder / "stream")})
    opened = open_data(config, stage, sweep.validation_share)
    store = store_for(config)
    with connected() as cluster:
        with closing(RayCrew(store, config, cluster)) as crew:
            cached = prepare(config, opened, sweep.goals, store, crew, stage)
        begun = time.monotonic()
        with stage("re-scoring") as update:
            records = answers.search(sweep, cached, folder, cluster, update)
        seconds = time.monotonic() - begun
    values = [record.values[0] for record in records if record.values]
    first, spent = records[0].reports[0], sum(record.reports[0].seconds for record in records)
    return {
        "rescored_per_minute": 60 * len(records) / seconds,
        "rescored": len(records),
        "rescoring_ms": 1000 * spent / len(records),
        "validation_pictures": sum(min(len(task.test), config.eval_pictures) for task in opened),
        "classes": sum(len(task.classes) for task in opened),
        "first_last": first.values[0],
        "best_last": max(values),
    }


PARTS = ("grid", "pbt", "kill", "rescore")


@job
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, stores and sweeps")
    parser.add_argument("--stream", metavar="NAME=PATH,...", help="what settings of the vote are searched on")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    work, parts = options.work.resolve(), options.parts
    found: dict[str, Any] = {}
    if "grid" in parts:
        found |= beside_the_grid(work)
    if "pbt" in parts:
        found |= population(work)
    if "kill" in parts:
        write_digits(work / "digits")
        found |= killed(work)
    if "rescore" in parts:
        found |= scored_again(work, options.stream)
    if options.json:
        reports.emit(found)
    else:
        reports.show_table("sweeps", ("figure", "value"), [(name, str(value)) for name, value in found.items()])


if __name__ == "__main__":
    main()
