"""Opening a base model: what is refused, and that what is opened is the model that was meant."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import load_file, save_file
from torch import nn

from condu_ray.config import ModelSpec
from condu_ray.errors import ModelError
from condu_ray.models.clip import Clip
from condu_ray.models.load import _is_convolutional, _preprocessing, load, weights_sha256

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture
def named_model(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny architecture under an open_clip name of its own, as a user adds one."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    config = json.loads((tiny_model_dir / CONFIG).read_text())["model_cfg"]
    (tmp_path / "condu-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    return "condu-tiny"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"name": "vit-b-16"}, "vit-b-16 is not an open_clip name: did you mean ViT-B-16?"),
        ({"name": "ViT-B/16", "pretrained": "openai"}, "did you mean ViT-B-16?"),
        (
            {"name": "ViT-B-16"},
            "needs weights: add --pretrained with a checkpoint file or a tag (openai, laion400m_e31",
        ),
        (
            {"name": "ViT-B-16", "pretrained": "laion400m_e33"},
            "laion400m_e33 is neither a checkpoint file nor a tag of this model: did you mean laion400m_e3",
        ),
        ({"name": "ViT-B-16", "pretrained": "/nowhere/weights.pt"}, "is neither a checkpoint file nor a tag"),
        (
            {"name": "ViT-B-32", "pretrained": "openai"},
            "weights openai were trained with QuickGELU, which it lacks: use --model ViT-B-32-quickgelu",
        ),
        ({"name": "local-dir:/nowhere"}, "no open_clip_config.json there"),
        ({"name": "default", "pretrained": "openai"}, "brings its own weights, so openai would be ignored"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(spec: dict[str, str], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(ModelSpec(**spec))
    assert sentence in str(caught.value)


def test_a_folder_without_weights_is_refused_not_filled_with_random_ones(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="weights of that folder"):
        load(ModelSpec(name=f"local-dir:{folder}"))


def test_weights_beside_a_folder_are_refused_not_ignored(folder: Path) -> None:
    with pytest.raises(ModelError, match="would be ignored: leave --pretrained out"):
        load(ModelSpec(name=f"local-dir:{folder}", pretrained=str(folder / WEIGHTS)))


@pytest.mark.parametrize("damage", ["cut", "missing tensor", "other shape", "config"])
def test_damaged_or_foreign_weights_are_one_sentence(folder: Path, damage: str) -> None:
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    elif damage == "config":
        (folder / CONFIG).write_text("{")
    else:
        weights = load_file(folder / WEIGHTS)
        del weights["ln_final.weight"]
        if damage == "other shape":
            weights["ln_final.weight"] = torch.zeros(7)
        save_file(weights, folder / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        load(ModelSpec(name=f"local-dir:{folder}"))
    assert "\n" not in str(caught.value)
    assert "check the name, the tag" in str(caught.value)


def test_open_clips_log_is_quiet_only_while_loading(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / WEIGHTS).unlink()
    level = logging.root.level
    with pytest.raises(ModelError):
        load(ModelSpec(name=f"local-dir:{folder}"))
    assert logging.root.level == level
    assert not caplog.records


def test_the_model_is_ready_to_answer_and_cannot_learn(tiny_clip: Clip) -> None:
    assert not tiny_clip.model.training
    assert not any(parameter.requires_grad for parameter in tiny_clip.model.parameters())
    assert not tiny_clip.channels_last


def test_a_convolutional_tower_lies_as_its_kernels_want_it(conv_clip: Clip) -> None:
    assert conv_clip.channels_last
    kernel = conv_clip.model.get_parameter("visual.trunk.conv_stem.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_file_under_an_open_clip_name_is_the_same_model(
    tiny_clip: Clip, tiny_model_dir: Path, named_model: str
) -> None:
    found = load(ModelSpec(name=named_model, pretrained=str(tiny_model_dir / WEIGHTS)))
    assert found.sha256 == tiny_clip.sha256
    with pytest.raises(ModelError, match=r"condu-tiny needs weights: .* \(no tags known\)"):
        load(ModelSpec(name=named_model))


def test_a_checkpoint_file_takes_pictures_as_the_weights_of_that_name_do(named_model: str) -> None:
    """Where all that open_clip has agree; a file does not say it."""
    half = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "image_interpolation": "bicubic"}
    found = _preprocessing(ModelSpec(name="ViT-B-16-SigLIP", pretrained="/weights/mine.pt"))
    assert found == half | {"image_resize_mode": "squash"}
    plain = _preprocessing(ModelSpec(name="MobileCLIP2-S0", pretrained="/weights/mine.pt"))
    assert (plain["image_mean"], plain["image_interpolation"]) == ((0.0, 0.0, 0.0), "bilinear")
    assert _preprocessing(ModelSpec(name="ViT-B-16-SigLIP", pretrained="webli")) == {}, "the tag says it"
    assert _preprocessing(ModelSpec(name="ViT-H-14", pretrained="/weights/mine.pt")) == {}, "they differ"
    assert _preprocessing(ModelSpec(name=named_model, pretrained="/weights/mine.pt")) == {}


def test_a_package_that_a_model_needs_is_named_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"ViT-B-16-SigLIP reads texts with the package transformers.*uv sync --extra"):
        load(ModelSpec(name="ViT-B-16-SigLIP", pretrained="webli"))
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="package transformers, which is not installed"):
        load(ModelSpec(name=f"local-dir:{folder}"))


def test_a_kernel_whose_gradient_breaks_in_channels_last_keeps_the_other_layout() -> None:
    """oneDNN writes where it must not: strided 1x1 kernels of few channels, as in MobileCLIP's stem."""
    safe = [nn.Conv2d(8, 8, 1, 2), nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3) for _ in range(4))]
    assert _is_convolutional(nn.Sequential(*safe))
    assert not _is_convolutional(nn.Sequential(nn.Conv2d(3, 64, 1, 2), *safe))


