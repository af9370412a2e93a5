"""The Serve application: `serve run condu_ray.serving.app:app store=./condu-store`, or from a Serve config file.

Settings are those of `config.ServeConfig`; the environment (CONDU_SERVE__TOKEN) fills what is not given.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from condu_ray.config import WATCHED, ServeConfig
from condu_ray.engine.replies import GONE, TRIES
from condu_ray.errors import ConfigError
from condu_ray.serving.api import build
from condu_ray.serving.experts import expert_replica
from condu_ray.serving.figures import FrontFigures
from condu_ray.serving.messages import Asking, Reply, Standing
from condu_ray.serving.problems import Problem
from condu_ray.serving.replica import Replica
from condu_ray.sources import resolve_serving
from condu_ray.store import open_store

STANDING_SECONDS = 1.0
GONE_SECONDS = 10.0  # a replica that was not heard of for so long is gone


def app(settings: dict[str, Any]) -> serve.Application:
    """What `serve run` and Serve config files build. Raises ConfigError for settings that are wrong."""
    return application(resolve_serving(settings))


def application(config: ServeConfig) -> serve.Application:
    """Fronts that speak HTTP, and replicas that answer."""
    if config.token is None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ConfigError(
            "Ray Serve's HAProxy listens on all addresses, and no token is set",
            "set CONDU_SERVE__TOKEN, or unset RAY_SERVE_ENABLE_HA_PROXY",
        )
    settings = config.model_dump(include=set(WATCHED))
    config = config.model_copy(update=ServeConfig().model_dump(include=set(WATCHED)))
    logs = LoggingConfig(encoding="JSON", enable_access_log=False)  # the front logs requests itself, with more
    processes = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    experts = (
        serve.deployment(
            expert_replica(config.experts),
            name="Experts",
            num_replicas=config.expert_replicas,
            max_ongoing_requests=64,
            ray_actor_options=processes,
            logging_config=logs,
        ).bind(config)
        if config.expert_replicas
        else None
    )
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=config.replicas,
        max_ongoing_requests=2 * config.queue + 8,  # the fronts' queues are the limit
        user_config=settings,
        ray_actor_options=processes,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.timeout_seconds,
        logging_config=logs,
    ).bind(config, experts)

    def front() -> FastAPI:  # made in the front's process, where there is a handle
        backend = Handle(serve.get_deployment_handle("Replica"), config.timeout_seconds)
        return build(config, open_store(config.store), backend, FrontFigures().request, backend.lifespan)

    return (
        serve.deployment(serve.ingress(front)())
        .options(
            name="Front",
            num_replicas=config.fronts,
            max_ongoing_requests=2 * config.queue + 64,
            ray_actor_options={"num_cpus": 0},
            graceful_shutdown_timeout_s=config.timeout_seconds,
            logging_config=logs,
        )
        .bind(replicas)
    )


class Handle:
    """The replicas, as the front sees them."""

    def __init__(self, handle: DeploymentHandle, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds
        self._standings: dict[str, tuple[float, Standing]] = {}

    async def answer(self, asking: Asking) -> Reply:
        """Raises Problem where no replica can answer."""
        for _ in range(TRIES):  # an answer changes nothing, so a request whose replica died is asked again
            try:
                reply: Reply = await self._handle.answer.remote(asking, self._seconds)
                return reply
            except (*GONE, DeploymentUnavailableError):
                continue
            except BackPressureError:
                raise Problem(429, "too many requests are being answered already", busy=True) from None
        raise Problem(503, "the replica that was asked is gone", busy=True)

    def standings(self) -> Sequence[Standing]:
        """What each replica said last."""
        oldest = time.monotonic() - GONE_SECONDS
        self._standings = {name: pair for name, pair in self._standings.items() if pair[0] > oldest}
        return [standing for _, standing in self._standings.values()]

    @asynccontextmanager
    async def lifespan(self, api: FastAPI) -> AsyncIterator[None]:
        """Asks the replicas for their standing as long as the front runs."""
        asking = asyncio.create_task(self._follow())
        yield
        asking.cancel()

    async def _follow(self) -> None:
        while True:
            with suppress(Exception):  # told by /readyz once it is not heard of any more; the next may be well
                standing: Standing = await self._handle.standing.remote()
                self._standings[standing.replica] = (time.monotonic(), standing)
            await asyncio.sleep(STANDING_SECONDS / max(1, len(self.standings())))
