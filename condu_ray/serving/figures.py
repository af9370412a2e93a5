"""What a server counts, for Prometheus through Ray (names start with ray_condu_), by application and replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ray.serve.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:  # a front counts without torch
    from condu_ray.serving.answering import Timed
    from condu_ray.voting.classifier import Classifier

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
SHARES = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]


class FrontFigures:
    """The metrics of one front."""

    def __init__(self) -> None:
        self._requests = Counter("condu_requests", "requests by route and status", ("route", "status"))
        self._seconds = Histogram("condu_request_seconds", "time of a request in the front", SECONDS, ("route",))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})


class ReplicaFigures:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self._stages = Histogram("condu_stage_seconds", "decode, wait (for a batch), model", SECONDS, ("stage",))
        self._batch = Histogram("condu_batch_pictures", "pictures a batch", [1, 2, 4, 8, 16, 32, 64, 128])
        self._votes = Counter("condu_votes", "votes by task; base is the base model", ("task",))
        self._near = Histogram(
            "condu_similarity", "how sure the router is of the first expert's task among those learned", SHARES
        )
        self._strange = Histogram(
            "condu_strangeness", "probability that a picture is of no learned task; high: an unknown domain", SHARES
        )
        self._cache = Gauge(
            "condu_expert_cache", "experts found loaded, and built, since the version serves", ("kind",)
        )
        self._version = Gauge("condu_version", "version that serves")
        self._fault = Gauge("condu_version_fault", "1 while a newer version cannot be loaded")
        self._shadow = Counter("condu_shadow", "pictures that the shadow version scored", ("verdict",))

    def decoded(self, seconds: float) -> None:
        self._stages.observe(seconds, {"stage": "decode"})

    def answered(self, batch: Sequence[Timed | Exception]) -> None:
        self._batch.observe(len(batch))
        for one in batch:
            if isinstance(one, Exception):
                continue
            self._stages.observe(one.waited, {"stage": "wait"})
            self._stages.observe(one.took, {"stage": "model"})
            for vote in one.answer.votes:
                self._votes.inc(1, {"task": vote.task or "base"})
            if (near := one.answer.votes[0].similarity) is not None:
                self._near.observe(max(near, 0.0))
            if one.answer.strangeness is not None:
                self._strange.observe(one.answer.strangeness)

    def serves(self, classifier: Classifier, fault: bool) -> None:
        self._version.set(classifier.version)
        self._fault.set(float(fault))
        self._cache.set(classifier.cached.hits, {"kind": "hit"})
        self._cache.set(classifier.cached.misses, {"kind": "miss"})

    def shadowed(self, verdict: Literal["agrees", "differs", "cannot"]) -> None:
        self._shadow.inc(1, {"verdict": verdict})
