"""ConDU's algebra on NumPy arrays: many deltas in one vector, a trigger of one bit a parameter for each task.

    from condu_ray.fusion import FusionState, Layout, reconstruct, unify

    layout = Layout.of(first)                                   # first: {name: tensor}
    state = FusionState.empty(layout, "row")
    state = unify(state, "birds", layout.flatten(first))
    state = unify(state, "cars", layout.flatten(second))
    expert_delta = layout.views(reconstruct(state, "birds"))    # {name: f32 array}

Nothing here reads files, starts processes or knows models. Sign triggers have the same functions, in `signs`.
"""

from condu_ray.fusion.at_once import unify_at_once
from condu_ray.fusion.forget import forget
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import Fidelity, add_to, fidelity, reconstruct
from condu_ray.fusion.signs import SignState
from condu_ray.fusion.state import FusionState, fold, load, objects
from condu_ray.fusion.unify import EmptyTrigger, unify

__all__ = [
    "EmptyTrigger",
    "Fidelity",
    "FusionState",
    "Layout",
    "SignState",
    "add_to",
    "fidelity",
    "fold",
    "forget",
    "load",
    "objects",
    "reconstruct",
    "unify",
    "unify_at_once",
]
