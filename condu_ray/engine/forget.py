"""Forgets a task: its trigger, prototypes and name leave the newest version; every other task stays bit for bit."""

from __future__ import annotations

from condu_ray.config import VoteConfig
from condu_ray.engine.keys import forgotten, state_key
from condu_ray.errors import NotFound, nearest
from condu_ray.methods.stored import TASK_OBJECTS, config_of, state_of
from condu_ray.store import Manifest, Store
from condu_ray.store.history import commit_next
from condu_ray.voting.open import task_experts
from condu_ray.voting.router import calibrated


def forget(store: Store, name: str) -> Manifest:
    """Commits a version without the task. Raises NotFound for an unknown one.

    Versions before it keep the task; `gc` removes its bytes once those are gone.
    """
    return commit_next(store, lambda: _without(store, name))


def _without(store: Store, name: str) -> Manifest:
    newest = store.manifest()
    gone = newest.task(name)
    if gone is None:
        raise NotFound(
            f"no task {name} in version {newest.version}", nearest(name, [card.name for card in newest.tasks])
        )
    config = config_of(store.header)
    state = state_of(store, newest).forget(name)
    key = state_key(newest, config, name, "forget")
    fused = {
        each: newest.objects[each] if each in newest.objects else store.put(key, each, arrays)
        for each, arrays in state.objects().items()
    }
    theirs = tuple(f"{kind}{gone.uid}" for kind in TASK_OBJECTS)
    by_task = {
        each: ref for each, ref in newest.objects.items() if each.startswith(TASK_OBJECTS) and each not in theirs
    }
    draft = newest.model_copy(
        update={
            "version": newest.version + 1,
            "parent": newest.version,
            "kind": "forget",
            "tasks": [card for card in newest.tasks if card.name != name],
            "objects": {**by_task, **fused},
            "message": f"forgot {name}",
            "seconds": {},
        }
    )
    pictured = all(card.classes for card in draft.tasks)  # merged weights come without pictures, and nothing routes
    routing = {}
    if pictured:
        routing = calibrated(task_experts(store, draft), VoteConfig(**newest.settings["vote"])).to_state()
    accuracy = {task: value for task, value in newest.figures.get("accuracy", {}).items() if task != name}
    return Manifest.model_validate(
        draft.model_dump(exclude={"created"})
        | {
            "state": {
                **newest.state,
                "method": state.meta(),
                "trained": forgotten(newest.state["trained"], name),
                **routing,
            },
            "figures": {"accuracy": accuracy},
        }
    )
