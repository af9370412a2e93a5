"""The two kinds of one-bit triggers behind one set of functions: masks as published, signs as ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion import signs, signs_stored
from condu_ray.fusion import state as masks
from condu_ray.fusion.forget import forget as forget_mask
from condu_ray.fusion.groups import Span
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.fusion.reconstruct import Fidelity, compare
from condu_ray.fusion.reconstruct import add_to as add_mask_to
from condu_ray.fusion.reconstruct import fidelity_at as mask_fidelity_at
from condu_ray.fusion.reconstruct import reconstruct as from_mask
from condu_ray.fusion.signs import SignState
from condu_ray.fusion.state import FusionState, Objects
from condu_ray.fusion.unify import Part as MaskPart
from condu_ray.fusion.unify import check as check_masks
from condu_ray.fusion.unify import fuse as fuse_masks
from condu_ray.fusion.unify import joined as joined_masks
from condu_ray.fusion.unify import unify as unify_masks

if TYPE_CHECKING:
    from condu_ray.catalogue import Triggers
    from condu_ray.config import Granularity

State = FusionState | SignState
Part = MaskPart | signs.Part


def empty(layout: Layout, granularity: Granularity, triggers: Triggers) -> State:
    """The state before the first task. Raises FusionError for a granularity that these triggers do not have."""
    return SignState.empty(layout, granularity) if triggers == "sign" else FusionState.empty(layout, granularity)


def unify(state: State, task: str, delta: Any) -> State:
    """The state after `task`; see `unify.unify` and `signs.unify`."""
    return signs.unify(state, task, delta) if isinstance(state, SignState) else unify_masks(state, task, delta)


def fuse(state: State, task: str, delta: Any, some: tuple[Span, ...]) -> Part:
    """One process's share of adding `task`; see `unify.fuse` and `signs.fuse`."""
    if isinstance(state, SignState):
        return signs.fuse(state, task, delta, some)
    return fuse_masks(state, task, delta, some)


def joined(state: State, task: str, parts: Sequence[Part]) -> State:
    """The state after `task` from all shares, in their order: the one that `unify` gives, bit for bit."""
    if isinstance(state, SignState):
        signs.check(state, task)
        return signs.joined(state, task, [part for part in parts if isinstance(part, signs.Part)])
    check_masks(state, task)
    return joined_masks(state, task, [part for part in parts if isinstance(part, MaskPart)])


def reconstruct(state: State, task: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The task's delta as the state holds it, f32[total]."""
    return signs.reconstruct(state, task, out) if isinstance(state, SignState) else from_mask(state, task, out)


def add_to(state: State, task: str, start: NDArray[np.float32]) -> None:
    """Adds the task's delta to f32[total] in place: θ⁰ becomes the task's expert."""
    (signs.add_to if isinstance(state, SignState) else add_mask_to)(state, task, start)  # type: ignore[arg-type]


def with_sizes(state: State, task: str, delta: Any) -> State:
    """The state in which some rows of the task have a second bit; see `signs.with_sizes`. Masks have none."""
    return signs.with_sizes(state, task, delta) if isinstance(state, SignState) else state


def with_rescalers(state: State, task: str, rescalers: Any) -> State:
    """The state with other rescalers for one task; see `signs.with_rescalers`. Raises FusionError for masks."""
    if not isinstance(state, SignState):
        raise FusionError("the rescalers of masks follow from the deltas' norms", "fuse with sign triggers")
    return signs.with_rescalers(state, task, rescalers)


def forget(state: State, task: str) -> State:
    """The state without `task`; every other reconstruction stays equal, bit for bit."""
    return signs.forget(state, task) if isinstance(state, SignState) else forget_mask(state, task)


def fold(state: State) -> State:
    """The same state, bit for bit, that needs no flips of earlier sessions; sign triggers have none."""
    return state if isinstance(state, SignState) else masks.fold(state)


def fidelity_at(state: State, task: str, coordinates: NDArray[np.int64], values: Any) -> Fidelity:
    """Estimate of the fidelity from the delta's values at some coordinates; a sign trigger loses no bit."""
    if not isinstance(state, SignState):
        return mask_fidelity_at(state, task, coordinates, values)
    kept = as_f32(values)
    if kept.shape != coordinates.shape or kept.ndim != 1:
        raise FusionError(f"task {task!r}: {list(kept.shape)} values for {list(coordinates.shape)} coordinates")
    return compare(kept, signs.values_at(state, task, coordinates), np.ones(kept.shape, np.bool_))


def meta(state: State) -> dict[str, Any]:
    """What is small in a state, as JSON."""
    return signs_stored.meta(state) if isinstance(state, SignState) else masks.meta(state)


def objects(state: State) -> Objects:
    """What a store has to hold: object name -> array name -> array."""
    return signs_stored.objects(state) if isinstance(state, SignState) else masks.objects(state)


def load(
    layout: Layout, granularity: Granularity, triggers: Triggers, objects: Mapping[str, Mapping[str, NDArray[Any]]]
) -> State:
    """The state that `objects` describes, equal to the bit."""
    if triggers == "sign":
        return signs_stored.load(layout, granularity, objects)
    return masks.load(layout, granularity, objects)
