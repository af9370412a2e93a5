"""Soft prompts: learned vectors before a class name, in the space of the text tower's token embeddings (CoOp, arXiv
2109.01134).

    [start] v_1 … v_M name . [end]

Any tower that looks its tokens up in a table can take them: the text is written with M placeholders, whose rows of the
table are replaced on the way. The tower itself stays as it is.

Legend: C classes, M vectors a prompt, W width of a token, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from condu_ray.errors import ConfigError, ModelError
from condu_ray.models.clip import Clip

PLACEHOLDER = "x"
START = "a photo of a"
NAME_ROOM = 3
"""Tokens beside the vectors: the start, the end, and a name of one token."""

CHUNK = 128
"""Most texts a pass."""


def prompt_tokens(clip: Clip, names: Sequence[str], length: int) -> Tensor:
    """Class names as the tower reads them after `length` vectors, int64[C, tokens]; their places hold a placeholder.

    Raises ModelError for a tower that looks up no tokens, ConfigError where vectors and a name do not fit.
    """
    _token_table(clip)
    first, lead, place = _placeholder(clip)
    tokens = clip.tokenizer([f"{PLACEHOLDER} " * length + f"{name.replace('_', ' ')}." for name in names])
    room = tokens.shape[1] - NAME_ROOM
    if length > room:
        raise ConfigError(
            f"{length} prompt vectors and a class name do not fit the {tokens.shape[1]} tokens of a text for "
            f"{clip.spec.name}",
            f"use at most {room} (--dmc.shared-prompt, --dmc.task-prompt)",
        )
    held = tokens[:, first : first + length]
    if length and not ((held[:, 0] == lead).all() and (held[:, 1:] == place).all()):
        raise _refusal(clip, "its tokenizer does not keep them apart")
    return tokens


def most_vectors(clip: Clip) -> int:
    """How many vectors fit before a name of one token."""
    return clip.tokenizer([PLACEHOLDER]).shape[1] - NAME_ROOM


class PromptedClasses:
    """The text tower of θ⁰ over class names, as a function of the vectors before them; for one thread at a time.

    tokens: as `prompt_tokens` gives them for so many vectors.
    """

    def __init__(self, clip: Clip, tokens: Tensor, length: int) -> None:
        self._clip, self.length = clip, length
        self._table, (self._first, *_) = _token_table(clip), _placeholder(clip)
        self._tokens = tokens.to(clip.device)

    def vectors(self, context: Tensor, classes: Tensor | None = None) -> Tensor:
        """context f32[C, M, W], or [M, W] for all alike -> unit vectors f32[C, D], with a gradient for the context.

        classes: which of them, int64[C]; None: all.
        """
        tokens = self._tokens if classes is None else self._tokens[classes]
        parts = zip(torch.split(tokens, CHUNK), torch.split(context.expand(len(tokens), -1, -1), CHUNK), strict=True)
        return torch.cat([self._encoded(some, values) for some, values in parts])

    def _encoded(self, tokens: Tensor, context: Tensor) -> Tensor:
        first, last = self._first, self._first + self.length

        def replace(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :first], context.to(output.dtype), output[:, last:]], dim=1)

        handle = self._table.register_forward_hook(replace)
        try:
            encode: Any = self._clip.model.encode_text
            return functional.normalize(encode(tokens).float(), dim=-1)
        finally:
            handle.remove()


def start_vectors(clip: Clip, length: int, seed: int) -> Tensor:
    """Where learning begins, f32[M, W]: the embeddings of "a photo of a", then noise as large as embeddings are."""
    embedding = _token_table(clip)
    first, *_ = _placeholder(clip)
    table = embedding.weight.detach().float()
    words = clip.tokenizer([START])[0][first : first + len(START.split())].to(table.device)
    seen = embedding(words).detach().float()  # some tables scale what is looked up
    noise = torch.randn(length, table.shape[1], generator=torch.Generator().manual_seed(seed))
    found: Tensor = noise.to(table.device) * table.std() * (seen.norm() / table[words].norm())
    found[: len(words)] = seen[:length]
    return found


def _token_table(clip: Clip) -> nn.Embedding:
    """The largest table outside the image tower: positions and kinds of tokens are far fewer than words."""
    named = [(name, each) for name, each in clip.model.named_modules() if isinstance(each, nn.Embedding)]
    tables = [each for name, each in named if name.partition(".")[0] != "visual"]
    if not tables:
        raise _refusal(clip, "it looks up no tokens")
    return max(tables, key=lambda each: each.num_embeddings)


def _placeholder(clip: Clip) -> tuple[int, int, int]:
    """(position of the first word of a text, the placeholder's token there, its token anywhere else).

    Some tokenizers read a word that begins a text as another one.
    """
    many = 4
    tokens = clip.tokenizer([" ".join([PLACEHOLDER] * many)])[0].tolist()
    padding = tokens[-1]
    for first in range(len(tokens) - many):
        lead, *others = tokens[first : first + many]
        if len(set(others)) == 1 and others[0] != padding and tokens[first + many] != others[0]:
            return first, lead, others[0]
    raise _refusal(clip, "its tokenizer does not keep them apart")


def _refusal(clip: Clip, why: str) -> ModelError:
    return ModelError(
        f"the text tower of {clip.spec.name} takes no soft prompts: {why}",
        "use --method calfuse or rapf, which leave the text tower alone",
    )
