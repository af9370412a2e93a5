"""Losses of an adapter, calibration of its share, and a fit on features that are drawn here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.config import SessionConfig
from condu_ray.errors import TrainingError
from condu_ray.methods.adapter_fit import Adapter, Fitted, fit
from condu_ray.methods.adapter_losses import distillation, hinge, similar_pairs
from condu_ray.methods.protocol import Features
from condu_ray.models.head import Head, mixed

Settings = Callable[..., SessionConfig]
SEEDS = st.integers(0, 10_000)
WIDTH, CLASSES, EACH = 12, 3, 16
SCALE = 20.0
MIXES = pytest.mark.parametrize("mix", ["normalized", "raw"])


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    return (
        torch.tensor(random.standard_normal((5, WIDTH)) * 3),
        torch.tensor(random.standard_normal((WIDTH, WIDTH))),
    )


@MIXES
@given(seed=SEEDS, share=st.floats(0, 1))
def test_a_mixed_feature_is_a_unit_vector_that_sees_directions_alone(mix: Any, seed: int, share: float) -> None:
    raw, weight = tensors(seed)
    found = mixed(raw, weight, share, mix)
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-9)
    np.testing.assert_allclose(mixed(7 * raw, weight, share, mix), found, atol=1e-9)


@MIXES
@given(seed=SEEDS)
def test_a_share_of_0_is_the_base_model_and_of_1_the_adapter(mix: Any, seed: int) -> None:
    raw, weight = tensors(seed)
    np.testing.assert_allclose(mixed(raw, weight, 0.0, mix), torch.nn.functional.normalize(raw), atol=1e-12)
    adapted = torch.nn.functional.normalize(raw @ weight.T)
    np.testing.assert_allclose(mixed(raw, weight, 1.0, mix), adapted, atol=1e-12)


@given(seed=SEEDS, share=st.floats(0, 1))
def test_a_raw_mix_is_one_adapter_and_the_identity_changes_nothing(seed: int, share: float) -> None:
    raw, weight = tensors(seed)
    one = torch.eye(WIDTH, dtype=raw.dtype)
    together = mixed(raw, (1 - share) * one + share * weight, 1.0, "raw")
    np.testing.assert_allclose(mixed(raw, weight, share, "raw"), together, atol=1e-9)
    np.testing.assert_allclose(mixed(raw, one, share, "raw"), torch.nn.functional.normalize(raw), atol=1e-12)


def test_a_head_without_an_adapter_leaves_features_alone() -> None:
    raw, _ = tensors(0)
    assert Head()(raw) is raw


@given(seed=SEEDS, temperature=st.floats(0.5, 5))
def test_distillation_is_zero_with_zero_gradient_where_nothing_changed(seed: int, temperature: float) -> None:
    logits = torch.tensor(np.random.default_rng(seed).standard_normal((4, 6)) * 10, requires_grad=True)
    loss = distillation(logits.detach(), logits, temperature)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-9
    assert float(distillation(logits.detach().roll(1, 1), logits.detach(), temperature)) > 0


def test_similar_pairs_are_those_whose_texts_are_near() -> None:
    angles = np.array([0.0, 0.3, 1.5])
    texts = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert similar_pairs(texts[:1], texts[1:], 0.55).tolist() == [[0, 0]]  # 2 sin(0.15) = 0.299
    assert similar_pairs(texts[:1], texts[1:], 0.29).tolist() == []
    assert similar_pairs(texts[1:], texts, 2).tolist() == [[old, new] for old in (0, 1) for new in (0, 1, 2)]


def test_the_hinge_asks_for_its_margin_and_no_more() -> None:
    own, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(hinge(own, own, other, 0.1)) == 0
    assert float(hinge(other, own, other, 0.1)) == pytest.approx(1.1)


def features(seed: int, turn: Any) -> Features:
    """Classes whose pictures stand around their texts, turned by what an adapter has to find."""
    random = np.random.default_rng(seed)
    texts = random.standard_normal((CLASSES, WIDTH))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    labels = np.repeat(np.arange(CLASSES), EACH)
    raw = (texts[labels] + 0.25 * random.standard_normal((len(labels), WIDTH))) @ turn
    return Features((4 * raw).astype(np.float32), labels, texts)


@pytest.fixture(scope="module")
def stream() -> list[Features]:
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((WIDTH, WIDTH)))[0]
    return [features(seed, turn) for seed in (0, 1)]


def asked(settings: Settings, method: str = "calfuse", **others: Any) -> SessionConfig:
    base = {"adapter__epochs": 30, "adapter__batch_size": 16, "adapter__lr": 0.02, "memory__per_epoch": 120}
    return settings(method=method, **{**base, **others})


def kept(seen: Features, fitted: Fitted) -> dict[str, Any]:
    return {**fitted.gaussians.arrays(), "texts": seen.texts}


def accuracy(stream: list[Features], adapter: Adapter, of: int) -> float:
    """Of the pictures of one task, the classes of all competing."""
    texts = torch.tensor(np.concatenate([each.texts for each in stream]))
    raw = torch.tensor(stream[of].raw)
    said = (mixed(raw, torch.tensor(adapter.weight), adapter.share, "normalized") @ texts.T).argmax(dim=1).numpy()
    return float((said == stream[of].labels + CLASSES * of).mean())


def learned(stream: list[Features], config: SessionConfig) -> tuple[Fitted, Fitted]:
    first = fit("one", stream[0], [], None, SCALE, config)
    return first, fit("two", stream[1], [kept(stream[0], first)], first.adapter, SCALE, config)


@pytest.mark.parametrize("method", ["rapf", "calfuse"])
def test_a_fit_finds_the_adapter_and_replay_keeps_what_was_learned(
    stream: list[Features], settings: Settings, method: str
) -> None:
    config = asked(settings, method)
    zero_shot = Adapter(np.eye(WIDTH, dtype=np.float32), 1.0)
    first, second = learned(stream, config)
    assert accuracy(stream[:1], first.adapter, 0) > accuracy(stream[:1], zero_shot, 0) + 0.3
    assert accuracy(stream, second.adapter, 1) > 0.8
    without = learned(stream, asked(settings, method, memory__per_epoch=0, adapter__hinge=0.0))[1]
    assert accuracy(stream, second.adapter, 0) > accuracy(stream, without.adapter, 0)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(stream: list[Features], settings: Settings) -> None:
    one, again = (learned(stream, asked(settings))[1].adapter for _ in range(2))
    other = learned(stream, asked(settings, seed=1))[1].adapter
    assert np.array_equal(one.weight, again.weight)
    assert one.share == again.share
    assert not np.array_equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("calibration", "shares"), [("none", (1.0, 1.0)), ("fixed", (0.7, 0.7)), ("schedule", (0.5, 0.5 + 0.3 / 9))]
)
def test_the_share_is_what_the_calibration_says(
    stream: list[Features], settings: Settings, calibration: str, shares: tuple[float, float]
) -> None:
    found = learned(stream, asked(settings, adapter__calibration=calibration, adapter__epochs=1))
    assert tuple(each.adapter.share for each in found) == pytest.approx(shares)


def test_a_learned_share_moves_and_a_searched_one_is_on_the_grid(stream: list[Features], settings: Settings) -> None:
    moved = learned(stream, asked(settings, adapter__calibration="learnable"))
    assert all(0 < each.adapter.share < 1 for each in moved)
    assert moved[0].adapter.share != 0.7
    held = learned(stream, asked(settings, adapter__calibration="learnable", adapter__share_pull=1000.0))
    assert held[0].adapter.share == pytest.approx(0.7, abs=0.05)
    searched = learned(stream, asked(settings))
    assert all(20 * each.adapter.share == pytest.approx(round(20 * each.adapter.share)) for each in searched)


def test_a_search_takes_the_base_model_where_the_adapter_is_no_better(settings: Settings) -> None:
    """Where θ⁰ is right already, every share is as good, and the smallest stands."""
    seen = features(3, np.eye(WIDTH))
    seen = Features(4 * seen.texts[seen.labels], seen.labels, seen.texts)
    assert fit("one", seen, [], None, SCALE, asked(settings)).adapter.share == 0


def test_statistics_are_those_of_all_pictures(stream: list[Features], settings: Settings) -> None:
    found = fit("one", stream[0], [], None, SCALE, asked(settings)).gaussians
    assert found.counts.tolist() == [EACH] * CLASSES
    diagonal = fit("one", stream[0], [], None, SCALE, asked(settings, memory__covariance="diagonal")).gaussians
    assert diagonal.scatter.shape == (CLASSES, WIDTH)


def test_one_epoch_learns_at_the_whole_rate(stream: list[Features], settings: Settings) -> None:
    """One step of Adam, which moves by the rate."""
    config = asked(settings, "rapf", adapter__epochs=1, adapter__init="identity", adapter__batch_size=CLASSES * EACH)
    found = fit("one", stream[0], [], None, SCALE, config)
    assert np.abs(found.adapter.weight - np.eye(WIDTH)).max() == pytest.approx(config.adapter.lr, rel=0.01)


def test_steps_are_reported_and_a_loss_that_is_no_number_is_refused(stream: list[Features], settings: Settings) -> None:
    steps: list[Any] = []
    config = asked(settings, "rapf", adapter__epochs=2)
    found = fit("one", stream[0], [], None, SCALE, config, steps.append)
    assert [each.step for each in steps] == [1, 2, 3, 4, 5, 6]
    assert all(each.steps == 6 for each in steps)
    assert [step for step, _ in found.losses] == [1, 2, 3, 4, 5, 6]
    unset: list[Any] = []
    fit("one", stream[0], [], None, SCALE, asked(settings, "rapf", adapter__epochs=None), unset.append)
    assert len(unset) == unset[-1].steps == 750
    broken = Features(np.full_like(stream[0].raw, np.nan), stream[0].labels, stream[0].texts)
    with pytest.raises(TrainingError, match=r"task one: the loss is nan at step 1"):
        fit("one", broken, [], None, SCALE, config)
