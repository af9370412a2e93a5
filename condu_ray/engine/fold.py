"""Takes the flips of all sessions into the mask bits: a version that needs none of them, so that `gc` can drop them."""

from __future__ import annotations

from condu_ray.engine.keys import state_key
from condu_ray.methods.states import FusedState
from condu_ray.methods.stored import config_of, put_state, state_of, task_objects
from condu_ray.store import Manifest, Store
from condu_ray.store.history import commit_next


def fold(store: Store) -> Manifest | None:
    """Commits a version that answers as the newest one, bit for bit; None where there are no flips to take in."""
    return commit_next(store, lambda: _folded(store))


def _folded(store: Store) -> Manifest | None:
    newest = store.manifest()
    state = state_of(store, newest)
    if not isinstance(state, FusedState):
        return None
    folded = state.folded()
    if folded.fused is state.fused:
        return None
    key = state_key(newest, config_of(store.header), "", "fold")
    return newest.followed_by(
        "fold",
        "took the flips into the masks",
        objects={**task_objects(newest), **put_state(store, key, folded, newest)},
        state={**newest.state, "method": folded.meta()},
    )
