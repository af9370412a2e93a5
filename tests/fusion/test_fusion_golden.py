"""Eight sessions on 4,096 parameters, against what the rule gives and what the authors' released code gave.

golden_sessions.npz: the deltas; by granularity (`l1`, `tensor_mean`) and session the sha256 of u (f32[4096]), masks
(uint8[tasks, 512]), birth and flips (uint8[512]), least significant bit first and without padding; all rescalers; sums
of |reconstruction|; u at every 64th parameter. `rule`: float64 election and sums. `released`: the authors' code,
github.com/zhangzicong518/ConDU, commit 7fd32cf, `unify_delta_models` in float32, with the NaN rescaler of its all-zero
delta (session 4) replaced by 1.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from condu_ray.config import Granularity
from condu_ray.fusion import reference
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import FusionState
from condu_ray.fusion.unify import unify

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")

SESSIONS = range(8)


class Golden:
    """The deltas laid out either as eight padded tensors or as one."""

    def __init__(self, granularity: Granularity, tensors: int) -> None:
        with np.load(Path(__file__).with_name("golden_sessions.npz"), allow_pickle=False) as file:
            self.arrays = dict(file)
        self.granularity = granularity
        shapes: dict[str, tuple[int, ...]] = {"all": (4096,)}
        if tensors == 8:
            named = (text.split(":") for text in self.arrays["shapes"].tolist())
            shapes = {name: tuple(int(length) for length in shape.split("x")) for name, shape in named}
        self.layout = Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        self.deltas = [self._spread(delta) for delta in self.arrays["deltas"]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self.arrays[f"{self.granularity}_{name}"]
        return found

    def _spread(self, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        ends = np.cumsum([entry.size for entry in self.layout.entries])
        parts = np.split(delta, ends[:-1])
        return self.layout.flatten(
            {e.name: p.reshape(e.shape) for e, p in zip(self.layout.entries, parts, strict=True)}
        )

    def join(self, vector: NDArray[Any]) -> NDArray[Any]:
        """Without padding."""
        return np.concatenate([vector[entry.offset : entry.stop] for entry in self.layout.entries])

    def plane(self, bits: NDArray[Any]) -> NDArray[np.uint8]:
        return np.packbits(self.join(bits), bitorder="little")


@pytest.fixture(params=[("l1", 1), ("l1", 8), ("tensor_mean", 8)], ids=lambda p: f"{p[0]}-{p[1]}")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(*request.param)


@pytest.fixture
def states(golden: Golden) -> list[FusionState]:
    found = [FusionState.empty(golden.layout, golden.granularity)]
    for session in SESSIONS:
        found.append(unify(found[-1], f"t{session}", golden.deltas[session]))
    return found[1:]


def sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_u_is_the_rule_bit_for_bit(golden: Golden, states: list[FusionState]) -> None:
    for session, state in enumerate(states):
        u = golden.join(state.u)
        assert np.array_equal(u[golden.arrays["spots"]], golden["u_spots"][session])
        assert sha256(u) == golden["u_sha256"][session].tobytes().hex()


def test_masks_births_and_flips_are_the_rule_bit_for_bit(golden: Golden, states: list[FusionState]) -> None:
    for session, state in enumerate(states):
        masks = np.array([golden.plane(state.mask(name)) for name in state.names])
        birth = golden.plane(np.unpackbits(state.tasks[-1].birth, bitorder="little"))
        assert sha256(masks) == golden["masks_sha256"][session].tobytes().hex()
        assert sha256(birth) == golden["birth_sha256"][session].tobytes().hex()
        if session:
            flips = golden.plane(np.unpackbits(state.flips[session], bitorder="little"))
            assert sha256(flips) == golden["flips_sha256"][session].tobytes().hex()


def test_rescalers_and_reconstructions_are_the_rule(golden: Golden, states: list[FusionState]) -> None:
    for session, state in enumerate(states):
        rescalers = [task.rescalers[0] for task in state.tasks]
        assert np.array_equal(rescalers, golden["rule_lambda"][session, : session + 1])
        for position, name in enumerate(state.names):
            mass = np.abs(golden.join(reconstruct(state, name)).astype(np.float64)).sum()
            np.testing.assert_allclose(mass, golden["rule_recon_l1"][session, position], rtol=1e-12)


def test_the_released_code_agrees_up_to_its_rounding(golden: Golden, states: list[FusionState]) -> None:
    for session, state in enumerate(states):
        u = golden.join(state.u)[golden.arrays["spots"]]
        np.testing.assert_allclose(u, golden["released_u_spots"][session], rtol=2e-6)
        for position, task in enumerate(state.tasks):
            np.testing.assert_allclose(task.rescalers[0], golden["released_lambda"][session, position], rtol=2e-6)
            restored = reconstruct(state, task.name).astype(np.float64)
            for figure, sums in {"l1": np.abs(restored), "sumsq": np.square(restored)}.items():
                expected = golden[f"released_recon_{figure}"][session, position]
                np.testing.assert_allclose(sums.sum(), expected, rtol=5e-6)


@pytest.mark.parametrize(("mode", "expected"), [("original", "rule_lambda"), ("carried", "rule_lambda_carried")])
def test_the_dense_formula_gives_the_same(golden: Golden, mode: reference.Mode, expected: str) -> None:
    for session, state in enumerate(reference.sessions(golden.layout, golden.granularity, golden.deltas, mode)):
        np.testing.assert_allclose(state.rescalers[:, 0], golden[expected][session, : session + 1], rtol=1.2e-7)
        if mode == "original":
            assert sha256(golden.join(state.u)) == golden["u_sha256"][session].tobytes().hex()
