"""The command as people run it: killed, stopped with Ctrl-C, submitted as a job to a cluster that is there already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
from command_line import free_port, process
from in_process_crew import contents, learn_here, opened, settings
from ray.util.state import list_actors, list_placement_groups
from ray_processes import descendants, ray_processes

from condu_ray.store import open_store

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0
STAYING = ("FusionActor", "JobSupervisor", "_AutoscalingCoordinatorActor")  # the last two: Ray's own, one a cluster
Folders = dict[str, Path]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def arguments(model: Path, tasks: Folders, store: Path, steps: int) -> list[str]:
    given = [f"--task={name}={tasks[name]}" for name in ("colours", "stripes")]
    given += ["--model", f"local-dir:{model}", "--store", str(store), f"--train.steps={steps}", "--tracking=off"]
    return [*given, "--train.batch-size=8", "--train.towers=image", "--train.checkpoint-seconds=0.01", "--workers=2"]


def started(*given: str, **environment: str) -> subprocess.Popen[str]:
    code = "from condu_ray.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def wait_for(what: Callable[[], object], child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE
    while not what():
        assert child.poll() is None, "it ended before"
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.02)


def test_a_killed_command_ends_the_work_when_given_again(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    store, steps = tmp_path / "store", 60
    given = ["learn", *arguments(tiny_model_dir, picture_tasks, store, steps), "--cpus-per-worker=1"]
    for moment in ("work/train-*/checkpoint.safetensors", "objects/train-*/delta.safetensors"):
        child = started(*given)
        wait_for(lambda moment=moment: list(store.glob(moment)), child)  # type: ignore[misc]
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert open_store(store).versions() == []
    said = process(*given, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["made"] == [1, 2]
    here = settings(tmp_path / "here", tiny_model_dir, train__steps=steps)
    learn_here(here, opened(picture_tasks, "colours", "stripes"), threads=1)
    open_store(store).gc(in_use_s=0)
    left = [*store.glob("work/*"), *store.glob("tmp/*")]
    ours, theirs = contents(store), contents(here.store)
    for held in (ours, theirs):  # the interval between checkpoints changes no bits, but is a setting
        for name in ("00000001.json", "00000002.json"):
            del held[name]["settings"]["train"]["checkpoint_seconds"]
    assert (ours, left) == (theirs, [])


def test_ctrl_c_ends_a_training_and_leaves_a_store_that_opens(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    child = started("learn", *arguments(tiny_model_dir, picture_tasks, store, 100_000))
    wait_for(lambda: list(store.glob("work/train-*/checkpoint.safetensors")), child)
    begun = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=DEADLINE)
    assert child.returncode == 130, err
    assert time.monotonic() - begun < 60
    assert "stopped; the same command goes on where this one ended" in err
    assert "Traceback" not in err
    assert open_store(store).versions() == []


def ended(child: subprocess.Popen[str]) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    child.wait(60)


@pytest.fixture
def gcs_port() -> int:
    return free_port()


@pytest.fixture
def head(tmp_path: Path, gcs_port: int, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of the job server of a cluster that somebody else started. Ended by its own process group."""
    dashboard, cores = free_port(), getattr(request, "param", 2)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-cpus={cores}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    ports = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    command += [f"--port={gcs_port}", *(f"--{name}={free_port()}" for name in ports)]  # not those of another Ray here
    with open(tmp_path / "head.log", "w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, text=True)
        try:
            wait_for(lambda: answers(dashboard), child)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            ended(child)


@contextmanager
def joined(gcs_port: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Another node of one core that has joined the head's cluster, in a process group of its own."""
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--address=127.0.0.1:{gcs_port}", "--block"]
    command += ["--num-cpus=1", "--disable-usage-stats"]
    command += [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")]
    with open(log, "w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, text=True)
        try:
            yield child
        finally:
            if child.poll() is None:
                ended(child)


@pytest.fixture
def second_node(head: str, gcs_port: int, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with joined(gcs_port, tmp_path / "node.log") as child:
        yield child


def answers(port: int) -> bool:
    import urllib.request

    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2).close()
    except OSError:
        return False
    return True


def submitted(head: str, *given: str) -> subprocess.CompletedProcess[str]:
    """What `ray job submit -- python jobs/session.py …` ends with."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head, "--"]
    command += [sys.executable, str(ROOT / "jobs" / "session.py"), *given]
    end = time.monotonic() + DEADLINE
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * DEADLINE)
        if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
            return done  # the dashboard answers before it can take jobs


def test_a_job_on_a_cluster_does_what_learn_does(
    head: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    done = submitted(head, *arguments(tiny_model_dir, picture_tasks, store, 4))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [card.name for card in open_store(store).manifest().tasks] == ["colours", "stripes"]
    here = settings(tmp_path / "here", tiny_model_dir)
    learn_here(here, opened(picture_tasks, "colours", "stripes"))
    assert open_store(store).manifest().objects == open_store(here.store).manifest().objects


def together(model: Path, tasks: Folders, store: Path) -> list[str]:
    """A task that two processes of one core train together."""
    given = ["--task", f"colours={tasks['colours']}", "--model", f"local-dir:{model}", "--store", str(store)]
    given += ["--train.steps=200", "--train.batch-size=8", "--train.towers=image", "--train.checkpoint-seconds=0.01"]
    return [*given, "--workers=2", "--cpus-per-worker=1", "--parallel=data", "--tracking=off"]


@contextmanager
def struck(store: Path, strike: Callable[[], bool]) -> Iterator[None]:
    """While the block runs: once a training has a checkpoint, strikes until it says that it hit."""
    hit: list[bool] = []

    def wait() -> None:
        end = time.monotonic() + DEADLINE
        while not hit and time.monotonic() < end:
            if list(store.glob("work/train-*/checkpoint.safetensors")) and strike():
                hit.append(True)
            time.sleep(0.02)

    striking = threading.Thread(target=wait)
    striking.start()
    yield
    striking.join()
    assert hit


@pytest.mark.parametrize("head", [1], indirect=True)
def test_two_nodes_train_a_task_together_and_lose_a_worker_and_a_node(
    head: str,
    gcs_port: int,
    second_node: subprocess.Popen[str],
    tiny_model_dir: Path,
    picture_tasks: Folders,
    tmp_path: Path,
) -> None:
    """DDP with a process on each node: the group goes on from its checkpoint, to the same bits, and leaves nothing."""
    calm, worker_lost, node_lost = (tmp_path / name for name in ("calm", "worker", "node"))

    def kill_a_worker() -> bool:
        pids = ray_processes("RayTrainWorker", second_node.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids) == 1

    with ExitStack() as later:

        def kill_the_node() -> bool:
            pids = descendants(second_node.pid)
            for pid in (second_node.pid, *pids):
                os.kill(pid, signal.SIGKILL)
            second_node.wait(60)
            later.enter_context(joined(gcs_port, tmp_path / "third.log"))
            return len(pids) > 1

        for store, strike in ((calm, None), (worker_lost, kill_a_worker), (node_lost, kill_the_node)):
            with struck(store, strike) if strike else nullcontext():
                done = submitted(head, *together(tiny_model_dir, picture_tasks, store))
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert open_store(store).manifest().objects == open_store(calm).manifest().objects
            assert list(store.glob("work/*")) == []
        assert leaked(head) == []


def leaked(head: str) -> list[str]:
    """What is still there of sessions that have ended, but for what stays: fusion actors, and what Ray has for jobs."""
    groups = [each.placement_group_id for each in list_placement_groups(address=head) if each.state != "REMOVED"]
    actors = [str(each.class_name) for each in list_actors(address=head) if each.state != "DEAD"]
    return [*groups, *(name for name in actors if name not in STAYING)]


@pytest.mark.parametrize("head", [1], indirect=True)
def test_a_session_waits_for_a_node_that_comes_late(
    head: str, gcs_port: int, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    given = together(tiny_model_dir, picture_tasks, tmp_path / "store")
    refused = submitted(head, *given)
    assert "2 workers need 1 CPU cores each, the cluster has 1" in refused.stdout + refused.stderr
    assert not (tmp_path / "store").exists()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(submitted, head, *given, f"--node-wait-seconds={DEADLINE}")
        time.sleep(20)
        assert not waiting.done()
        with joined(gcs_port, tmp_path / "late.log"):
            done = waiting.result()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [card.name for card in open_store(tmp_path / "store").manifest().tasks] == ["colours"]
