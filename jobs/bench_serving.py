"""What serving costs and what it stands: passes a picture, HTTP beside one process, versions under load, rubbish.

    python jobs/bench_serving.py --work WORK
    python jobs/bench_serving.py --work WORK --store STORE --data birds=DATA/birds,signs=DATA/signs --json

Stores of 11 drawn tasks (jobs/fabricated.py) for the default model and a ViT-B-32 of random weights; with --store and
--data also adaptive K on the pictures that a store has learned. docs/serving.md defines every figure. All figures of a
ratio come from the same run, in turns.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np
import open_clip
import ray
import torch
from ending import job, some_of
from fabricated import fabricate
from PIL import Image
from pydantic import SecretStr
from serving_load import damaged, load, offline, wait_until_served
from torch import Tensor

from condu_ray import reports
from condu_ray.benchmark.stream import parse_stream
from condu_ray.config import ServeConfig
from condu_ray.data import load_picture, open_task, sample
from condu_ray.engine import command
from condu_ray.engine.cluster import NAMESPACE, connected
from condu_ray.engine.progress import stage
from condu_ray.errors import ConfigError
from condu_ray.models.load import load as load_model
from condu_ray.models.lora import LowRank, plan_adapters
from condu_ray.serving.answering import pixels_of
from condu_ray.serving.start import serving
from condu_ray.sources import from_dotted, resolve
from condu_ray.store import open_store
from condu_ray.store.history import rollback
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.open import load_classifier

TASKS, K, CLIENTS = 11, 4, 16
MODELS: dict[str, dict[str, Any]] = {
    "default": {"batch": 64, "settings": {}},
    "ViT-B-32": {"batch": 16, "settings": {"model": "ViT-B-32", "train__towers": "image"}},
}


# ---- in one process


def drawn(count: int, side: int = 96) -> list[bytes]:
    """Pictures of coloured patches, as PNG."""
    found, dice = [], np.random.default_rng(1)
    for _ in range(count):
        patches = Image.fromarray(dice.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side), 2)
        buffer = io.BytesIO()
        patches.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def settings_of(model: str, work: Path) -> dict[str, Any]:
    """Settings of `learn`, with a checkpoint of random weights where the model needs one."""
    settings = dict(MODELS[model]["settings"])
    if "model" in settings:
        checkpoint = work / f"{model}.pt"
        if not checkpoint.exists():
            torch.manual_seed(0)
            torch.save(open_clip.create_model(model).state_dict(), checkpoint)
        settings["pretrained"] = str(checkpoint)
    return settings


def store_of(model: str, method: str, work: Path) -> str:
    """A store of 11 drawn tasks; made if it is not there."""
    settings = settings_of(model, work)
    clip = load_model(resolve({name: value for name, value in settings.items() if "__" not in name})[0].model_spec)
    pixels = torch.stack([pixels_of(body, clip.eval_transform, 10**6) for body in drawn(4 * MODELS[model]["batch"])])
    return fabricate(work / f"{model}-{method}", TASKS, pixels, method=method, **settings).url


def seconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()  # one thread computes: what else the machine does is not counted
    call()
    return time.process_time() - begun


def passes(model: str, work: Path, rounds: int) -> dict[str, Any]:
    """Time of an answer with K of 11 experts in units of one plain pass of the image tower over the same batch."""
    return {**passes_of("full", "condu", model, work, rounds), **passes_of("lora", "condu-lora", model, work, rounds)}


def passes_of(kind: str, method: str, model: str, work: Path, rounds: int) -> dict[str, Any]:
    batch, settings = MODELS[model]["batch"], settings_of(model, work)
    classifier = load_classifier(store_of(model, method, work), cache=TASKS)
    clip = classifier.clip
    part = torch.stack([pixels_of(body, clip.eval_transform, 10**6) for body in drawn(batch)])
    warm_all(classifier, part)
    plain, answered = [], []
    with torch.no_grad():
        for _ in range(rounds):  # in turns, so that both see the same machine
            plain.append(seconds(lambda: clip.images(part)))
            answered.append(seconds(lambda: classifier.classify(part)))
    answers = classifier.classify(part)
    assert {len(answer.votes) for answer in answers} == {K}  # θ⁰ routes; among learned classes it does not vote
    found = {
        f"passes_{kind}": statistics.median(answered) / statistics.median(plain),
        f"plain_ms_{kind}": 1000 * statistics.median(plain) / batch,
        f"experts_asked_{kind}": len({vote.task for answer in answers for vote in answer.votes}),
    }
    return found | ({"lora_memory": lora_memory(classifier, settings)} if kind == "lora" else {})


def warm_all(classifier: Classifier, pixels: Tensor) -> None:
    for expert in classifier.experts:
        classifier.classify(pixels[:1], task=expert.name)
    classifier.classify(pixels)


def lora_memory(classifier: Classifier, settings: dict[str, Any]) -> float:
    """Bytes of θ⁰ and all adapters as held, in units of θ⁰ + 11 adapters (their factors)."""
    experts = [classifier.cached(expert.name) for expert in classifier.experts]
    base = {tensor.data_ptr(): tensor.nbytes for tensor in classifier.clip.model.state_dict().values()}
    held = dict(base)
    for expert in experts:
        assert isinstance(expert, LowRank)
        tensors = [*expert.merged.values(), *(part for pair in expert.factors.values() for part in pair)]
        held |= {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    lora = from_dotted({}).lora
    towers = settings.get("train__towers", "both")
    adapters = plan_adapters(classifier.clip.model, lora.rank, lora.targets, lora.seed, towers)
    factors = sum(factor.nbytes for factor in adapters.start.values())
    return float(sum(held.values()) / (sum(base.values()) + len(experts) * factors))


def adaptive(store: str, data: str, most: int) -> dict[str, Any]:
    """Passes a picture and accuracy among all learned classes, with adaptive K and with always K experts."""
    stream = parse_stream(data)
    found: dict[str, Any] = {}
    classifiers = {
        "adaptive": load_classifier(store),
        "fixed": load_classifier(store, vote={"adaptive": False, "k": K}),
    }
    counts = {name: [0, 0, 0] for name in classifiers}  # pictures, right, passes
    for name, source in stream.tasks.items():
        task = open_task(name, source)
        pictures = sample(task.test, most, 0)
        for start in range(0, len(pictures), 64):
            part = pictures.pictures[start : start + 64]
            labels = pictures.labels[start : start + 64]
            transform = classifiers["adaptive"].clip.eval_transform
            pixels = torch.stack([transform(load_picture(picture)) for picture in part])
            for kind, classifier in classifiers.items():
                for answer, label in zip(classifier.classify(pixels), labels, strict=True):
                    hit = (answer.label.task, answer.label.name) == (name, task.classes[int(label)])
                    experts = sum(vote.task is not None for vote in answer.votes)
                    counts[kind] = [a + b for a, b in zip(counts[kind], (1, int(hit), 1 + experts), strict=True)]
    for kind, (pictures_seen, right, run) in counts.items():
        found[f"passes_{kind}"] = run / pictures_seen
        found[f"accuracy_{kind}"] = 100 * right / pictures_seen
        found["pictures"] = pictures_seen
    return found


# ---- behind HTTP


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def saturated(url: str, files: Sequence[Path], duration: float, each: int) -> dict[str, Any]:
    """Pictures a second with CLIENTS clients that send `each` pictures a request; times of requests and stages."""
    times: list[float] = []
    stages: list[dict[str, float]] = []
    stop = time.monotonic() + duration

    def ask(number: int) -> None:
        bodies = [path.read_bytes() for path in files]
        with httpx.Client(base_url=url, timeout=300) as client:
            turn = number
            while time.monotonic() < stop:
                turn += 1
                picked = [bodies[(turn * each + place) % len(bodies)] for place in range(each)]
                begun = time.monotonic()
                said = client.post("/v1/predict", files=[("image", (str(i), body)) for i, body in enumerate(picked)])
                said.raise_for_status()
                times.append(time.monotonic() - begun)
                stages.append(said.json()["milliseconds"])

    begun = time.monotonic()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, ordered = time.monotonic() - begun, sorted(times)
    return {
        "pictures_per_second": each * len(times) / took,
        "requests_per_second": len(times) / took,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[int(0.99 * len(ordered))],
        "stage_ms": {name: statistics.median(each[name] for each in stages) for name in stages[0]},
    }


def one_process(store: str, files: Sequence[Path], batch: int, duration: float) -> float:
    """Pictures a second of the same classifier in a loop: decode, answer, in one process and batches."""
    classifier = load_classifier(store, cache=TASKS)
    bodies = [path.read_bytes() for path in files]
    transform = classifier.clip.eval_transform
    warm_all(classifier, torch.stack([pixels_of(body, transform, 10**6) for body in bodies[:2]]))
    done, begun, turn = 0, time.monotonic(), 0
    while time.monotonic() - begun < duration:
        part = [bodies[(turn + place) % len(bodies)] for place in range(batch)]
        answers = classifier.classify(torch.stack([pixels_of(body, transform, 10**6) for body in part]))
        [answer.to_json("0") for answer in answers]
        done, turn = done + batch, turn + batch
    return done / (time.monotonic() - begun)


def over_http(model: str, work: Path, duration: float) -> dict[str, Any]:
    """HTTP at saturation beside one process, one after the other, one process first and last."""
    batch = MODELS[model]["batch"]
    folder = work / "pictures"
    folder.mkdir(exist_ok=True)
    files = []
    for place, body in enumerate(drawn(batch * 4)):
        files.append(folder / f"{place:03d}.png")
        files[-1].write_bytes(body)
    store = store_of(model, "condu" if model == "default" else "condu-lora", work)
    inside = [one_process(store, files, batch, duration / 2)]
    config = ServeConfig(store=store, port=free_port(), experts=TASKS, batch=batch, timeout_seconds=300)
    with serving(config) as url:
        saturated(url, files, 3, 1)
        alone = saturated(url, files, duration, 1)
        together = saturated(url, files, duration, 8) if model == "default" else alone
    inside.append(one_process(store, files, batch, duration / 2))
    return {
        "http_over_inprocess": together["pictures_per_second"] / statistics.mean(inside),
        "inprocess_per_second": statistics.mean(inside),
        **alone,
        "pictures_per_second_8": together["pictures_per_second"],
    }


# ---- versions under load


def under_load(work: Path) -> dict[str, Any]:
    """A good publish (learned on the same cluster, its fusion actor killed), a bad one, three swaps, one rollback and a
    killed replica, with CLIENTS clients in a closed loop; every answer is compared with its version's offline."""
    data = work / "load-data"
    pictures = draw_tasks(data)
    url = str(work / f"load-store-{int(time.time())}")
    common = {"store": url, "train.steps": "20", "tracking": "off", "workers": "1", "cpus_per_worker": "1"}
    with connected() as cluster:
        command.run(resolve({**common, "tasks": [f"one={data / 'one'}"]})[0], stage, "bench", cluster)
        store = open_store(url)
        expected = {1: offline(url, 1, pictures)}

        def swap(version: int) -> None:
            expected[version] = offline(url, version, pictures)
            wait_until_served(server, version, 300)

        config = ServeConfig(store=url, port=free_port(), replicas=2, cpus=0.5, poll_seconds=0.5)
        with serving(config, cluster) as server, load(server, pictures, CLIENTS) as seen:
            killer = threading.Thread(target=kill_fusion_actor)
            killer.start()
            command.run(resolve({**common, "tasks": [f"two={data / 'two'}"]})[0], stage, "bench", cluster)
            killer.join()
            swap(2)
            manifest = store.manifest(2)
            bad = {"version": 3, "parent": 2, "objects": damaged(manifest)}
            store.commit(manifest.model_copy(update=bad))
            while not all(each["fault"] for each in httpx.get(f"{server}/readyz").json()["replicas"]):
                time.sleep(0.2)
            for target in (1, 2, 1):
                swap(rollback(store, target).version)
            replica = httpx.get(f"{server}/readyz").json()["replicas"][0]["replica"]
            actor = ray.get_actor(f"SERVE_REPLICA::condu-ray#Replica#{replica}", namespace="serve")
            ray.kill(actor, no_restart=True)
            swap(rollback(store, 2).version)
        figures = seen.figures()
        return {**figures, "wrong_answers": len(seen.wrong(expected)), "versions": dict(seen.versions)}


