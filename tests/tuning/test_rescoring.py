"""Cached answers scored again are the answers that the classifier gives, whatever the settings of the vote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from in_process_crew import InProcessCrew, silent
from streams import Stream

from condu_ray.config import VoteConfig
from condu_ray.data import PictureSet
from condu_ray.models.clip import Clip
from condu_ray.tuning.answers import Rescorer
from condu_ray.tuning.cache import load_versions, prepare
from condu_ray.tuning.objectives import Goals
from condu_ray.tuning.rescoring import Version
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.labels import LabelSpace
from condu_ray.voting.open import expert_maker, task_experts
from condu_ray.voting.router import calibrated
from condu_ray.voting.voters import Asked

VOTES = st.fixed_dictionaries(
    {
        "k": st.integers(1, 4),
        "router": st.sampled_from(["lda", "cosine"]),
        "combine": st.sampled_from(["weighted", "mean_logits"]),
        "average": st.sampled_from(["logits", "probabilities"]),
        "temperature": st.sampled_from([0.005, 0.05, 1.0]),
        "base_weight": st.sampled_from([None, 0.0, 0.3, 0.9]),
        "adaptive": st.booleans(),
        "coverage": st.sampled_from([0.3, 0.7, 0.99]),
        "gap": st.sampled_from([None, 0.0, 0.02, 0.5]),
        "prototypes": st.sampled_from(["both", "image", "text"]),
        "union": st.sampled_from(["own", "routed", "joint"]),
        "within": st.sampled_from(["both", "expert"]),
    }
)


@pytest.fixture(scope="module")
def versions(stream: Stream) -> list[Version]:
    return load_versions(stream.cached, stream.store)


Answers = Callable[[int, VoteConfig, "int | None"], list[int]]


@pytest.fixture(scope="module")
def pixels(stream: Stream, tiny_clip: Clip) -> list[torch.Tensor]:
    """Of each task's validation pictures, f32[N, 3, H, W]."""
    found = []
    for task in stream.tasks:
        seen = PictureSet(task.test, tiny_clip.eval_transform)
        found.append(torch.stack([seen[place][0] for place in range(len(seen))]))
    return found


ClassifierOf = Callable[[int, VoteConfig], Classifier]


@pytest.fixture(scope="module")
def classifier_of(stream: Stream, tiny_clip: Clip) -> ClassifierOf:
    """A version that answers by a vote; its voters are made once."""
    voters: dict[int, Any] = {}

    def made(version: int, vote: VoteConfig) -> Classifier:
        experts = task_experts(stream.store, stream.store.manifest(version))
        maker = expert_maker(stream.store, version, tiny_clip)
        whole = Classifier(tiny_clip, experts, maker, vote, calibrated(experts, vote), version)
        return whole.asking(voters=voters.setdefault(version, whole.voters))

    return made


@pytest.fixture(scope="module")
def classified(stream: Stream, pixels: list[torch.Tensor], classifier_of: ClassifierOf) -> Answers:
    """What a version answers, by the classifier itself: for the pictures of a task among its own labels, or (None) for
    those of all learned tasks among all that are learned; labels count through the whole stream."""
    starts = np.cumsum([0, *(len(task.classes) for task in stream.tasks)])

    def answers(version: int, vote: VoteConfig, task: int | None) -> list[int]:
        classifier = classifier_of(version, vote)
        if task is None:
            return classifier.label_indices(torch.cat(pixels[:version]), classifier.label_space()).tolist()
        space = LabelSpace.of_candidates(stream.tasks[task].classes, stream.tasks[task].templates)
        return (classifier.label_indices(pixels[task], space) + starts[task]).tolist()

    return answers


@given(VOTES, st.integers(1, 3), st.sampled_from([None, 0, 1, 2]))
@examples(max_examples=80)
def test_scored_again_is_what_the_classifier_answers(
    versions: list[Version], classified: Answers, vote: dict[str, Any], version: int, task: int | None
) -> None:
    asked, again = VoteConfig.model_validate(vote), versions[version - 1]
    answers, experts = again.union(asked) if task is None else again.candidates(asked, task)
    assert answers.tolist() == classified(version, asked, task)
    assert 0 <= experts.min() <= experts.max() <= min(asked.k, version)


@given(VOTES, st.sampled_from([((0, 0), (0, 2), (1, 1)), ((1, 0), (0, 1)), ((1, 2), (1, 0), (0, 0), (0, 1))]))
@examples(max_examples=60)
def test_a_task_to_come_whose_words_are_of_several_learned_tasks_is_answered_as_by_the_classifier(
    stream: Stream,
    pixels: list[torch.Tensor],
    classifier_of: ClassifierOf,
    versions: list[Version],
    vote: dict[str, Any],
    words: tuple[tuple[int, int], ...],
) -> None:
    """No task alone has them all, so each expert speaks for those that are its own."""
    asked, first = VoteConfig.model_validate(vote), versions[1]._pictures
    classifier = classifier_of(2, asked)
    space = LabelSpace.of_candidates([stream.tasks[task].classes[place] for task, place in words])
    voters = [*(expert.name for expert in classifier.experts), None]
    every = torch.cat(pixels)
    said = classifier.voters.logits(
        every, None, [Asked(each, tuple(range(len(every))), space.blocks) for each in voters]
    )
    logits = np.concatenate([versions[1]._logits[:, :, :6], np.stack([block for [block] in said])], axis=2)
    classes = (*first.classes[:2], tuple(label.name for label in space.labels))
    experts = classifier.experts
    again = Version(replace(first, classes=classes), experts, logits, calibrated(experts, asked))
    answers, run = again.candidates(asked, 2)
    assert answers.tolist() == (classifier.label_indices(pixels[2], space) + 6).tolist()
    assert 0 <= run.min() <= run.max() <= min(asked.k, 2)


def test_settings_of_the_vote_change_the_answers(versions: list[Version]) -> None:
    """Else the equality above would say little."""
    votes = [
        VoteConfig.model_validate({"union": union, "router": router, "k": k})
        for union in ("own", "joint")
        for router in ("lda", "cosine")
        for k in (1, 3)
    ]
    assert len({tuple(versions[2].union(vote)[0]) for vote in votes}) >= 4


def test_figures_of_the_stream_and_its_latency(stream: Stream) -> None:
    rescorer = Rescorer(stream.cached, stream.config.vote, "union", unseen=True)
    few, many = (rescorer.figures({"vote.k": k, "vote.adaptive": False}) for k in (1, 3))
    assert set(few) == {"last", "average", "zero_shot_loss", "latency"}
    base, expert = stream.cached.passes or (0.0, 0.0)
    assert few["latency"] == pytest.approx(base + expert)
    assert many["latency"] == pytest.approx(base + 3 * expert)


def test_the_cache_is_found_again(stream: Stream) -> None:
    class NobodyAsked(InProcessCrew):
        def logits(self, *given: Any) -> np.ndarray:
            raise AssertionError("asked again")

        features = train = logits  # type: ignore[assignment]

    crew = NobodyAsked(stream.store, stream.config)
    again = prepare(stream.config, stream.tasks, Goals(("last",)), stream.store, crew, silent)
    assert again.versions == stream.cached.versions[-1:]
    assert again.pictures == stream.cached.pictures
