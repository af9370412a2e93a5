"""Soft prompts: they stand where words stand, learn by gradient, and leave the tower as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from condu_ray.errors import ConfigError, ModelError
from condu_ray.models.clip import Clip
from condu_ray.models.load import weights_sha256
from condu_ray.models.prompts import PromptedClasses, most_vectors, prompt_tokens, start_vectors

NAMES = ["cat", "traffic_light", "dog"]


def prompted_by(clip: Clip, length: int) -> PromptedClasses:
    return PromptedClasses(clip, prompt_tokens(clip, NAMES, length), length)


def test_vectors_of_words_give_what_the_words_give(tiny_clip: Clip) -> None:
    prompted = prompted_by(tiny_clip, 4)
    with torch.no_grad():
        found = prompted.vectors(start_vectors(tiny_clip, 4, 0))
        expected = tiny_clip.texts([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
        torch.testing.assert_close(found, expected)
        some = prompted.vectors(start_vectors(tiny_clip, 4, 0), torch.tensor([2, 0]))
    torch.testing.assert_close(some, expected[[2, 0]])


@pytest.mark.parametrize("pool", [{"pool_type": "argmax"}, {"embed_cls": True, "pad_id": 0}], ids=["end", "appended"])
def test_a_text_tower_of_its_own_takes_them_too(tiny_clip: Clip, pool: dict[str, Any]) -> None:
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **pool}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(32, vision, text).eval()
    clip = replace(tiny_clip, model=model.requires_grad_(False))
    prompted = prompted_by(clip, 4)
    context = start_vectors(clip, 4, 0).requires_grad_()
    found = prompted.vectors(context)
    torch.testing.assert_close(found, clip.texts([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]))
    found[0].sum().backward()
    assert context.grad is not None and context.grad.abs().sum() > 0


def test_only_the_vectors_get_a_gradient_and_each_class_may_have_its_own(tiny_clip: Clip) -> None:
    prompted = prompted_by(tiny_clip, 5)
    start = start_vectors(tiny_clip, 5, 0)
    context = start.expand(3, -1, -1).clone().requires_grad_()
    prompted.vectors(context)[1].sum().backward()
    assert context.grad is not None and context.grad[1].abs().sum() > 0
    assert context.grad[0].abs().sum() == 0 and context.grad[2].abs().sum() == 0
    assert weights_sha256(tiny_clip.model) == tiny_clip.sha256
    assert not any(module._forward_hooks for module in tiny_clip.model.modules())


def test_the_noise_at_the_start_is_given_by_the_seed(tiny_clip: Clip) -> None:
    one, same, other = (start_vectors(tiny_clip, 6, seed) for seed in (1, 1, 2))
    assert one.shape == (6, 32) and torch.equal(one, same)
    assert torch.equal(one[:4], other[:4]) and not torch.equal(one[4:], other[4:])


@pytest.mark.parametrize("length", [1, 13])
def test_one_vector_and_as_many_as_fit(tiny_clip: Clip, length: int) -> None:
    prompted = prompted_by(tiny_clip, length)
    context = torch.randn(length, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found: Tensor = prompted.vectors(context)
    assert len({tuple(row) for row in found.detach().tolist()}) == 3
    found.sum().backward()
    assert context.grad is not None and (context.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("begins", [True, False], ids=["a text without a start", "a text with a start"])
def test_a_tokenizer_that_reads_the_first_word_as_another_is_taken(tiny_clip: Clip, begins: bool) -> None:
    """SentencePiece without a dummy prefix."""
    words = {"x": 11, "a": 12, "photo": 13, "of": 14}

    def tokenized(texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            tokens = [words.get(word, 20) for word in text.replace(".", " .").split()]
            row = [*([] if begins else [1]), tokens[0] + 100, *tokens[1:], 300]  # the tower pools at the largest
            rows.append((row + [0] * 16)[:16])
        return torch.tensor(rows)

    clip = replace(tiny_clip, tokenizer=tokenized)
    tokens, first = prompt_tokens(clip, NAMES, 5), 0 if begins else 1
    assert tokens[0, first : first + 5].tolist() == [111, 11, 11, 11, 11]
    table = clip.model.get_parameter("token_embedding.weight")
    torch.testing.assert_close(start_vectors(clip, 4, 0), table[torch.tensor([112, 13, 14, 12])])
    context = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    PromptedClasses(clip, tokens, 5).vectors(context)[0].sum().backward()
    assert context.grad is not None and (context.grad.abs().sum(1) > 0).all()


def test_more_than_fit_are_refused(tiny_clip: Clip) -> None:
    assert most_vectors(tiny_clip) == 13
    with pytest.raises(ConfigError, match="use at most 13"):
        prompt_tokens(tiny_clip, NAMES, 14)


def test_a_tower_that_looks_up_no_tokens_is_refused(tiny_clip: Clip) -> None:
    blind = nn.ModuleDict({"visual": nn.Embedding(3, 3), "text": nn.Linear(3, 3)})
    with pytest.raises(ModelError, match="takes no soft prompts"):
        prompt_tokens(replace(tiny_clip, model=blind), NAMES, 4)


def test_a_tokenizer_that_merges_placeholders_is_refused(tiny_clip: Clip) -> None:
    merged = replace(tiny_clip, tokenizer=lambda texts: torch.arange(16).expand(len(texts), -1))
    with pytest.raises(ModelError, match="tokenizer"):
        prompt_tokens(merged, NAMES, 4)
