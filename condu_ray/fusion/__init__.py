"""ConDU's algebra on NumPy arrays: many deltas in one vector, a trigger of one bit a parameter for each task.

    from condu_ray.fusion.layout import Layout
    from condu_ray.fusion.reconstruct import reconstruct
    from condu_ray.fusion.state import FusionState
    from condu_ray.fusion.unify import unify

    layout = Layout.of(first)                                   # first: {name: tensor}
    state = FusionState.empty(layout, "row")
    state = unify(state, "birds", layout.flatten(first))
    state = unify(state, "cars", layout.flatten(second))
    expert_delta = layout.views(reconstruct(state, "birds"))    # {name: f32 array}

Nothing here reads files, starts processes or knows models.
"""
