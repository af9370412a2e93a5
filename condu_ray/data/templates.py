"""Prompt templates: how a class name becomes the sentences that a text tower reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from unicodedata import normalize

from condu_ray.errors import DataError

# The plain one, then the seven that CLIP's authors found best together on ImageNet (their prompt engineering notebook).
DEFAULT_TEMPLATES = (
    "a photo of a {c}.",
    "itap of a {c}.",
    "a bad photo of the {c}.",
    "a origami {c}.",
    "a photo of the large {c}.",
    "a {c} in a video game.",
    "art of the {c}.",
    "a photo of the small {c}.",
)

_PLACE = re.compile(r"\{c?\}")


def prompts(classname: str, templates: Sequence[str]) -> list[str]:
    """Returns one sentence a template, the class name (underscores as spaces) in place of {c} or {}."""
    words = spoken(classname)
    return [words.join(_PLACE.split(template)) for template in templates]


def spoken(classname: str) -> str:
    """Returns a class name as it is said in a prompt: underscores are spaces, no space twice."""
    return " ".join(classname.replace("_", " ").split())


@functools.lru_cache(maxsize=2**16)  # a vote with labels asks for every learned class
def word_key(name: str) -> str:
    """Returns what is equal for two names that are the same word: case, spacing and Unicode's two ways to write an
    accent do not count."""
    return normalize("NFC", spoken(name)).casefold()


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the templates; raises DataError for an empty list or a template without a place for the class name."""
    if not templates:
        raise DataError(f"{where} holds no prompt template", "write one a line, such as: a photo of a {c}.")
    for template in templates:
        if not _PLACE.search(template):
            raise DataError(f"{where}: the template {template!r} has no place for the class", "write {c} where it goes")
    return tuple(templates)
