"""A process that holds θ⁰ and versions, and answers in batches. It follows the store by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from condu_ray.config import ServeConfig
from condu_ray.errors import ConduError, ConfigError, DataError, NotFound, StoreError
from condu_ray.serving.answering import Asked, Timed, TooLate, answer_batch, pixels_of, warm
from condu_ray.serving.experts import RemoteVoters
from condu_ray.serving.figures import ReplicaFigures
from condu_ray.serving.messages import Asking, Reply, Standing
from condu_ray.serving.shelf import AGAIN_SECONDS, Shelf, sentence_of
from condu_ray.serving.threads import run_in
from condu_ray.sources import resolve_watched
from condu_ray.store import open_store
from condu_ray.store.base import differing
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.open import base_of, load_classifier

log = logging.getLogger("ray.serve")


class Replica:
    """Deployed by `app.application`. experts: processes that hold them; None: this one does.

    Raises ConduError at the start where no version can be loaded.
    """

    def __init__(self, config: ServeConfig, experts: DeploymentHandle | None = None) -> None:
        self._config, self._experts = config, experts
        self._store = open_store(config.store)
        base = base_of(self._store.header, "cuda" if config.gpus else "cpu")
        self._base = replace(base, precision=config.precision)
        self._shelf = Shelf(self._store.versions, self._load, config.versions)
        self._shadow: tuple[int, float] | None = None
        self._shadow_rests = 0.0  # until then, on the monotonic clock, since it could not be loaded
        self._misread: str | None = None
        self._figures = ReplicaFigures()
        # One thread answers and one loads: a version's modules serve one thread at a time (models/clip.py).
        self._model, self._loader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2))
        wait = config.batch_wait_ms / 1000
        self._answer = serve.batch(max_batch_size=config.batch, batch_wait_timeout_s=wait)(self._answer_together)
        # Serve makes a batch of what comes within the wait even while the model is busy, so under load batches would
        # stay as small as they began: pictures queue here, before it, until the model is free.
        self._free = asyncio.Event()
        self._free.set()
        self._following: asyncio.Task[None] | None = None
        self._shading: asyncio.Task[None] | None = None

    async def reconfigure(self, settings: dict[str, Any]) -> None:
        """Takes `version`, `shadow_version` and `shadow_share`; Serve calls this before the first request too.

        A version that cannot be loaded is no error here: the one that serves goes on, and /readyz says so. The same of
        settings that cannot be meant, once a version serves: an error would have Serve replace a replica that answers.
        """
        try:
            asked, self._misread = resolve_watched(settings), None
        except ConfigError as error:
            if self._following is None:
                raise
            log.error("user_config is not taken up: %s", error)
            self._misread = str(error)
            return
        self._shelf.pin(asked.version)
        self._shelf.hold(asked.shadow_version)
        self._shadow = None if asked.shadow_version is None else (asked.shadow_version, asked.shadow_share)
        self._shadow_rests = 0.0
        await self._refresh()
        self._shelf.current  # noqa: B018  (raises where nothing could be loaded at all)
        if self._following is None:
            self._following = asyncio.create_task(self._follow())

    async def check_health(self) -> None:
        """Serve asks before the first request too. Where `user_config` is null it has set nothing, so all is unset."""
        if self._following is None:
            await self.reconfigure({})

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_seconds)
            await self._refresh()

    async def _refresh(self) -> None:
        await run_in(self._loader, self._shelf.refresh)
        self._figures.serves(self._shelf.current, self._shelf.fault is not None)

    def _load(self, version: int) -> Classifier:
        if differing(open_store(self._config.store), self._store.header):
            raise StoreError(f"{self._store.url} is another store than when the server started", "start it again")
        loaded = load_classifier(self._config.store, version, clip=self._base.twin(), cache=self._config.experts)
        if self._experts is not None and loaded.experts and not loaded.cached.small(loaded.experts[0].name):
            remote = RemoteVoters(loaded.voters, self._experts, version, self._config.timeout_seconds)
            loaded = loaded.asking(voters=remote)
        warm(loaded)
        return loaded

    async def standing(self) -> Standing:
        """What serves here; the front asks every second."""
        fault = self._misread or (self._shelf.fault.reason if self._shelf.fault else None)
        return Standing(
            serve.get_replica_context().replica_id.unique_id,
            self._shelf.current.version,
            self._shelf.newest,
            fault,
            self._shadow[0] if self._shadow else None,
        )

    async def answer(self, asking: Asking, seconds: float) -> Reply:
        """Answers for encoded pictures, all by one version. seconds: after so long nobody waits for it."""
        try:
            return await self._reply(asking, time.monotonic() + seconds)
        except (DataError, NotFound) as error:
            return Reply(refused=sentence_of(error))
        except TooLate:
            return Reply(late=True)

    async def _reply(self, asking: Asking, until: float) -> Reply:
        begun, asked = time.monotonic(), asking.question
        classifier = await self._version(asked.version)
        classifier.label_space(asked.task, asked.labels)
        pictures = zip(asking.names, asking.pictures, strict=True)
        decoding = [run_in(self._decoders, self._pixels, place, *one) for place, one in enumerate(pictures, start=1)]
        batch = [Asked(classifier, asked, pixels, until) for pixels in await asyncio.gather(*decoding)]
        decoded = time.monotonic() - begun
        self._figures.decoded(decoded)
        timed: list[Timed] = await asyncio.gather(*map(self._timed, batch))
        self._score_in_the_shade(batch, timed)
        seconds = {"decode": decoded, "wait": max(one.waited for one in timed), "model": max(one.took for one in timed)}
        return Reply(
            tuple(one.answer.to_json(name, asked.top) for name, one in zip(asking.names, timed, strict=True)),
            classifier.version,
            {stage: round(1000 * each, 3) for stage, each in seconds.items()},
        )

    async def _version(self, version: int | None) -> Classifier:
        found = self._shelf.at_hand(version)
        if found is not None or version is None:
            return found or self._shelf.current
        try:
            return await run_in(self._loader, self._shelf.fetch, version)
        except Exception as error:  # what is wrong with the store is the log's, not the client's
            log.warning("version %s cannot be loaded: %s", version, sentence_of(error))
            raise NotFound(f"version {version} is not there, or cannot be loaded", "see /v1/versions") from None

    def _pixels(self, place: int, name: str, body: bytes) -> Tensor:
        try:
            return pixels_of(body, self._base.eval_transform, int(self._config.megapixels * 1e6))
        except DataError as error:
            raise DataError(f"picture {place} ({name}) {error.message}", error.mend) from None

    async def _timed(self, asked: Asked) -> Timed:
        await self._free.wait()
        found: Timed | Exception = await self._answer(asked)
        if isinstance(found, Exception):
            raise found
        return found

    async def _answer_together(self, batch: list[Asked]) -> list[Timed | Exception]:
        self._free.clear()
        try:
            found: list[Timed | Exception] = await run_in(self._model, answer_batch, batch)
        finally:
            self._free.set()
        self._figures.answered(found)
        return found

    def _score_in_the_shade(self, batch: Sequence[Asked], timed: Sequence[Timed]) -> None:
        """Lets the shadow version answer too, a share of the pictures and one request at a time, and counts."""
        if self._shadow is None or batch[0].question.version is not None or time.monotonic() < self._shadow_rests:
            return
        version, share = self._shadow
        picked = [pair for pair in zip(batch, timed, strict=True) if random.random() < share]
        if picked and (self._shading is None or self._shading.done()):
            self._shading = asyncio.create_task(self._shade(version, picked))

    async def _shade(self, version: int, picked: Sequence[tuple[Asked, Timed]]) -> None:
        try:
            classifier = await self._version(version)
            until = time.monotonic() + self._config.timeout_seconds
            batch = [replace(asked, classifier=classifier, until=until) for asked, _ in picked]
            found = await run_in(self._model, answer_batch, batch)
        except ConduError as error:
            log.warning("the shadow version cannot answer: %s", sentence_of(error))
            self._shadow_rests = time.monotonic() + AGAIN_SECONDS
            return
        for (_, served), shadow in zip(picked, found, strict=True):
            if not isinstance(shadow, Timed):  # it has no such task, say
                self._figures.shadowed("cannot")
                continue
            agrees = shadow.answer.label == served.answer.label
            self._figures.shadowed("agrees" if agrees else "differs")
            if not agrees:
                facts = {
                    "served": {"version": served.answer.version, **asdict(served.answer.label)},
                    "shadow": {"version": version, **asdict(shadow.answer.label)},
                    "probabilities": [served.answer.probability, shadow.answer.probability],
                }
                log.info("the shadow version differs", extra=facts)
