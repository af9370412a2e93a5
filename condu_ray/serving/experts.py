"""Experts as large as models, spread over processes: each holds some, and Serve asks one that has the expert loaded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from condu_ray.config import ServeConfig
from condu_ray.engine.replies import GONE, TRIES
from condu_ray.serving.answering import TooLate
from condu_ray.serving.threads import run_in
from condu_ray.store import open_store
from condu_ray.voting.labels import Block
from condu_ray.voting.open import base_of, expert_maker
from condu_ray.voting.voters import Asked, ExpertCache, LocalVoters, Voters


def expert_replica(most: int) -> type:
    """The class of a process that holds at most `most` experts; Serve wants the number with the class."""

    class ExpertReplica:
        """Deployed by `app.application`. A model is an expert of a version; its id is VERSION/TASK."""

        def __init__(self, config: ServeConfig) -> None:
            self._store = open_store(config.store)
            base = base_of(self._store.header, "cuda" if config.gpus else "cpu")
            self._base = replace(base, precision=config.precision)
            self._thread = ThreadPoolExecutor(1)

        @serve.multiplexed(max_num_models_per_replica=most)
        async def _expert(self, model: str) -> LocalVoters:
            return await run_in(self._thread, self._load, model)

        def _load(self, model: str) -> LocalVoters:
            version, _, task = model.partition("/")
            clip = self._base.twin()
            voters = LocalVoters(clip, ExpertCache(expert_maker(self._store, int(version), clip), 1))
            voters.experts(task)
            return voters

        async def logits(self, pixels: NDArray[np.float32], blocks: tuple[Block, ...]) -> list[NDArray[np.float32]]:
            """Pictures f32[B, 3, H, W] -> logits f32[B, labels] for each block, by the expert that the call names."""
            model = serve.get_multiplexed_model_id()
            asked = Asked(model.partition("/")[2], tuple(range(len(pixels))), blocks)
            voters: LocalVoters = await self._expert(model)
            (found,) = await run_in(self._thread, voters.logits, torch.tensor(pixels), None, [asked])
            return found

    return ExpertReplica


class RemoteVoters:
    """`Voters` of one version: θ⁰ here, each expert wherever it is loaded, all at once."""

    def __init__(self, here: Voters, experts: DeploymentHandle, version: int, seconds: float) -> None:
        self._here, self._experts, self._version, self._seconds = here, experts, version, seconds

    def logits(self, pixels: Tensor, base: Tensor | None, asked: Sequence[Asked]) -> list[list[NDArray[np.float32]]]:
        responses = {place: self._ask(pixels, one) for place, one in enumerate(asked) if one.voter is not None}
        own = [one for one in asked if one.voter is None]
        found: dict[int, Any] = dict(
            zip(
                (place for place, one in enumerate(asked) if one.voter is None),
                self._here.logits(pixels, base, own),
                strict=True,
            )
        )
        for place, response in responses.items():
            found[place] = self._result(response, pixels, asked[place])
        return [found[place] for place in range(len(asked))]

    def _ask(self, pixels: Tensor, one: Asked) -> Any:
        handle = self._experts.options(multiplexed_model_id=f"{self._version}/{one.voter}")
        return handle.logits.remote(pixels[list(one.pictures)].numpy(), one.blocks)

    def _result(self, response: Any, pixels: Tensor, one: Asked) -> Any:
        for _ in range(TRIES):
            try:
                return response.result(timeout_s=self._seconds)
            except GONE:  # the answer changes nothing: another process gives it
                response = self._ask(pixels, one)
            except TimeoutError:
                break
        raise TooLate
