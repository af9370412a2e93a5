"""Kills a session at chosen calls and runs it again, in forked children, so that a run takes less than a second.

usage: crash_driver.py JSON, with {"model": folder, "tasks": {name: folder}, "out": folder, "settings": {...}, "at":
"store" (calls of the store and of the crew), "step" (steps of training too) or "file" (changes of files too), "seeds":
kills at random times besides}. Prints one JSON document: the calls of an undisturbed session, and what each kill led
to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from in_process_crew import InProcessCrew, contents, make_store, opened, settings, silent

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine import plan, scoring, train
from condu_ray.engine.keys import train_key
from condu_ray.engine.session import learn
from condu_ray.methods.training import Place
from condu_ray.store import LocalStore, Store, open_store

STORE_CALLS = (
    "create",
    "open",
    "versions",
    "manifest",
    "put",
    "find",
    "get",
    "commit",
    "save_work",
    "load_work",
    "discard",
    "discard_work",
)
CREW_CALLS = ("train", "features", "text_means", "hold", "rescalers", "fuse", "score")
FILE_CALLS = ("link", "fsync", "unlink", "replace", "rename", "rmdir", "mkdir")


class Calls:
    """Counts calls; at the one that is told, this process dies on the spot."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fatal = -1

    def __call__(self, name: str) -> None:
        if len(self.names) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def spy(self, owner: Any, name: str, shown: str) -> None:
        """Makes every call of owner.name count, before it does anything."""
        real = owner.__dict__[name]
        inner = real.__func__ if isinstance(real, classmethod) else real

        @wraps(inner)
        def counted(*given: Any, **named: Any) -> Any:
            self(shown)
            return inner(*given, **named)

        setattr(owner, name, classmethod(counted) if isinstance(real, classmethod) else counted)


class Session:
    """The command: opens or makes the store, learns what is missing. Tells of each training that came to its end."""

    def __init__(self, asked: dict[str, Any], calls: Calls) -> None:
        self.asked, self.calls = asked, calls
        self.tasks: list[TaskData] = opened(asked["tasks"], *asked["tasks"])

    def config(self, store: Path) -> SessionConfig:
        return settings(store, self.asked["model"], **self.asked.get("settings", {}))

    def run(self, store: Path) -> None:
        config = self.config(store)
        opened_store = make_store(config)
        learn(opened_store, config, self.tasks, Steps(opened_store, config, self.calls, self.asked["at"]), silent)

    def keys(self, store: Store, folder: Path) -> dict[str, str]:
        config = self.config(folder)
        return {task.name: train_key(store.header.model_sha256, config, task, train.BASE) for task in self.tasks}


class Steps(InProcessCrew):
    """Counts the steps of a training too, where they are asked for."""

    def __init__(self, store: Store, config: SessionConfig, calls: Calls, at: str) -> None:
        super().__init__(store, config)
        self._calls, self._at = calls, at

    def train(self, jobs: Any, update: Any) -> None:
        def step(done: Any) -> None:
            if self._at == "step":
                self._calls(f"step {done.step} of {done.task}")

        train.work_through(self._store, self._config, jobs, Place(), step)


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked child; returns its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def logged(folder: Path) -> list[str]:
    log = folder.with_suffix(".trained")
    return log.read_text().split() if log.exists() else []


def state_of_disk(folder: Path) -> tuple[Any, ...]:
    """Everything that a next run can find there, times aside; files that are being written have random names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [path for path in files if path.parent.name != "tmp" and path.name != "store.json"]
    made = (folder / "store.json").exists()
    return made, len(files) - len(named), tuple((str(p.relative_to(folder)), p.read_bytes()) for p in named)


def disturb(session: Session, folder: Path, kill: Callable[[], int], seen: set[Any], expected: Any) -> dict[str, Any]:
    """Kills a session, looks at what is there, runs it again and compares with an undisturbed one."""
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".trained")
    log.unlink(missing_ok=True)
    status = kill()
    trained_before, state = logged(folder), state_of_disk(folder) if folder.exists() else ()
    found: dict[str, Any] = {"status": status, "trained_before": trained_before}
    if (*trained_before, state) in seen:
        return found | {"again": None}  # the very same files were found by a run before
    seen.add((*trained_before, state))
    kept = []
    if (folder / "store.json").exists():
        store = open_store(folder)
        keys = session.keys(store, folder)
        learned = [card.name for card in store.manifest().tasks] if store.versions() else []
        kept = [name for name, key in keys.items() if store.find(key, "delta") or name in learned]
    log.unlink(missing_ok=True)
    again = in_child(lambda: session.run(folder))
    open_store(folder).gc(in_use_s=0)
    leftovers = [str(p.relative_to(folder)) for name in ("tmp", "work") for p in (folder / name).glob("*")]
    same = contents(folder) == expected
    return found | {"again": again, "kept": kept, "trained_after": logged(folder), "same": same, "leftovers": leftovers}


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    train.CHECKPOINT_SHARE = float("inf")  # after every step that asks for one
    for module in (plan, scoring, train):
        module.load = lru_cache(module.load)  # type: ignore[attr-defined]  # the base model is never changed
    calls = Calls()
    for name in STORE_CALLS:
        calls.spy(LocalStore, name, f"store.{name}")
    for name in CREW_CALLS:
        calls.spy(Steps if name in Steps.__dict__ else InProcessCrew, name, f"crew.{name}")
    out = Path(asked["out"])
    session = Session(asked, calls)
    real = train.train_task

    def told(*given: Any, **named: Any) -> Any:
        trained = real(*given, **named)
        with open(Path(given[4].store).with_suffix(".trained"), "a") as log:
            log.write(f"{given[3].name}\n")
        return trained

    train.train_task = told
    session.run(out / "undisturbed")  # loads everything that children then have
    if asked["at"] == "file":
        for name in FILE_CALLS:
            calls.spy(os, name, f"os.{name}")
    calls.names.clear()
    begun = time.monotonic()
    shutil.rmtree(out / "undisturbed")
    session.run(out / "undisturbed")
    seconds, names = time.monotonic() - begun, list(calls.names)
    open_store(out / "undisturbed").gc(in_use_s=0)
    expected = contents(out / "undisturbed")
    seen: set[Any] = set()
    results = []

    def killed_at(index: int, folder: Path) -> int:
        def work() -> None:
            calls.names.clear()
            calls.fatal = index
            session.run(folder)

        return in_child(work)

    def killed_after(wait: float, folder: Path) -> int:
        child = os.fork()
        if not child:
            try:
                session.run(folder)
            finally:
                os._exit(0)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    folder = out / "killed"
    for index, name in enumerate(names):
        found = disturb(session, folder, lambda index=index: killed_at(index, folder), seen, expected)
        results.append({"index": index, "call": name, **found})
    random.seed(0)
    for _ in range(asked.get("seeds", 0)):
        wait = random.uniform(0, seconds)
        found = disturb(session, folder, lambda wait=wait: killed_after(wait, folder), seen, expected)
        results.append({"index": None, "call": f"after {wait:.3f} s", **found})
    print(json.dumps({"calls": names, "seconds": seconds, "expected": expected, "results": results}))


if __name__ == "__main__":
    main()
