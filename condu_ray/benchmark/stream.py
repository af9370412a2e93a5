"""A stream: which tasks in which order, and the settings that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from condu_ray.sources import resolve

Settings = Mapping[str, Any]
"""Dotted name -> value."""


@dataclass(frozen=True)
class Stream:
    """tasks: name -> source as `data.open_task` takes it, in the order learned.

    settings: of all tasks; a file and the environment stand above them. full, lora: task -> settings of its own, where
    all parameters are trained and where adapters are. classes: task -> class names, where they are known already.
    """

    tasks: Mapping[str, str]
    settings: Settings = field(default_factory=dict)
    full: Mapping[str, Settings] = field(default_factory=dict)
    lora: Mapping[str, Settings] = field(default_factory=dict)
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def reversed(self) -> Stream:
        """The same tasks, the last one first."""
        return replace(self, tasks={name: self.tasks[name] for name in reversed(list(self.tasks))})


def parse_stream(text: str) -> Stream:
    """Reads NAME=PATH,NAME=PATH,... Raises ConfigError for anything else, and for a name given twice."""
    return Stream(resolve({"tasks": text.split(",")})[0].tasks)
