"""Fine-tuning one task: the same bits every time, also after a crash, and nothing learns that should not."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import first_gradient, train

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.picture import load_picture
from condu_ray.errors import DataError, TrainingError
from condu_ray.methods import registry
from condu_ray.methods.batches import Order, loaders
from condu_ray.methods.objective import Teacher
from condu_ray.methods.step import Step
from condu_ray.methods.training import (
    Checkpoint,
    Place,
    Resume,
    adapter_epochs,
    learning_rate_for,
    schedule,
    steps_for,
)
from condu_ray.models.clip import Clip
from condu_ray.models.load import weights_sha256

Settings = Callable[..., SessionConfig]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    one, same, other = (train(tiny_clip, colours, settings(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.delta, same.delta)
    assert one.losses == same.losses
    assert not np.array_equal(one.delta, other.delta)
    assert one.delta.dtype == np.float32
    assert one.delta.any()
    assert not one.buffers
    assert weights_sha256(tiny_clip.model) == tiny_clip.sha256


def test_the_loss_falls_and_the_pictures_are_told_apart(tiny_clip: Clip, colours: TaskData, settings: Settings) -> None:
    steps: list[Step] = []
    trained = train(tiny_clip, colours, settings(train__steps=15, train__label_smoothing=0.0), on_step=steps.append)
    assert [number for number, _ in trained.losses] == list(range(1, 16))
    assert trained.losses[-1][1] < 0.2 * trained.losses[0][1]
    assert [(step.task, step.step, step.steps) for step in steps] == [("colours", n, 15) for n in range(1, 16)]
    assert [step.loss for step in steps] == [loss for _, loss in trained.losses]
    assert all(step.pictures_per_second > 0 for step in steps)


def test_the_first_loss_is_the_smoothed_cross_entropy_of_the_first_prompt(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    config = settings(train__steps=1, train__batch_size=3, train__label_smoothing=0.2, seed=5)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(lambda _, values: seen.append(values))
        return module

    trained = train(tiny_clip, colours, config, place=Place(wrap=spy))
    ((pixels, labels),) = seen
    texts = tiny_clip.texts(["a photo of a red.", "a photo of a blue."])
    log_odds = torch.log_softmax(tiny_clip.logit_scale * tiny_clip.images(pixels) @ texts.T, dim=1)
    own = log_odds[torch.arange(3), labels]
    expected = -(0.8 * own + 0.2 * log_odds.mean(dim=1)).mean()
    assert trained.losses == [(1, pytest.approx(float(expected), rel=1e-5))]

    def mirrored(pixels: Tensor) -> Tensor:
        return tiny_clip.images(pixels.flip(-1))

    held = train(tiny_clip, colours, config, teacher=Teacher(mirrored, 3.0))
    away = tiny_clip.images(pixels) - mirrored(pixels)
    expected = expected + 3 * away.pow(2).sum(dim=1).mean()
    assert float(away.norm()) > 1e-2
    assert held.losses == [(1, pytest.approx(float(expected), rel=1e-5))]


class Killed(Exception):
    """What a test raises where a process would die."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full"),
        pytest.param({"method": "condu-lora"}, id="lora"),
        pytest.param({"train__weight_decay": 0.1, "train__towers": "image", "train__accumulate": 2}, id="image tower"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    tiny_clip: Clip, colours: TaskData, settings: Settings, changes: dict[str, Any]
) -> None:
    config = settings(train__steps=6, train__checkpoint_seconds=1e-9, **changes)
    _check_resume(tiny_clip, colours, config)


