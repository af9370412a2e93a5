"""Kills a session at chosen calls and runs it again, in forked children, so that a run takes less than a second.

usage: crash_driver.py JSON, with {"model": folder, "tasks": {name: folder}, "out": folder, "settings": {...}, "at":
"store" (calls of the store and of the crew), "step" (steps of training too), "file" (changes of files too), "request"
(requests to the store's server, and steps), "fault" (no kills: the server is told to fail) or "disk" (no kills: the
disk is full), "every": look at one call of so many, "limit_s": begin no trial later than that (in random order,
then), "seeds": kills at random times besides, "bucket": s3:// URL of stores instead of folders, "guard": what is taken
away (see GUARDS)}. Prints one JSON document: the calls of an undisturbed session, and what each kill led to. With "at":
"once" it is one session on "store", and what it trained; with "serial" a session for each task, one after another; with
"damage" each object of version 2 of "store" is damaged.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from in_process_crew import InProcessCrew, contents, files_of, make_store, opened, settings, silent

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine import plan
from condu_ray.engine import work as engine_work
from condu_ray.engine.keys import train_key
from condu_ray.engine.session import learn
from condu_ray.errors import ConduError
from condu_ray.methods.training import Place
from condu_ray.store import LocalStore, Store, bucket, local, open_store
from condu_ray.store.header import open_existing
from condu_ray.voting import open as opening

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
FULL_DISK_CALLS = ("fsync", "link", "mkdir")
REQUESTS = (
    "put_object",
    "get_object",
    "head_object",
    "list_objects_v2",
    "delete_object",
    "upload_file",
    "create_multipart_upload",
    "upload_part",
    "list_parts",
    "complete_multipart_upload",
)
FAULTS = ("500", "503", "slow", "timeout", "lost", "half")
FAULTS_EACH = 3
REFUSED = 2
HANGS_S = 300


class Calls:
    """Counts calls; at the one that is told, this process dies on the spot."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fatal = -1

    def __call__(self, name: str) -> None:
        if len(self.names) == self.fatal:
            self.strike()
        self.names.append(name)

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

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

    def config(self, store: str) -> SessionConfig:
        return settings(store, self.asked["model"], **self.asked.get("settings", {}))

    def run(self, store: str) -> None:
        config = self.config(store)
        opened_store = make_store(config)
        learn(opened_store, config, self.tasks, Steps(opened_store, config, self.calls, self.asked["at"]), silent)

    def keys(self, store: Store) -> dict[str, str]:
        config = self.config(store.url)
        return {task.name: train_key(store.header.model_sha256, config, task, engine_work.BASE) for task in self.tasks}


