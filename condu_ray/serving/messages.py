"""What fronts and replicas say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """What a request asks of its pictures, as in `Classifier.classify`. k: most experts a picture; None: the version's.

    version: None for the one that serves. top: labels listed.
    """

    task: str | None = None
    labels: tuple[str, ...] | None = None
    k: int | None = None
    version: int | None = None
    top: int = 5


@dataclass(frozen=True)
class Asking:
    """A request within the limits: encoded pictures, their names, and what is asked of them."""

    names: tuple[str, ...]
    pictures: tuple[bytes, ...]
    question: Question


@dataclass(frozen=True)
class Reply:
    """What a replica says to it. answers: published JSON objects, all by one version. milliseconds: by stage.

    refused: a sentence, where it cannot be answered as asked. late: nobody waits for it any more.
    """

    answers: tuple[dict[str, Any], ...] = ()
    version: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    late: bool = False


@dataclass(frozen=True)
class Standing:
    """What a replica serves now. newest: of the store. fault: why a version that should serve does not.

    shadow: version that scores a share of the traffic too.
    """

    replica: str
    version: int
    newest: int | None
    fault: str | None
    shadow: int | None
