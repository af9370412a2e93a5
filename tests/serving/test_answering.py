"""Batches in which several clients' pictures go together, and pictures that must not reach the model."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_crew import learn_here, opened, settings
from PIL import Image
from torch import Tensor

from condu_ray.config import ServeConfig
from condu_ray.errors import ConfigError, DataError
from condu_ray.models.clip import Clip, halved
from condu_ray.serving.answering import Asked, Timed, TooLate, answer_batch, pixels_of, warm
from condu_ray.serving.messages import Question
from condu_ray.sources import resolve_serving, resolve_watched
from condu_ray.voting.answer import Answer
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.open import load_classifier


@pytest.fixture(scope="module", params=["condu", "condu-lora"])
def classifier(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    picture_tasks: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Classifier:
    store = tmp_path_factory.mktemp(request.param) / "store"
    learn_here(settings(store, tiny_model_dir, method=request.param), opened(picture_tasks, "colours", "stripes"))
    return load_classifier(store)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def asked(classifier: Classifier, question: Question, picture: Tensor, seconds: float = 60) -> Asked:
    return Asked(classifier, question, picture, time.monotonic() + seconds)


def answers(batch: list[Asked]) -> list[Answer]:
    found = answer_batch(batch)
    assert all(isinstance(one, Timed) for one in found), found
    return [one.answer for one in found if isinstance(one, Timed)]


def test_each_picture_of_a_mixed_batch_gets_the_answer_to_its_own_question(
    classifier: Classifier, pixels: Tensor
) -> None:
    questions = [
        Question(),
        Question(task="stripes"),
        Question(labels=("a", "b")),
        Question(k=1),
        Question(),
        Question(top=1),
    ]
    found = answers([asked(classifier, question, picture) for question, picture in zip(questions, pixels, strict=True)])
    for place, question in enumerate(questions):
        one = classifier if question.k is None else classifier.asking(k=question.k)
        (alone,) = one.classify(pixels[place : place + 1], question.task, question.labels)
        assert found[place].label == alone.label
        assert found[place].probability == pytest.approx(alone.probability, abs=1e-5)
        assert [vote.task for vote in found[place].votes] == [vote.task for vote in alone.votes]
    assert len(found[3].votes) <= len(found[0].votes)


def test_what_nobody_waits_for_is_not_answered_and_a_fault_stays_with_its_question(
    classifier: Classifier, pixels: Tensor
) -> None:
    batch = [
        asked(classifier, Question(), pixels[0], seconds=-1),
        asked(classifier, Question(task="nothing"), pixels[1]),
        asked(classifier, Question(), pixels[2]),
    ]
    late, wrong, right = answer_batch(batch)
    assert isinstance(late, TooLate)
    assert "task nothing is not in version" in str(wrong)
    assert isinstance(right, Timed)


def test_what_breaks_for_one_question_breaks_for_no_other(
    classifier: Classifier, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Classifier.classify

    def classify(self: Classifier, pictures: Tensor, task: Any = None, labels: Any = None) -> Any:
        if labels:
            raise RuntimeError("CUDA out of memory")
        return real(self, pictures, task, labels)

    monkeypatch.setattr(Classifier, "classify", classify)
    questions = [Question(labels=("a", "b")), Question()]
    broken, right = answer_batch([asked(classifier, each, pixels[0]) for each in questions])
    assert isinstance(broken, RuntimeError)
    assert isinstance(right, Timed)


def test_a_version_in_another_thread_shares_every_weight_but_no_module(tiny_clip: Clip) -> None:
    twin = tiny_clip.twin()
    own = {id(each) for each in tiny_clip.model.modules()}
    assert not own & {id(each) for each in twin.model.modules()}
    mine, theirs = tiny_clip.model.state_dict(), twin.model.state_dict()
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in mine.items())


def test_half_precision_changes_numbers_a_little_and_large_experts_take_half(tiny_clip: Clip, pixels: Tensor) -> None:
    half = replace(tiny_clip.twin(), precision="bf16")
    weights = {name: tensor.detach() for name, tensor in tiny_clip.model.named_parameters()}
    expert = halved({name: 1.01 * tensor for name, tensor in weights.items()})
    assert isinstance(expert, dict)
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in (weights, expert)]
    assert sizes[1] < 0.51 * sizes[0]
    with torch.no_grad():
        for one in (None, expert):
            exact, rounded = (
                tiny_clip.images(pixels, one and {n: t.float() for n, t in one.items()}),
                half.images(pixels, one),
            )
            assert rounded.dtype == torch.float32
            assert torch.allclose(rounded.norm(dim=1), torch.ones(6), atol=1e-5)
            assert 0 < (exact - rounded).abs().max() < 0.05


def test_warming_leaves_nothing_to_build_for_the_first_request(classifier: Classifier, pixels: Tensor) -> None:
    warm(classifier)
    before = classifier.cached.misses
    classifier.classify(pixels)
    classifier.classify(pixels, task="stripes")
    assert classifier.cached.misses == before


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "said"),
    [(picture(101, 100), "too large: 101 x 100"), (picture(201, 2), "too long and thin"), (b"x", "not a picture")],
)
def test_pictures_that_would_fill_the_memory_are_refused_before(tiny_clip: Clip, body: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pixels_of(body, tiny_clip.eval_transform, 10_000)
    assert pixels_of(picture(100, 100), tiny_clip.eval_transform, 10_000).shape == (3, 32, 32)


def test_settings_come_from_environment_and_options_and_keep_the_token_to_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONDU_SERVE__TOKEN", "a-token-of-many-letters")
    monkeypatch.setenv("CONDU_SERVE__BATCH", "8")
    config = resolve_serving({"host": "0.0.0.0", "batch": "16", "origins": "https://a, https://b"})
    assert (config.batch, config.origins) == (16, ("https://a", "https://b"))
    assert config.token is not None and config.token.get_secret_value() == "a-token-of-many-letters"
    assert "many-letters" not in repr(config) + str(config.model_dump())
    monkeypatch.setenv("CONDU_SERVE__TOKEN", "short-secret")
    with pytest.raises(ConfigError) as caught:
        resolve_serving({"prot": 1, "queue": 0})
    told = str(caught.value)
    assert "no setting 'prot' (from option; did you mean port?)" in told
    assert "queue = 0 (from option)" in told and "token (from environment)" in told
    assert "short-secret" not in told
    assert ServeConfig().host == "127.0.0.1"


def test_a_token_from_a_file_is_taken_without_its_line_end_and_one_that_cannot_be_sent_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONDU_SERVE__TOKEN", "a-token-of-many-letters\n")
    token = resolve_serving({}).token
    assert token is not None and token.get_secret_value() == "a-token-of-many-letters"
    for wrong, said in (("fifteen-letters\n", "at least 16"), ("schlüssel-schlüssel", "can be sent with a request")):
        monkeypatch.setenv("CONDU_SERVE__TOKEN", wrong)
        with pytest.raises(ConfigError, match=said) as told:
            resolve_serving({})
        assert wrong.strip() not in str(told.value)


def test_settings_of_running_replicas_are_these_three_and_no_others() -> None:
    asked = resolve_watched({"version": "3", "shadow_version": None, "shadow_share": "0.5"})
    assert (asked.version, asked.shadow_version, asked.shadow_share) == (3, None, 0.5)
    with pytest.raises(ConfigError) as told:
        resolve_watched({"verison": 3, "shadow_share": 10, "replicas": 2})
    assert "no setting 'verison' (did you mean version?)" in str(told.value)
    assert "shadow_share = 10 (from user_config)" in str(told.value) and "no setting 'replicas'" in str(told.value)