def draw_tasks(folder: Path) -> list[Path]:
    """Two tasks of three classes of coloured noise, and some of their pictures."""
    dice, found = np.random.default_rng(0), []
    for shift, task in enumerate(("one", "two")):
        for label, name in enumerate(("red", "green", "blue")):
            for number in range(15):
                values = dice.integers(0, 90, (48, 48, 3))
                values[..., label] += 120
                values[:: 2 + 3 * shift] //= 2
                file = folder / task / name / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(file)
                found += [file] if number < 3 else []
    return found


def kill_fusion_actor() -> None:
    """As soon as the session has one; Ray starts it again."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE:
                ray.kill(ray.get_actor(**actor), no_restart=False)
                return
        time.sleep(0.1)


# ---- rubbish


def rubbish(count: int) -> Iterator[dict[str, Any]]:
    """Requests that cannot be answered, as arguments of httpx; always the same ones."""
    dice = random.Random(0)
    (whole,) = drawn(1)
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(whole)).save(jpeg, "JPEG")
    code = base64.b64encode(whole).decode()
    kind = {"content-type": "application/json"}
    makers: list[Callable[[], dict[str, Any]]] = [
        lambda: {"files": {"image": whole[: dice.randrange(len(whole) - 12)]}},
        lambda: {"files": {"image": jpeg.getvalue()[: dice.randrange(600)]}},
        lambda: {"files": {"image": dice.randbytes(dice.randrange(3000))}},
        lambda: {"files": {"image": png_of(dice.randrange(10**5, 2**31), dice.randrange(10**5, 2**31))}},
        lambda: {"files": {"image": whole}, "data": {dice.choice(["k", "top_k"]): dice.choice(["-1", "x", "NaN"])}},
        lambda: {"files": {"image": whole}, "data": {"task": dice.choice(["../x", "\x00", "x" * 70, "nobody"])}},
        lambda: {"files": {"image": whole}, "data": {"labels": [str(n) for n in range(dice.choice([101, 10_000]))]}},
        lambda: {"files": {"image": whole}, "data": {"labels": ["a", dice.choice(["a", "", "x" * 300])]}},
        lambda: {"json": {"images": [code], "labels": [dice.choice([None, 1, [], {}])]}},
        lambda: {"content": b'{"images": ["%s"], "labels": [NaN]}' % code.encode(), "headers": kind},
        lambda: {"content": json.dumps({"images": [code]}).encode()[: dice.randrange(1, 60)], "headers": kind},
        lambda: {"content": b"[" * dice.randrange(1000, 200_000), "headers": kind},
        lambda: {"json": {"images": dice.choice([[], "x", [code] * 17, ["?"], {}, 5])}},
        lambda: {"content": dice.randbytes(200), "headers": {"content-type": dice.choice(["text/plain", "x", ""])}},
        lambda: {"content": dice.randbytes(200), "headers": {"content-type": "multipart/form-data; boundary=x"}},
        lambda: {"files": {"image": whole}, "headers": {"authorization": dice.choice(["Bearer x", "Basic x", "x"])}},
    ]
    for place in range(count):
        yield makers[place % len(makers)]()


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that says it is so large."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big") + bytes(100)


def malformed(work: Path, count: int) -> dict[str, Any]:
    """So many requests that cannot be answered, and schemathesis; what they did to the server."""
    token = "a-token-of-the-benchmark"
    config = ServeConfig(store=store_of("default", "condu", work), port=free_port(), token=SecretStr(token))
    with serving(config) as url, httpx.Client(base_url=url, timeout=120) as client:
        good = {"authorization": f"Bearer {token}"}

        def send(requests: Iterator[dict[str, Any]]) -> list[int]:
            return [
                client.post("/v1/predict", **{**one, "headers": {**good, **one.get("headers", {})}}).status_code
                for one in requests
            ]

        send(rubbish(200))  # what is loaded once is not growth
        before = server_mb()
        statuses = send(rubbish(count))
        after = server_mb()
        (whole,) = drawn(1)
        answered = client.post("/v1/predict", files={"image": whole}, headers=good).status_code
        checked = schemathesis(url, token, work)
        return {
            "malformed_requests": len(statuses),
            "malformed_500": sum(status >= 500 for status in statuses) + checked["failures"],
            "malformed_200": sum(status == 200 for status in statuses),
            "memory_growth_mb": after - before,
            "still_serving": answered == 200 and client.get("/readyz").status_code == 200,
            "schemathesis": checked,
        }


def server_mb() -> float:
    """Resident memory of all fronts, replicas and proxies on this machine (Linux)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica" in (command_line := (process / "cmdline").read_bytes()) or b"ProxyActor" in command_line:
                total += int((process / "statm").read_text().split()[1])
        except OSError:  # it ended meanwhile
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def schemathesis(url: str, token: str, work: Path) -> dict[str, Any]:
    """Requests made from the OpenAPI document, valid and not; failures are responses of 500 or more."""
    tool = Path(sys.executable).with_name("schemathesis")
    asked = ["run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "60", "--seed", "1"]
    done = subprocess.run(
        [tool, *asked, "-H", f"Authorization: Bearer {token}", "--no-color"],
        capture_output=True,
        text=True,
        cwd=work,  # it leaves a cache there
    )
    (generated,) = [line.strip() for line in done.stdout.splitlines() if "generated" in line][-1:] or [""]
    return {"failures": int(done.returncode != 0), "said": generated}


PARTS = ("passes", "adaptive", "http", "load", "malformed")


@job
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and pictures")
    parser.add_argument("--store", help="a store that has learned the tasks of --data, for adaptive K")
    parser.add_argument("--data", metavar="NAME=PATH,...", help="where its tasks' pictures are")
    parser.add_argument("--pictures", type=int, default=200, help="test pictures a task for adaptive K")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--models", type=some_of(list(MODELS)), default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7, help="of each timing")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--malformed", type=int, default=1000, help="requests that cannot be answered")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.store and not options.data:
        raise ConfigError("--store alone says nothing of adaptive K", "give --data with its tasks")
    work, parts = options.work.resolve(), options.parts
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    by_model: dict[str, dict[str, Any]] = {}
    for model in options.models:
        if "passes" in parts:
            by_model.setdefault(model, {}).update(passes(model, work, options.rounds))
        if "http" in parts:
            by_model.setdefault(model, {}).update(over_http(model, work, options.seconds))
    if by_model:
        found["models"] = by_model
        for key in ("passes_full", "passes_lora"):  # the worst of the models
            found[key] = max((each[key] for each in by_model.values() if key in each), default=None)
        large, small = by_model.get("ViT-B-32", {}), by_model.get("default", {})
        found["http_over_inprocess"] = large.get("http_over_inprocess")
        found |= {key: small.get(key) for key in ("requests_per_second", "p50_ms", "p99_ms")}
    if "adaptive" in parts and options.store:
        found["stream"] = adaptive(options.store, options.data, options.pictures)
        found["passes_adaptive"] = found["stream"]["passes_adaptive"]
    if "load" in parts:
        load_figures = under_load(work)
        found["load"] = load_figures
        found |= {key: load_figures[key] for key in ("load_requests", "wrong_answers", "errors_5xx", "clean_503")}
    if "malformed" in parts:
        found["rubbish"] = malformed(work, options.malformed)
        found |= {key: found["rubbish"][key] for key in ("malformed_requests", "malformed_500")}
    if options.json:
        reports.emit(found)
        return
    rows = [(name, value) for name, value in flat(found) if not isinstance(value, dict)]
    reports.show_table("serving", ("figure", "value"), [(name, shown(value)) for name, value in rows])


def flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