def test_a_killed_run_goes_on_with_its_running_statistics(
    conv_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    config = settings(train__steps=6, train__checkpoint_seconds=1e-9, train__batch_norm="updated")
    _check_resume(conv_clip, colours, config)


def _check_resume(clip: Clip, colours: TaskData, config: SessionConfig) -> None:
    undisturbed = train(clip, colours, config)
    saved: list[Checkpoint] = []
    resume = Resume(
        lambda: saved[-1] if saved else None,
        lambda checkpoint: saved.append({name: values.copy() for name, values in checkpoint.items()}),
    )

    def die(step: Step) -> None:
        if step.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(clip, colours, config, resume=resume, on_step=die)
    assert len(saved) == 3
    steps: list[int] = []
    resumed = train(clip, colours, config, resume=resume, on_step=lambda step: steps.append(step.step))
    assert steps == [4, 5, 6]
    assert len(saved) == 5, "the last step needs no checkpoint"
    assert np.array_equal(resumed.delta, undisturbed.delta)
    assert resumed.losses == undisturbed.losses
    assert resumed.buffers.keys() == undisturbed.buffers.keys()
    for name, values in resumed.buffers.items():
        assert np.array_equal(values, undisturbed.buffers[name]), name


def test_checkpoints_come_no_more_often_than_asked_and_from_the_first_process_only(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    saved: list[Checkpoint] = []
    train(tiny_clip, colours, settings(train__checkpoint_seconds=3600), resume=Resume(save=saved.append))
    config = settings(train__checkpoint_seconds=1e-9)
    train(tiny_clip, colours, config, resume=Resume(save=saved.append), place=Place(rank=1, size=2))
    assert not saved


def test_a_loss_that_is_not_finite_names_task_and_step(tiny_clip: Clip, colours: TaskData, settings: Settings) -> None:
    bad = 7

    def spoilt(picture: Any) -> Tensor:
        pixels = tiny_clip.train_transform(picture)
        return pixels * math.nan if picture.tobytes() == unseen.tobytes() else pixels

    config = settings(train__batch_size=2, train__steps=5, train__lr=0.25)
    unseen = load_picture(colours.train.pictures[bad])
    step = next(n for n, batch in enumerate(Order(10, 2, 0, range(5)), 1) if bad in [index for index, _ in batch])
    with pytest.raises(TrainingError) as caught:
        train(replace(tiny_clip, train_transform=spoilt), colours, config)
    assert f"task colours: the loss is nan at step {step} of 5: train with a smaller --train.lr (it was 0.25)" in str(
        caught.value
    )


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_model(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    """With several processes it is all that the others see of one process's bad loss."""

    def spoil(module: nn.Module) -> nn.Module:
        parameter = next(p for p in module.parameters() if p.requires_grad)
        steps: list[None] = []

        def later(gradient: Tensor) -> Tensor:
            steps.append(None)
            return gradient * (math.inf if len(steps) == 3 else 1)

        parameter.register_hook(later)
        return module

    with pytest.raises(TrainingError, match=r"task colours: the gradient is (inf|nan) at step 3 of 4"):
        train(tiny_clip, colours, settings(), place=Place(wrap=spoil))


def test_a_picture_that_went_away_is_one_sentence_also_from_a_loader_process(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    gone = replace(colours.train.pictures[3], path="/nowhere/3.png")
    train_split = replace(colours.train, pictures=(gone,) * 10)
    for processes in (0, 1):
        with pytest.raises(DataError) as caught:
            train(tiny_clip, replace(colours, train=train_split), settings(train__loader_processes=processes))
        assert str(caught.value) == (
            "the picture /nowhere/3.png cannot be read any more (no such file): "
            "put it back, or remove it, and run the command again."
        )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_loader_processes_change_no_bit(tiny_clip: Clip, colours: TaskData, settings: Settings) -> None:
    expected = train(tiny_clip, colours, settings())
    found = train(tiny_clip, colours, settings(train__loader_processes=2))
    assert np.array_equal(found.delta, expected.delta)
    assert found.losses == expected.losses


@pytest.mark.parametrize(("cores", "beside_a_gpu"), [(1, 0), (4, 3), (64, 8)])
def test_pictures_are_decoded_ahead_beside_a_gpu(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, cores: int, beside_a_gpu: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert loaders(settings(), torch.device("cuda")) == beside_a_gpu
    assert loaders(settings(), torch.device("cpu")) == 0
    assert {loaders(settings(train__loader_processes=2), torch.device(each)) for each in ("cpu", "cuda")} == {2}


@pytest.mark.parametrize("parts", [2, 4, 64])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tiny_clip: Clip, colours: TaskData, settings: Settings, parts: int
) -> None:
    """Also where the parts differ in size, or there would be more parts than pictures."""
    changes = {"train__batch_size": 7, "train__steps": 2, "train__checkpoint_seconds": 1e-9}
    expected = first_gradient(tiny_clip, colours, settings(**changes))
    found = first_gradient(tiny_clip, colours, settings(**changes, train__accumulate=parts))
    assert expected.any()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_where_only_the_image_tower_learns_the_text_tower_stays(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    for method in ("condu", "condu-lora"):
        config = settings(train__towers="image", train__weight_decay=0.1, method=method)
        layout = registry.get(method).layout(tiny_clip, config)
        trained = train(tiny_clip, colours, config)
        assert trained.delta.any()
        assert all(entry.name.startswith("visual.") for entry in layout.entries)


def test_the_logit_scale_stays(tiny_clip: Clip, colours: TaskData, settings: Settings) -> None:
    kept: list[nn.Module] = []
    train(tiny_clip, colours, settings(), place=Place(wrap=lambda module: kept.append(module) or module))
    (loss_of,) = kept
    scale = loss_of.get_parameter("model.logit_scale")
    assert torch.equal(scale, tiny_clip.model.get_parameter("logit_scale"))
    names = [entry.name for entry in registry.get("condu").layout(tiny_clip, settings()).entries]
    assert len(names) == len(list(tiny_clip.model.named_parameters())) - 1
    assert "logit_scale" not in names


def test_training_goes_on_from_a_delta_and_tells_the_whole_way_from_the_base_model(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    first = train(tiny_clip, colours, settings())
    still = train(tiny_clip, colours, settings(train__lr=1e-12), start=first.delta)
    np.testing.assert_allclose(still.delta, first.delta, atol=1e-6)
    assert still.losses[0][1] < first.losses[0][1]


def test_half_precision_arithmetic_trains_single_precision_parameters(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    full, half = (train(tiny_clip, colours, settings(train__precision=name)) for name in ("fp32", "bf16"))
    assert half.losses[0][1] == pytest.approx(full.losses[0][1], rel=0.05)
    assert half.losses != full.losses
    assert np.array_equal(train(tiny_clip, colours, settings(train__precision="auto")).delta, full.delta)


@pytest.mark.parametrize("batch_size", [4, 5])
def test_the_shares_of_all_processes_are_the_batch(batch_size: int) -> None:
    whole = [sorted(batch) for batch in Order(10, batch_size, 3, range(7))]
    shares = zip(*(Order(10, batch_size, 3, range(7), rank, 3) for rank in range(3)), strict=True)
    assert [sorted(itertools.chain(*each)) for each in shares] == whole


def test_the_order_is_one_permutation_an_epoch_and_the_same_from_any_step() -> None:
    batches = list(Order(10, 4, 3, range(10)))
    indices = [index for batch in batches for index, _ in batch]
    epochs = [indices[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len({seed for batch in batches for _, seed in batch}) == 40, "each picture is augmented anew each time"
    assert list(Order(10, 4, 3, range(6, 10))) == batches[6:]
    assert list(Order(10, 4, 4, range(10))) != batches


def test_a_batch_too_small_for_the_workers_is_refused(tiny_clip: Clip, colours: TaskData, settings: Settings) -> None:
    with pytest.raises(TrainingError, match="a batch of 4 pictures cannot be shared by 5 workers: use --workers 4"):
        train(tiny_clip, colours, settings(), place=Place(rank=4, size=5))


def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_zero() -> None:
    found = [schedule(step, 10, 0.2) for step in range(10)]
    cosine = [0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert found == pytest.approx([0.5, 1.0, *cosine])
    assert found[6] == pytest.approx(0.5)
    assert schedule(0, 1, 0.1) == 1
    assert schedule(0, 5, 0.0) == 1
    assert schedule(999, 1000, 0.1) < 1e-5
    assert [schedule(step, 100, 0.07) for step in (5, 6)] == pytest.approx([6 / 7, 1])


def test_the_rate_of_each_step_is_the_peak_by_the_schedule(
    tiny_clip: Clip, colours: TaskData, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            assert self.defaults["betas"] == (0.9, 0.999)
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train(tiny_clip, colours, settings(train__warmup=0.5, train__lr=0.01))
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_unset_steps_are_ten_epochs_within_limits(settings: Settings) -> None:
    config = settings(train__steps=None, train__batch_size=32)
    assert [steps_for(pictures, config) for pictures in (1, 320, 1000, 10_000)] == [100, 100, 313, 1000]
    assert steps_for(10_000, settings(train__steps=7)) == 7


def test_an_adapter_takes_rapfs_epochs_and_more_where_pictures_are_few(settings: Settings) -> None:
    """15 epochs of CIFAR-100's 5,000 pictures a session are the 750 steps that no smaller task goes below."""
    unset = settings(method="rapf", adapter__batch_size=100)
    assert [adapter_epochs(pictures, unset) for pictures in (20, 400, 4_900, 5_000, 50_000)] == [750, 188, 16, 15, 15]
    assert [steps_for(pictures, unset) for pictures in (20, 400, 5_000, 50_000)] == [750, 752, 750, 7_500]
    asked = settings(method="rapf", adapter__epochs=2)
    assert [steps_for(pictures, asked) for pictures in (20, 400)] == [2, 8]


def test_unset_rates_are_the_published_ones_for_large_models_and_higher_for_small(settings: Settings) -> None:
    full, lora = settings(train__lr=None), settings(train__lr=None, method="condu-lora")
    assert [learning_rate_for(size, full) for size in (4_000_000, 150_000_000)] == [5e-4, 1e-5]
    assert [learning_rate_for(size, lora) for size in (4_000_000, 150_000_000)] == [1e-2, 1e-3]
    assert learning_rate_for(150_000_000, settings(train__lr=0.3)) == 0.3


def test_frozen_running_statistics_stay_and_normalise(conv_clip: Clip, colours: TaskData, settings: Settings) -> None:
    kept: list[nn.Module] = []
    trained = train(conv_clip, colours, settings(), place=Place(wrap=lambda module: kept.append(module) or module))
    assert trained.buffers == {}
    own = dict(conv_clip.model.named_buffers())
    for name, buffer in kept[0].get_submodule("model").named_buffers():
        assert torch.equal(buffer, own[name]), name
    updated = train(conv_clip, colours, settings(train__batch_norm="updated"))
    assert updated.losses[0] != trained.losses[0], "frozen statistics are those that normalise, too"


@pytest.mark.parametrize("parts", [{"train__batch_size": 1}, {"train__accumulate": 8}])
def test_statistics_of_a_single_picture_are_refused(
    conv_clip: Clip, colours: TaskData, settings: Settings, parts: dict[str, int]
) -> None:
    with pytest.raises(TrainingError, match="nothing to measure in a single picture.*batch-norm frozen"):
        train(conv_clip, colours, settings(train__batch_norm="updated", **{"train__batch_size": 8, **parts}))


def test_a_copy_learns_never_the_base_model(conv_clip: Clip, colours: TaskData, settings: Settings) -> None:
    modes = copy.deepcopy([module.training for module in conv_clip.model.modules()])
    for method in ("condu", "condu-lora"):
        train(conv_clip, colours, settings(train__batch_norm="updated", method=method))
    assert weights_sha256(conv_clip.model) == conv_clip.sha256
    assert [module.training for module in conv_clip.model.modules()] == modes
