"""The answer for one picture, and its JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from condu_ray.voting.labels import Label

DIGITS = 6


@dataclass(frozen=True)
class Vote:
    """One voter's share. task: None for θ⁰. similarity: what the router has, probability of the task or cosine to its
    nearest prototype; None where nothing was routed (the task was named) and for θ⁰. Weights of an answer sum to 1."""

    task: str | None
    similarity: float | None
    weight: float


@dataclass(frozen=True)
class Answer:
    """What a version says of a picture. ranked: every label of the space, the likeliest first. strangeness: probability
    that the picture is of no learned task; None where the task was named, or the router does not say."""

    label: Label
    probability: float
    ranked: tuple[tuple[Label, float], ...]
    votes: tuple[Vote, ...]
    label_space: str
    version: int
    strangeness: float | None = None

    def to_json(self, image: str, top: int = 5) -> dict[str, Any]:
        """The published JSON object, with the `top` likeliest labels; floats to six digits."""
        return {
            "image": image,
            "label": self.label.name,
            "task": self.label.task,
            "probability": round(self.probability, DIGITS),
            "labels": [
                {"label": label.name, "task": label.task, "probability": round(probability, DIGITS)}
                for label, probability in self.ranked[:top]
            ],
            "votes": [
                {
                    "task": vote.task,
                    "similarity": None if vote.similarity is None else round(vote.similarity, DIGITS),
                    "weight": round(vote.weight, DIGITS),
                }
                for vote in self.votes
            ],
            "label_space": self.label_space,
            "strangeness": None if self.strangeness is None else round(self.strangeness, DIGITS),
            "version": self.version,
        }
