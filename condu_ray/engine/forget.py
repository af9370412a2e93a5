"""Forgets a task: its trigger, prototypes and name leave the newest version; every other task stays bit for bit."""

from __future__ import annotations

from condu_ray.config import VoteConfig
from condu_ray.engine.keys import forgotten, state_key
from condu_ray.methods.stored import TASK_OBJECTS, config_of, put_state, state_of, task_objects
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
    gone, config = newest.card(name), config_of(store.header)
    state = state_of(store, newest).forget(name)
    key = state_key(newest, config, name, "forget")
    theirs = tuple(f"{kind}{gone.uid}" for kind in TASK_OBJECTS)
    kept = {each: ref for each, ref in task_objects(newest).items() if each not in theirs}
    draft = newest.followed_by(
        "forget",
        f"forgot {name}",
        tasks=[card for card in newest.tasks if card.name != name],
        objects={**kept, **put_state(store, key, state, newest)},
    )
    pictured = all(card.classes for card in draft.tasks)  # merged weights come without pictures, and nothing routes
    routing = {}
    if pictured:
        routing = calibrated(task_experts(store, draft), VoteConfig(**newest.settings["vote"])).to_state()
    trained = forgotten(newest.state["trained"], name)
    accuracy = {task: value for task, value in newest.figures.get("accuracy", {}).items() if task != name}
    return draft.model_copy(
        update={
            "state": {**newest.state, "method": state.meta(), "trained": trained, **routing},
            "figures": {"accuracy": accuracy},
        }
    )
