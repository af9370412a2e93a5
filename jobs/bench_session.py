"""What a session costs beside training: ratios within one run, and seconds by step.

    python jobs/bench_session.py --json

train_ratio_to_plain   steps per second of a Ray Train session with one worker of one core, over those of the same step
                       in a plain PyTorch loop in one process with one thread
two_worker_speedup     steps per second of two workers of one core on two nodes that share each batch, over one worker
fixed_seconds          of `condu-ray learn` of one task with the default model on a store that is new: all but the
                       steps of training and the evaluation
later_task_seconds     what a second task in the same command adds to that
by_step                seconds of the command of one task, by step of the session; `start` is what no step counts
loader_share           share of a plain step that waits for pictures
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ROOT = Path(__file__).resolve().parents[1]
CLASSES, EACH, SIDE = 4, 24, 96
STEPS = 60
LARGE = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 96, "layers": 8, "width": 384, "head_width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {},
}


def write_pictures(folder: Path) -> Path:
    """Noise around one colour a class, as an image folder."""
    import numpy as np
    from PIL import Image

    for label in range(CLASSES):
        random = np.random.RandomState(label)
        colour = random.uniform(60, 195, 3)
        for number in range(EACH):
            file = folder / ("train" if number % 4 else "test") / f"class {label}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(colour + random.uniform(-40, 40, (SIDE, SIDE, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


def write_model(folder: Path) -> Path:
    """A ViT of 14 million parameters in its image tower: at 96 pixels its compute outweighs the exchange."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    torch.manual_seed(0)
    model = open_clip.CLIP(**LARGE["model_cfg"])
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def settings(model: Path, store: Path, **more: Any) -> Any:
    from condu_ray.config import resolve

    fast = {"train.steps": STEPS, "train.batch_size": 16, "train.towers": "image", "tracking": "off"}
    return resolve({**fast, "store": str(store), "model": f"local-dir:{model}", **more})[0]


def plain(model: Path, data: Path) -> tuple[float, float]:
    """(steps per second, share of the time that waits for pictures) of a plain loop in this process."""
    import torch
    from torch.nn.functional import cross_entropy

    from condu_ray.data import open_task
    from condu_ray.methods.batches import batches
    from condu_ray.models.clip import class_embeddings
    from condu_ray.models.load import load

    torch.set_num_threads(1)
    config = settings(model, Path("none"))
    clip, task = load(config.model_spec), open_task("task", data)
    net = clip.model
    parameters = list(net.visual.parameters())
    for each in parameters:
        each.requires_grad_(True)
    texts = class_embeddings(clip, [[f"a photo of a {name}."] for name in task.classes]).detach()
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, foreach=False)
    net.train()
    waited, begun, marks = 0.0, time.perf_counter(), []
    source = batches(task, clip, config, range(STEPS))
    for _ in range(STEPS):
        asked = time.perf_counter()
        pixels, labels = next(source)
        waited += time.perf_counter() - asked
        optimiser.zero_grad(set_to_none=True)
        logits = net.logit_scale.exp() * net.encode_image(pixels, normalize=True) @ texts.T
        cross_entropy(logits, labels, label_smoothing=config.train.label_smoothing).backward()
        optimiser.step()
        marks.append(time.perf_counter())
    return (len(marks) - 10) / (marks[-1] - marks[9]), waited / (marks[-1] - begun)


def on_ray(model: Path, data: Path, out: Path, workers: int) -> float:
    """Steps per second of a Ray Train session of this many workers, on a cluster with a node of one core for each."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from condu_ray.data import open_task
    from condu_ray.engine.cluster import connect
    from condu_ray.engine.plan import header_of
    from condu_ray.engine.session import _jobs
    from condu_ray.engine.train import train
    from condu_ray.store import create_store

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(workers):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, namespace="condu-ray", log_to_driver=False, logging_level="ERROR")
    seen: list[tuple[float, int]] = []

    def update(done: int, total: int, note: str) -> None:
        if done and (not seen or done > seen[-1][1]):
            seen.append((time.perf_counter(), done))

    try:
        config = settings(model, out / f"store-{workers}", workers=workers, parallel="data", cpus_per_worker=1)
        store = create_store(config.store, header_of(config)[0])
        train(store, config, _jobs(store, config, [open_task("task", data)]), connect(), update)
    finally:
        ray.shutdown()
        nodes.shutdown()
    seen = [each for each in seen if each[1] >= 10]
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def command(data: Path, store: Path, tasks: int) -> tuple[float, dict[str, float], float]:
    """(wall seconds, seconds by step, seconds of training steps) of `condu-ray learn` with the default model."""
    given = [f"--task=task-{number}={data}" for number in range(tasks)]
    code = "from condu_ray.cli import main; main()"
    begun = time.perf_counter()
    steps = ["--train.steps=20", "--train.batch-size=16", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, "learn", *given, "--store", str(store), *steps],
        capture_output=True,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - begun
    by_step: dict[str, float] = {}
    for seconds in json.loads(done.stdout)["seconds"].values():
        for name, value in seconds.items():
            by_step[name] = round(by_step.get(name, 0.0) + value, 2)
    by_step["start"] = round(wall - sum(by_step.values()), 2)
    return wall, by_step, training_seconds(data) * tasks


def training_seconds(data: Path) -> float:
    """Seconds that the 20 steps themselves take in one process."""
    code = (
        "import sys, time, tempfile; from pathlib import Path\n"
        "from condu_ray.config import resolve; from condu_ray.data import open_task\n"
        "from condu_ray.methods import registry; from condu_ray.methods.training import train_task\n"
        "from condu_ray.models.load import load\n"
        "config = resolve({'train.steps': 20, 'train.batch_size': 16})[0]\n"
        "clip, method = load(config.model_spec), registry.get('condu')\n"
        "marks = []\n"
        "train_task(clip, method, method.layout(clip, config), open_task('task', sys.argv[1]), config,"
        " on_step=lambda step: marks.append(time.perf_counter()))\n"
        "print((marks[-1] - marks[0]) * 20 / 19)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(data)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="condu-bench-") as name:
        out = Path(name)
        data, model = write_pictures(out / "pictures"), write_model(out / "model")
        speed, loader = plain(model, data)
        one, two = on_ray(model, data, out, 1), on_ray(model, data, out, 2)
        wall, by_step, training = command(data, out / "one", 1)
        wall_two, by_step_two, training_two = command(data, out / "two", 2)
    fixed = wall - training - by_step["evaluate"]
    fixed_two = wall_two - training_two - by_step_two["evaluate"]
    found = {
        "train_ratio_to_plain": round(one / speed, 3),
        "two_worker_speedup": round(two / one, 3),
        "fixed_seconds": round(fixed, 1),
        "later_task_seconds": round(fixed_two - fixed, 1),
        "by_step": by_step,
        "loader_share": round(loader, 4),
        "steps_per_second": {"plain": round(speed, 3), "one": round(one, 3), "two": round(two, 3)},
    }
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
