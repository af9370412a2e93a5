"""A process that holds θ⁰ and versions, and answers in batches. It follows the store by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ray import serve

from condu_ray.config import ServeConfig
from condu_ray.errors import ConduError
from condu_ray.serving.answering import Asked, Timed, TooLate, answer_batch, pixels_of, warm
from condu_ray.serving.figures import ReplicaFigures
from condu_ray.serving.messages import Asking, Question, Reply, Standing
from condu_ray.serving.shelf import Shelf, told
from condu_ray.store import open_store
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.open import base_of, load_classifier

log = logging.getLogger("ray.serve")


class Replica:
    """Deployed by `app.application`. Raises ConduError at the start where no version can be loaded."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._store = open_store(config.store)
        base = base_of(self._store.header, "cuda" if config.gpus else "cpu")
        self._base = replace(base, precision=config.precision)
        self._shelf = Shelf(self._store.versions, self._load, config.versions)
        self._shadow: tuple[int, float] | None = None
        self._figures = ReplicaFigures()
        # One thread answers and one loads: a version's modules serve one thread at a time (models/clip.py).
        self._model, self._loader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2))
        self._answer.set_max_batch_size(config.batch)
        self._answer.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
        self._following: asyncio.Task[None] | None = None

    async def reconfigure(self, settings: dict[str, Any]) -> None:
        """Takes `version`, `shadow_version` and `shadow_share`; Serve calls this before the first request too.

        A version that cannot be loaded is no error here: the one that serves goes on, and /readyz says so.
        """
        self._shelf.pin(settings.get("version"))
        shadow = settings.get("shadow_version")
        self._shadow = None if shadow is None else (shadow, settings.get("shadow_share", 0.1))
        await self._refresh()
        self._shelf.current  # noqa: B018  (raises where nothing could be loaded at all)
        if self._following is None:
            self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_seconds)
            await self._refresh()

    async def _refresh(self) -> None:
        await _in(self._loader, self._shelf.refresh)
        self._figures.serves(self._shelf.current, self._shelf.fault is not None)

    def _load(self, version: int) -> Classifier:
        loaded = load_classifier(self._config.store, version, clip=self._base.twin(), cache=self._config.experts)
        warm(loaded)
        return loaded

    async def standing(self) -> Standing:
        """What serves here; the front asks every second."""
        fault = self._shelf.fault
        return Standing(
            serve.get_replica_context().replica_id.unique_id,
            self._shelf.current.version,
            self._shelf.newest,
            fault and fault.reason,
            self._shadow and self._shadow[0],
        )

    async def answer(self, asking: Asking, seconds: float) -> Reply:
        """Answers for encoded pictures, all by one version. seconds: after so long nobody waits for it."""
        begun, asked, names = time.monotonic(), asking.question, asking.names
        until = begun + seconds
        try:
            classifier = self._shelf.at_hand(asked.version)
            if classifier is None:
                assert asked.version is not None
                try:
                    classifier = await _in(self._loader, self._shelf.fetch, asked.version)
                except Exception as error:  # what is wrong with the store is the log's, not the client's
                    log.warning("version %s cannot be loaded: %s", asked.version, told(error))
                    return Reply(refused=f"version {asked.version} is not there, or cannot be loaded: see /v1/versions")
            classifier.label_space(asked.task, asked.labels)
            transform = classifier.clip.eval_transform
            most = int(self._config.megapixels * 1e6)
            decoding = [_in(self._decoders, pixels_of, body, transform, most) for body in asking.pictures]
            results = await asyncio.gather(*decoding, return_exceptions=True)
            for place, result in enumerate(results):
                if isinstance(result, ConduError):
                    return Reply(refused=f"picture {place + 1} ({names[place]}) {result}")
                if isinstance(result, BaseException):
                    raise result
        except ConduError as error:
            return Reply(refused=told(error))
        decoded = time.monotonic()
        self._figures.decoded(decoded - begun)
        timed = await asyncio.gather(
            *(self._answer(Asked(classifier, asked, pixels, until)) for pixels in results), return_exceptions=True
        )
        for one in timed:
            if isinstance(one, TooLate):
                return Reply(late=True)
            if isinstance(one, ConduError):
                return Reply(refused=told(one))
            if isinstance(one, BaseException):
                raise one
        self._score_in_the_shade(asked, results, timed)
        return Reply(
            tuple(one.answer.to_json(name, asked.top) for name, one in zip(names, timed, strict=True)),
            classifier.version,
            {
                "decode": 1000 * (decoded - begun),
                "wait": 1000 * max(one.waited for one in timed),
                "model": 1000 * max(one.took for one in timed),
            },
        )

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def _answer(self, batch: list[Asked]) -> list[Timed | Exception]:
        found = await _in(self._model, answer_batch, batch)
        self._figures.answered(found)
        return found

    def _score_in_the_shade(self, asked: Question, pixels: Sequence[Any], timed: Sequence[Timed]) -> None:
        """Lets the shadow version answer too, a share of the pictures and never two batches at once, and counts."""
        if self._shadow is None or asked.version is not None:
            return
        version, share = self._shadow
        chosen = [place for place in range(len(pixels)) if random.random() < share]
        if chosen and (self._shading is None or self._shading.done()):
            picked = [(pixels[place], timed[place]) for place in chosen]
            self._shading = asyncio.create_task(self._shade(version, asked, picked))

    _shading: asyncio.Task[None] | None = None

    async def _shade(self, version: int, asked: Question, picked: Sequence[tuple[Any, Timed]]) -> None:
        try:
            classifier = await _in(self._loader, self._shelf.fetch, version)
            until = time.monotonic() + self._config.timeout_seconds
            batch = [Asked(classifier, asked, pixels, until) for pixels, _ in picked]
            found = await _in(self._model, answer_batch, batch)
        except ConduError as error:
            log.warning("the shadow version cannot answer: %s", told(error))
            return
        for (_, served), shadow in zip(picked, found, strict=True):
            if isinstance(shadow, Exception):
                continue
            agrees = shadow.answer.label == served.answer.label
            self._figures.shadowed(agrees)
            if not agrees:
                log.info(
                    "the shadow version differs",
                    extra={
                        "served": {"version": served.answer.version, **asdict(served.answer.label)},
                        "shadow": {"version": version, **asdict(shadow.answer.label)},
                        "probabilities": [served.answer.probability, shadow.answer.probability],
                    },
                )


async def _in(pool: ThreadPoolExecutor, call: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
