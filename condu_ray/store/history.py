"""The next version beside other writers, rollback to an earlier one, how two differ: manifests only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from condu_ray.errors import NotFound, StoreError, VersionTaken
from condu_ray.sources import flatten
from condu_ray.store.base import Store
from condu_ray.store.manifest import Manifest

_M = TypeVar("_M", Manifest, Manifest | None)


def newest(store: Store) -> Manifest | None:
    """The newest version's manifest, None in a store without versions."""
    return store.manifest() if store.versions() else None


def readable(store: Store) -> tuple[list[Manifest], dict[int, StoreError]]:
    """The manifests that can be read, oldest first; what is wrong with each of the others."""
    manifests, faults = list[Manifest](), dict[int, StoreError]()
    for version in store.versions():
        try:
            manifests.append(store.manifest(version))
        except NotFound:  # a gc has removed it in this moment
            continue
        except StoreError as error:
            faults[version] = error
    return manifests, faults


def commit_next(store: Store, make: Callable[[], _M]) -> _M:
    """Commits the version that `make` makes of the newest one; made again where another writer was faster.

    None is not committed: there is nothing to do.
    """
    while True:
        made = make()
        if made is None:
            return made
        try:
            store.commit(made)
        except VersionTaken:
            continue
        return made


def rollback(store: Store, version: int) -> Manifest:
    """Commits a new version that points to the objects of `version`; that one and all between stay.

    Raises NotFound for a version that is not there.
    """

    def back() -> Manifest:
        target = store.manifest(version)
        last = store.versions()[-1]  # its manifest may be what is damaged
        return Manifest(
            version=last + 1,
            parent=last,
            kind="rollback",
            tasks=target.tasks,
            objects=target.objects,
            state=target.state,
            settings=target.settings,
            figures=target.figures,
            message=f"rolled back to version {version}",
        )

    return commit_next(store, back)


def difference(store: Store, before: int, after: int) -> dict[str, Any]:
    """What changed between versions: tasks learned and gone, figures and settings that differ, bytes added."""
    old, new = store.manifest(before), store.manifest(after)
    old_tasks = {card.name: card for card in old.tasks}
    new_tasks = {card.name: card for card in new.tasks}
    known = {ref.path for ref in old.objects.values()}
    settings = flatten(old.settings), flatten(new.settings)
    return {
        "from": before,
        "to": after,
        "learned": [name for name in new_tasks if name not in old_tasks],
        "gone": [name for name in old_tasks if name not in new_tasks],
        "figures": {
            name: {
                figure: [old_tasks[name].figures.get(figure), value]
                for figure, value in card.figures.items()
                if old_tasks[name].figures.get(figure) != value
            }
            for name, card in new_tasks.items()
            if name in old_tasks
        },
        "settings": {
            name: [settings[0].get(name), settings[1].get(name)]
            for name in sorted({*settings[0], *settings[1]})
            if settings[0].get(name) != settings[1].get(name)
        },
        "new_bytes": sum({ref.path: ref.bytes for ref in new.objects.values() if ref.path not in known}.values()),
    }
