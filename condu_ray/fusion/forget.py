"""Dropping a task: its mask, rescalers and norms go, nothing else changes."""

from __future__ import annotations

from dataclasses import replace

from condu_ray.fusion.state import FusionState, needed_flips


def forget(state: FusionState, task: str) -> FusionState:
    """The state without `task`; the reconstruction of every other task stays equal, bit for bit.

    u stays too: values of it that no task uses any more are inert and give way in the next session. Raises FusionError
    for an unknown name.
    """
    gone = state.tasks[state.position(task)]
    tasks = tuple(other for other in state.tasks if other is not gone)
    flips = {uid: state.flips[uid] for uid in needed_flips(tasks, state.next_uid)}
    return replace(state, tasks=tasks, flips=flips, forgotten=tuple(sorted((*state.forgotten, gone.uid))))
