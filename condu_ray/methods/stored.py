"""What a system has in a store: the settings it was made with, the layout of its vector, and its state in a version.

Imports no model: a process that only adds up deltas needs none.
"""

from __future__ import annotations

import json

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods import registry
from condu_ray.methods.protocol import TaskState
from condu_ray.sources import from_dotted
from condu_ray.store import Manifest, ObjectRef, Store, StoreHeader

TASK_OBJECTS = ("prototypes-", "domain-", "buffers-", "tests-")
"""How objects of one task are called that every method has; all others are the method's own (`TaskState.objects`)."""


def config_of(header: StoreHeader) -> SessionConfig:
    """The settings that the store fixed when it was made; defaults elsewhere."""
    return from_dotted(header.settings)


def layout_of(header: StoreHeader) -> Layout:
    return Layout.from_json(json.dumps(header.layout))


def state_of(store: Store, manifest: Manifest) -> TaskState:
    """What the system keeps of its tasks in this version; its large arrays stay memory-mapped."""
    header = store.header
    objects = {name: store.get(ref) for name, ref in manifest.objects.items() if not name.startswith(TASK_OBJECTS)}
    return registry.get(header.method).load(layout_of(header), config_of(header), manifest.state["method"], objects)


def task_objects(manifest: Manifest | None) -> dict[str, ObjectRef]:
    """The objects of a version's tasks (`TASK_OBJECTS`) by name; none before the first version."""
    return {name: ref for name, ref in manifest.objects.items() if name.startswith(TASK_OBJECTS)} if manifest else {}


def put_state(store: Store, key: str, state: TaskState, parent: Manifest | None) -> dict[str, ObjectRef]:
    """Where the objects of a state are, by name.

    Those that `parent` names are there already: along one lineage of versions the same name always means the same
    bytes. The others are written under `key`. Raises StoreError if nothing could be written.
    """
    there = parent.objects if parent else {}
    return {
        name: there[name] if name in there else store.put(key, name, arrays) for name, arrays in state.objects().items()
    }
