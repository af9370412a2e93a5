"""Pretraining: any configuration, every phase found again after an interruption, a model that open_clip loads."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pretraining
import pytest
import torch
from captioned_world import CLASSES, WORDS
from PIL import Image
from pretraining import Order, Place, Targets, fit, pretrain, read_targets, world_rows
from safetensors.torch import load_file
from torch import nn


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the time is 10 ms later, so that a phase has the same number of steps on any machine."""
    ticks = itertools.count(0.0, 0.01)
    monkeypatch.setattr(pretraining, "time", SimpleNamespace(monotonic=lambda: next(ticks), strftime=time.strftime))


def test_any_configuration_trains_and_what_is_done_is_found_again(order: Order) -> None:
    pretrain(order, Place())
    weights = Path(order.out) / "open_clip_model.safetensors"
    saved, first = load_file(weights), weights.read_bytes()
    assert all(tensor.dtype == torch.float16 for tensor in saved.values() if tensor.is_floating_point())
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{order.out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{order.out}")
    model.eval()
    with torch.no_grad():
        text = model.encode_text(tokenizer(["a photo of a night.", "a photo of a day."]), normalize=True)
        dark, bright = (preprocess(Image.new("RGB", (40, 40), (v, v, v))) for v in (20, 230))
        image = model.encode_image(torch.stack([dark, bright]), normalize=True)
    assert (image @ text.T).argmax(1).tolist() == [0, 1], "night and day are told apart"
    weights.unlink()
    pretrain(order, Place())
    assert weights.read_bytes() == first, "no phase was trained again"


def test_a_phase_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "KEEP_SECONDS", 0.0)
    seen: list[int] = []

    def run(last: int | None) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss_of(step: int) -> torch.Tensor:
            if step == last:
                raise KeyboardInterrupt
            seen.append(step)
            return model(torch.ones(1, 3)).square().sum()

        groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": 1e-2, "weight_decay": 0.0}]
        fit(model, groups, loss_of, 0.01, tmp_path / "phase.safetensors", "things", 1, Place())
        return model

    with pytest.raises(KeyboardInterrupt):
        run(last=5)
    kept = load_file(tmp_path / "phase.safetensors")
    assert "mean.0" in kept, "the optimiser's moments are kept too"
    run(last=None)
    assert seen[:6] == [0, 1, 2, 3, 4, 5], "step 5 comes after step 4, not step 0"
    finished = len(seen)
    run(last=None)
    assert len(seen) == finished, "a phase whose time is spent does nothing more"


def test_a_loss_that_is_not_finite_stops_the_phase(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": 1e-2}]
    with pytest.raises(FloatingPointError, match="use another --seed"):
        fit(model, groups, lambda step: model.weight.sum() * float("nan"), 0.01, tmp_path / "x", "things", 1, Place())


def test_training_sees_no_held_out_caption_and_no_held_out_name(order: Order) -> None:
    assert not any(CLASSES[row].held_out for row in world_rows(2000, seed=0))
    assert all(CLASSES[row].held_out for row in world_rows(200, seed=0, held_out=True))
    targets = read_targets(Path(order.text_targets))
    assert targets.held_out, "the test needs one"
    assert not {targets.names[row] for row in targets.held_out} & set(WORDS), "common names stay in training"


def test_a_caption_means_the_sum_of_its_words() -> None:
    vectors = torch.eye(len(WORDS))
    targets = Targets(list(WORDS), vectors, [], len(WORDS))
    one = next(each for each in CLASSES if len(each.words) == 2)
    meaning = targets.meaning([one])[0]
    assert sorted(meaning.nonzero().flatten().tolist()) == sorted(WORDS.index(word) for word in one.words)
    assert meaning.norm() == pytest.approx(1)
    with pytest.raises(ValueError, match="pretrain_sources"):
        replace(targets, names=["something else"]).meaning([one])