def test_a_torch_checkpoint_is_read_without_running_code(folder: Path, named_model: str) -> None:
    class Rogue:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "ran",))

    weights = load_file(folder / WEIGHTS)
    torch.save({"state_dict": weights}, folder / "good.pt")
    assert load(ModelSpec(name=named_model, pretrained=str(folder / "good.pt"))).parameter_count() > 0
    torch.save({"state_dict": weights, "extra": Rogue()}, folder / "bad.pt")
    with pytest.raises(ModelError):
        load(ModelSpec(name=named_model, pretrained=str(folder / "bad.pt")))
    assert not (folder / "ran").exists()


def test_half_precision_weights_are_computed_with_in_single_precision(folder: Path, tiny_clip: Clip) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    found = load(ModelSpec(name=f"local-dir:{folder}"))
    for name, parameter in found.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, halves[name].float()), name
    assert found.sha256 != tiny_clip.sha256


def test_weights_that_are_not_the_stores_are_refused(tiny_model_dir: Path, tiny_clip: Clip) -> None:
    spec = ModelSpec(name=f"local-dir:{tiny_model_dir}")
    assert load(spec, expect_sha256=tiny_clip.sha256).sha256 == tiny_clip.sha256
    with pytest.raises(ModelError, match=f"has weights {tiny_clip.sha256[:12]}, the store was made with 0123456789ab"):
        load(spec, expect_sha256="0123456789abcdef")


def test_the_digest_tells_apart_values_names_dtypes_and_shapes_but_not_strides() -> None:
    def model(tensor: torch.Tensor, name: str = "a") -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer(name, tensor)
        return module

    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    same = weights_sha256(model(base))
    assert weights_sha256(model(base.contiguous(memory_format=torch.channels_last))) == same
    others = [base + 1, base.double(), base.reshape(3, 2, 2, 2), base.to(torch.bfloat16), base.bool()]
    digests = {same, weights_sha256(model(base, "b")), *(weights_sha256(model(other)) for other in others)}
    assert len(digests) == 7
    assert weights_sha256(model(torch.tensor(5))) != weights_sha256(model(torch.tensor([5])))
