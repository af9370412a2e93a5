"""Tries the promises of docs/reliability.md with real kills, and counts what went wrong.

    python jobs/chaos.py --json
    python jobs/chaos.py --drop-guard whole-files      # one protection is taken away: the run has to notice

Each trial disturbs a session of two tiny tasks, gives the same command again, and compares the store with that of an
undisturbed session. They run in forked processes without Ray (tests/crash/crash_driver.py). Exit code 1 if anything is
lost, wrong, done twice or hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "jobs")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from conftest import TINY, write_model, write_pictures  # noqa: E402  (after the paths)
from faulty_proxy import FaultyProxy  # noqa: E402

PARTS = ("processes", "s3")
GUARDS = ("whole-files", "exclusive-names", "find-before-work", "checksum", "retries")
SESSIONS, LONGEST_WAIT_S = 8, 300.0


@dataclass
class Count:
    """What one kind of disturbance came to.

    ended: sessions that one spoilt request ended, which retries are there to prevent. seconds: of the session that was
    given again, where there was one.
    """

    trials: int = 0
    lost_versions: int = 0
    wrong_bytes: int = 0
    trained_twice: int = 0
    hung: int = 0
    ended: int = 0
    seconds: list[float] = field(default_factory=list)

    def bad(self) -> int:
        return self.lost_versions + self.wrong_bytes + self.trained_twice + self.hung + self.ended


@dataclass(frozen=True)
class Ground:
    """Where a run takes place: a model, picture folders by task, a folder for stores."""

    model: Path
    tasks: dict[str, Path]
    out: Path
    guard: str | None
    limit_s: float

    def asked(self, at: str, **more: Any) -> dict[str, Any]:
        two = {name: str(self.tasks[name]) for name in ("colours", "stripes")}
        fixed = {"model": str(self.model), "tasks": two, "settings": {"train__checkpoint_seconds": 1e-6}}
        return {**fixed, "out": str(self.out), "at": at, "guard": self.guard, "limit_s": self.limit_s, **more}


def driver(asked: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "crash" / "crash_driver.py"), json.dumps(asked)]
    Path(asked["out"]).mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def output(child: subprocess.Popen[str]) -> Any:
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(err[-3000:])
    return json.loads(out)


def kills(asked: dict[str, Any]) -> Count:
    """Disturbs a session at each of its calls; see crash_driver.py."""
    count, found = Count(), output(driver(asked))
    for each in found["results"]:
        count.trials += 1
        count.ended += asked["at"] == "fault" and bool(each["status"])
        if each["again"] is None:
            continue  # left the very same files as a trial before
        count.seconds.append(each["seconds"])
        if each["again"]:
            count.hung += 1
            continue
        count.wrong_bytes += not each["same"] or bool(each["leftovers"])
        done = [*each["kept"], *each["trained_after"]]
        count.trained_twice += len(done) > len(set(done)) or len(each["trained_before"]) > len(
            set(each["trained_before"])
        )
        count.lost_versions += set(done) != {"colours", "stripes"}
    return count


def eight_at_once(ground: Ground) -> Count:
    """Eight processes learn a task each into one store; one after another, in the order found, gives the same bytes."""
    from in_process_crew import contents

    from condu_ray.errors import ConduError
    from condu_ray.store import open_store

    store = str(ground.out / "eight" / "store")
    asked, names, children = {}, list[str](), []
    for number in range(SESSIONS):
        folder = list(ground.tasks.values())[number % len(ground.tasks)]
        name = f"task-{number}"
        more = {"tasks": {name: str(folder)}, "store": store, "out": str(ground.out / "eight" / name)}
        asked[name], names = ground.asked("once") | more, [*names, name]
        children.append(driver(asked[name]))
    count, trained = Count(trials=1), []
    for child in children:
        try:
            trained += output(child)
        except RuntimeError:
            count.hung = 1
    try:
        opened = open_store(store)
        order = [manifest.message.split()[-1] for manifest in map(opened.manifest, opened.versions())]
        count.lost_versions = len(set(names) - {card.name for card in opened.manifest().tasks})
        count.trained_twice = len(trained) - len(set(trained))
        opened.gc(in_use_s=0)
        serial = str(ground.out / "eight" / "serial")
        ordered = {name: asked[name]["tasks"][name] for name in order}
        alone = str(ground.out / "eight" / "alone")
        output(driver(ground.asked("serial") | {"tasks": ordered, "store": serial, "out": alone, "guard": None}))
        open_store(serial).gc(in_use_s=0)
        count.wrong_bytes = int(contents(store) != contents(serial))
    except ConduError:
        count.wrong_bytes = 1
    return count


def damaged(ground: Ground) -> Count:
    """Each object of the newest version is damaged in three ways: it is named, never used, and version 1 serves."""
    count, whole = Count(), str(ground.out / "whole")
    output(driver(ground.asked("once", store=whole) | {"guard": None}))
    for each in output(driver(ground.asked("damage", store=whole))):
        before, now = each["refused"]
        count.trials += 1
        count.wrong_bytes += now != [each["object"]]
        count.lost_versions += before != []
    return count


def wrong_clock(ground: Ground) -> Count:
    """Killed, then a gc on a machine whose clock is days off, then given again: nothing is trained a second time."""
    from in_process_crew import contents

    from condu_ray.store import open_store

    code = (
        "import sys, time; real = time.time\n"
        "time.time = lambda: real() + float(sys.argv[2])\n"
        "from condu_ray.store import open_store; open_store(sys.argv[1]).gc()\n"
    )
    count, store = Count(), ground.out / "clock"
    undisturbed = str(ground.out / "clock-undisturbed")
    output(driver(ground.asked("once", store=undisturbed)))
    open_store(undisturbed).gc(in_use_s=0)
    for days in (-3, 3):
        shutil.rmtree(store, ignore_errors=True)
        first = driver(ground.asked("once", store=str(store)))
        wait_for(lambda: list(store.glob("objects/train-*/delta.safetensors")), first)
        first.kill()
        first.communicate()
        kept = [path.parent.name for path in store.glob("objects/train-*/delta.safetensors")]
        (ground.out / "trained").unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", code, str(store), str(days * 86400)], check=True)
        begun = time.monotonic()
        again = output(driver(ground.asked("once", store=str(store))))
        count.seconds.append(time.monotonic() - begun)
        count.trials += 1
        count.trained_twice += len(again) + len(kept) > 2
        open_store(store).gc(in_use_s=0)
        count.wrong_bytes += contents(store) != contents(undisturbed)
    return count


def wait_for(what: Callable[[], object], child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONGEST_WAIT_S
    while not what() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 server in a process of its own behind the faulty proxy; the environment points to it. Yields a bucket."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        with FaultyProxy(f"http://127.0.0.1:{port}") as proxy:
            os.environ.update(
                AWS_ENDPOINT_URL=proxy.url,
                AWS_ACCESS_KEY_ID="key",
                AWS_SECRET_ACCESS_KEY="secret",
                AWS_DEFAULT_REGION="us-east-1",
                CONDU_CACHE=str(folder / "cache"),
            )
            import boto3

            boto3.client("s3").create_bucket(Bucket="condu-chaos")
            yield "s3://condu-chaos"
    finally:
        child.terminate()
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-guard", choices=GUARDS, help="take one protection away; the run has to notice")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run [all]")
    parser.add_argument("--seconds", type=float, default=900.0, help="longest time for one kind of kills [900]")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="condu-chaos-") as name:
        out = Path(name)
        (out / "model").mkdir()
        model, tasks = write_model(out / "model", TINY), write_pictures(out / "pictures")
        ground = Ground(model, tasks, out, asked.drop_guard, asked.seconds)
        table: dict[str, Count] = {}

        def run(what: str, part: Callable[[], Count]) -> None:
            begun = time.monotonic()
            table[what] = part()
            said = f"{what}: {table[what].trials} trials, {table[what].bad()} bad, {time.monotonic() - begun:.0f} s"
            print(said, file=sys.stderr, flush=True)

        if "processes" in asked.parts:
            run("killed at every call, step and change of a file", lambda: kills(ground.asked("file")))
            run("disk full", lambda: kills(ground.asked("disk", every=3)))
            run("an object damaged on disk", lambda: damaged(ground))
            run("eight sessions at once", lambda: eight_at_once(ground))
            run("a gc by a wrong clock", lambda: wrong_clock(ground))
        if "s3" in asked.parts:
            with s3_server(out) as bucket:
                requests = ground.asked("request", bucket=f"{bucket}/kills", every=4)
                faults = ground.asked("fault", bucket=f"{bucket}/faults")
                run("S3: killed at a request", lambda: kills(requests))
                run("S3: 500, 503, slow, silent, lost, half", lambda: kills(faults))
    report(table, asked.json)
    sys.exit(any(count.bad() for count in table.values()))


def report(table: dict[str, Count], as_json: bool) -> None:
    keys = ("trials", "lost_versions", "wrong_bytes", "trained_twice", "hung", "ended")
    seconds = [each for count in table.values() for each in count.seconds]
    rows = {what: {key: getattr(count, key) for key in keys} for what, count in table.items()}
    total: dict[str, Any] = {key: sum(row[key] for row in rows.values()) for key in keys}
    total["median_recovery_s"] = round(statistics.median(seconds), 2) if seconds else None
    if as_json:
        print(json.dumps({**total, "by_disturbance": rows}, indent=1))
        return
    print("| disturbance | " + " | ".join(keys) + " |")
    print("|---|" + "---|" * len(keys))
    for what, row in [*rows.items(), ("all", total)]:
        print(f"| {what} | " + " | ".join(str(row[key]) for key in keys) + " |")
    print(f"median recovery: {total['median_recovery_s']} s")


if __name__ == "__main__":
    main()