class Steps(InProcessCrew):
    """Counts the steps of a training too, where they are asked for."""

    def __init__(self, store: Store, config: SessionConfig, calls: Calls, at: str) -> None:
        super().__init__(store, config)
        self._calls, self._at = calls, at

    def train(self, jobs: Any, update: Any) -> None:
        def step(done: Any) -> None:
            if self._at in ("step", "file", "request"):
                self._calls(f"step {done.step} of {done.task}")

        engine_work.work_through(self._store, self._config, jobs, Place(), step)


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked child; returns its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        signal.alarm(HANGS_S)  # ends it, as a signal
        try:
            work()
            status = 0
        except ConduError as refused:
            print(refused, file=sys.stderr)
            status = REFUSED
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Places:
    """Where the stores of the trials are, one after another, and what was trained for them."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._out, self._bucket, self._count = Path(asked["out"]), asked.get("bucket"), 0
        self.log = self._out / "trained"

    def new(self) -> str:
        self.log.unlink(missing_ok=True)
        if self._bucket:
            self._count += 1
            return f"{self._bucket}/{self._count}"
        folder = self._out / "store"
        shutil.rmtree(folder, ignore_errors=True)
        return str(folder)

    def trained(self) -> list[str]:
        """Names of the tasks whose training came to its end, since this was last asked."""
        names = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return names


def state_of(store: str) -> tuple[Any, ...]:
    """Everything that a next run can find there, times aside; what is being written has random names."""
    files = files_of(store)
    named = {path: body for path, body in files.items() if not path.startswith(("tmp/", "probe/", "gc/", "store.json"))}
    return "store.json" in files, len(files) - len(named), tuple(named.items())


def disturb(session: Session, places: Places, kill: Callable[[str], int], seen: set[Any], expected: Any) -> Any:
    """Kills a session, looks at what is there, runs it again and compares with an undisturbed one."""
    store = places.new()
    status = kill(store)
    trained_before, state = places.trained(), state_of(store)
    found: dict[str, Any] = {"status": status, "trained_before": trained_before}
    if (*trained_before, state) in seen:
        return found | {"again": None}  # the very same files were found by a run before
    seen.add((*trained_before, state))
    kept = []
    there = open_existing(store)
    if there:
        keys = session.keys(there)
        learned = [card.name for card in there.manifest().tasks] if there.versions() else []
        kept = [name for name, key in keys.items() if there.find(key, "delta") or name in learned]
    begun = time.monotonic()
    again = in_child(lambda: session.run(store))
    seconds = time.monotonic() - begun
    trained = places.trained()
    if again:
        return found | {"again": again, "kept": kept, "trained_after": trained, "same": False, "seconds": seconds}
    open_store(store).gc(in_use_s=0)
    leftovers = [path for path in files_of(store) if path.startswith(("tmp/", "work/", "uploads/", "marks/", "gc/"))]
    same = contents(store) == expected
    ended = {"again": again, "kept": kept, "trained_after": trained, "same": same, "leftovers": leftovers}
    return found | ended | {"seconds": seconds}


def replaced(source: Path, target: Path, locked: bool) -> None:
    """What `files.publish` would be if it did not mind who else wrote that name."""
    shutil.copyfile(source, target)


@contextmanager
def unlocked(folder: Path) -> Iterator[bool]:
    """What `files.lock` is where there are no locks."""
    yield False


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": lambda body: body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 0xFF]) + body[len(body) // 2 + 1 :],
    "cut": lambda body: body[:-7],
    "removed": lambda body: None,
}


def damage(whole: Path, folder: Path) -> list[dict[str, Any]]:
    """Damages each object that version 2 alone has in each way; which objects of versions 1 and 2 are then refused."""
    store, found = open_store(whole), []
    versions = [store.manifest(number).objects.values() for number in (1, 2)]
    first = {ref.path for ref in versions[0]}
    for path in sorted({ref.path for ref in versions[1]} - first):
        for how, change in DAMAGES.items():
            shutil.copytree(whole, folder)
            body = change((folder / path).read_bytes())
            (folder / path).unlink()
            if body is not None:
                (folder / path).write_bytes(body)
            refused = [list[str](), list[str]()]
            for refs, names in zip(versions, refused, strict=True):
                for ref in refs:
                    try:
                        open_store(folder).get(ref)
                    except ConduError:
                        names.append(ref.path)
            found.append({"object": path, "how": how, "refused": refused})
            shutil.rmtree(folder)
    return found


def half_published(source: Path, target: Path, locked: bool) -> None:
    """What `files.publish` would be without its care: written where readers look."""
    body = source.read_bytes()
    target.write_bytes(body[: len(body) // 2])
    CALLS("half a file")
    target.write_bytes(body)


class Everything:
    """A set that holds whatever it is asked for."""

    def __contains__(self, item: object) -> bool:
        return True

    def add(self, item: object) -> None:
        pass


CALLS = Calls()
GUARDS: dict[str, list[tuple[Any, str, Any]]] = {
    "whole-files": [(local, "publish", half_published)],
    "exclusive-names": [(local, "publish", replaced), (local, "lock", unlocked)],  # the lock alone would do
    "find-before-work": [(LocalStore, "find", lambda self, key, name: None)],
    "checksum": [(local, "_checked", Everything())],
    "retries": [(bucket, "TRIES", 1)],
}
"""What can be taken away, to see whether a run notices: (where, name, instead)."""


def drop(guard: str) -> None:
    for where, name, instead in GUARDS[guard]:
        setattr(where, name, instead)


def tell(endpoint: str, fault: str, after: int) -> None:
    """Asks the proxy in front of the server to do this to one request, `after` others have gone by."""
    with urllib.request.urlopen(f"{endpoint}/__fault__/{fault}/{after}", timeout=30) as answer:
        answer.read()


def count_requests(calls: Calls) -> None:
    """Every request to a store's server counts before it is sent."""
    real = bucket.make_client

    class Counting:
        def __init__(self) -> None:
            self._client = real()

        def __getattr__(self, name: str) -> Any:
            value = getattr(self._client, name)
            if name in REQUESTS:
                return lambda *given, **named: (calls(f"s3.{name}"), value(*given, **named))[1]
            return value

    bucket.make_client = Counting  # type: ignore[assignment]


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    engine_work.CHECKPOINT_SHARE = float("inf")  # after every step that asks for one
    bucket.LONGEST_WAIT_S, bucket.READ_S = 0.1, 2.0
    bucket._THREADS = 1  # so that the requests of a session have one order
    for module in (plan, opening, engine_work):
        module.load = lru_cache(module.load)  # type: ignore[attr-defined]  # the base model is never changed
    at, calls = asked["at"], CALLS
    if at in ("request", "fault"):
        count_requests(calls)
    elif at != "disk":
        for name in STORE_CALLS:
            calls.spy(LocalStore, name, f"store.{name}")
        for name in CREW_CALLS:
            calls.spy(Steps if name in Steps.__dict__ else InProcessCrew, name, f"crew.{name}")
    session, places = Session(asked, calls), Places(asked)
    real = engine_work.train_task

    def told(*given: Any, **named: Any) -> Any:
        trained = real(*given, **named)
        with open(places.log, "a") as log:
            log.write(f"{given[3].name}\n")
        return trained

    engine_work.train_task = told
    if at in ("once", "serial", "damage"):
        if guard := asked.get("guard"):
            drop(guard)
        if at == "damage":
            print(json.dumps(damage(Path(asked["store"]), Path(asked["out"]) / "damaged")))
            return
        whole = session.tasks
        for tasks in [[task] for task in whole] if at == "serial" else [whole]:
            session.tasks = tasks
            session.run(asked["store"])
        print(json.dumps(places.trained()))
        return
    session.run(places.new())  # loads everything that children then have
    for name in {"file": FILE_CALLS, "disk": FULL_DISK_CALLS}.get(at, ()):
        calls.spy(os, name, f"os.{name}")
    undisturbed = places.new()
    calls.names.clear()
    begun = time.monotonic()
    session.run(undisturbed)
    seconds, names = time.monotonic() - begun, list(calls.names)
    open_store(undisturbed).gc(in_use_s=0)
    expected = contents(undisturbed)
    if guard := asked.get("guard"):
        drop(guard)
    seen: set[Any] = set()
    results = []

    def struck_at(index: int, store: str, strike: Callable[[], None] = calls.strike) -> int:
        def work() -> None:
            calls.names.clear()
            calls.strike, calls.fatal = strike, index  # type: ignore[method-assign]
            session.run(store)

        return in_child(work)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(fault: str, index: int, store: str) -> int:
        tell(os.environ["AWS_ENDPOINT_URL"], fault, index)
        return in_child(lambda: session.run(store))

    def killed_after(wait: float, store: str) -> int:
        child = os.fork()
        if not child:
            try:
                session.run(store)
            finally:
                os._exit(0)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begun = time.monotonic()

    def trial(index: int | None, name: str, strike: Callable[[str], int]) -> None:
        if time.monotonic() - begun > asked.get("limit_s", float("inf")):
            return
        if at == "fault":
            seen.clear()  # each is looked at to its end
        results.append({"index": index, "call": name, **disturb(session, places, strike, seen, expected)})

    trials: list[tuple[int, str, Callable[[str], int]]] = []
    if at == "fault":
        for index in range(0, len(names), len(names) // FAULTS_EACH):
            for fault in FAULTS:
                spoil = lambda store, f=fault, i=index: failing(f, i, store)  # noqa: E731
                trials.append((index, f"{fault} for {names[index]}", spoil))
    else:
        kind = {"strike": full} if at == "disk" else {}
        for index, name in list(enumerate(names))[:: asked.get("every", 1)]:
            trials.append((index, name, lambda store, i=index: struck_at(i, store, **kind)))
    if "limit_s" in asked:
        random.Random(0).shuffle(trials)
    for index, name, strike in trials:
        trial(index, name, strike)
    random.seed(0)
    for _ in range(asked.get("seeds", 0)):
        wait = random.uniform(0, seconds)
        trial(None, f"after {wait:.3f} s", lambda store, wait=wait: killed_after(wait, store))
    print(json.dumps({"calls": names, "seconds": seconds, "expected": expected, "results": results}))


if __name__ == "__main__":
    main()
