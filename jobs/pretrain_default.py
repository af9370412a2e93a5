"""Trains the small CLIP that ships with the package, or one of any open_clip configuration, on Ray Train.

    uv run --extra pretrain python jobs/pretrain_sources.py --targets TARGETS --wordnet /usr/share/wordnet --out SOURCES
    uv run python jobs/pretrain_default.py --images DATA/tiny_imagenet --trunk SOURCES/trunk.safetensors \
        --text-targets SOURCES --minutes-text 13 --minutes-image 80 --workers 2 --work WORK \
        --out condu_ray/models/shipped

Order of work: the text tower learns a vector for every name of the vocabulary and for the captions of a generated
world; a ridge regression ties the image trunk to the text tower's own class vectors (the start); the image tower is
trained on the pictures and on the generated world; its weights are interpolated with the start (the share is chosen on
training pictures held out); float16 is saved. Killed, the same command goes on from the last checkpoint in --work,
which all workers must see. Time spent is counted over all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from captioned_world import WORDS
from ending import job
from pretraining import Order, Place, pretrain, read_targets
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Queue
from safetensors import SafetensorError

from condu_ray.engine.cluster import connected
from condu_ray.errors import ConfigError

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 80, "heads": 2, "layers": 3},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def work(settings: dict[str, Any]) -> None:
    """What each worker runs. settings: order; said: the queue of lines that the driver prints."""
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    place = Place(context.get_world_rank(), context.get_world_size(), str(device), settings["said"].put)
    pretrain(settings["order"], place)


def train(order: Order, workers: int, gpu: bool) -> None:
    """Runs the order on Ray Train, on the cluster of RAY_ADDRESS or one of this machine."""
    with connected(), _printed() as said:
        TorchTrainer(
            work,
            train_loop_config={"order": order, "said": said},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(
                name=f"pretrain-{uuid.uuid4().hex[:12]}",  # a name used before would go on where that run ended
                storage_path=str(Path(order.work) / "ray"),
                failure_config=FailureConfig(max_failures=3),
            ),
        ).fit()


@contextmanager
def _printed() -> Iterator[Queue]:
    """A queue whose lines are printed on standard error: what workers print themselves stays in Ray's logs."""
    said = Queue(actor_options={"num_cpus": 0})

    def show() -> None:
        while (line := said.get()) is not None:
            print(line, file=sys.stderr, flush=True)

    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    try:
        yield said
    finally:
        said.put(None)
        showing.join()
        said.shutdown(force=True)


def configuration(path: Path) -> dict[str, Any]:
    """What open_clip builds a model from. Raises ConfigError where the file does not hold it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as JSON ({error})", "give open_clip's JSON") from error
    if not isinstance(found, dict) or "model_cfg" not in found:
        mend = "give what open_clip writes as open_clip_config.json: model_cfg, and preprocess_cfg beside it"
        raise ConfigError(f"--config {path} holds no model_cfg", mend)
    return found


def check_targets(folder: Path) -> None:
    """Raises ConfigError where a folder of text targets is none, or lacks words of the generated world."""
    mend = "make it with jobs/pretrain_sources.py"
    try:
        known = read_targets(folder).names
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"--text-targets {folder} holds no targets ({error})", mend) from error
    if missing := sorted(set(WORDS) - set(known)):
        raise ConfigError(f"--text-targets {folder} lacks words of the generated world, as {missing[0]!r}", mend)


@job
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="webdataset folder, or FOLDER/CLASS/picture")
    parser.add_argument("--config", type=Path, help="an open_clip JSON configuration (default: the shipped model's)")
    parser.add_argument("--trunk", type=Path, help="weights to start from: safetensors with the trunk's timm names")
    parser.add_argument("--text-targets", type=Path, required=True, help="text_targets.safetensors, names.json")
    parser.add_argument("--minutes-text", type=float, default=13, help="wall clock for the text tower")
    parser.add_argument("--minutes-image", type=float, default=80, help="wall clock for the image tower")
    parser.add_argument("--workers", type=int, default=1, help="Ray Train workers, one core or one GPU each")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler on a CPU)")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; an empty one starts anew")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("images", "text_targets", "trunk", "config"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: there is nothing", "give a path that exists")
    config = configuration(options.config) if options.config else CONFIG
    check_targets(options.text_targets)
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    order = Order(
        config=config,
        images=str(options.images.resolve()),
        trunk=str(options.trunk.resolve()) if options.trunk else None,
        text_targets=str(options.text_targets.resolve()),
        minutes_text=options.minutes_text,
        minutes_image=options.minutes_image,
        work=str(folder),
        out=str(options.out.resolve()),
        seed=options.seed,
        compiled=options.compile,
    )
    train(order, options.workers, options.gpu)


if __name__ == "__main__":
    main()
