"""What a sweep has done so far, in its folder, so that a driver that was killed finds all of it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from condu_ray.errors import StoreError
from condu_ray.store.documents import read, write
from condu_ray.tuning.space import Settings, configuration_key

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """What a trial has reached. budget: rung or version, from 1. values: of the objectives. steps: trained so far."""

    budget: int
    values: tuple[float, ...]
    figures: dict[str, float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Record:
    """One configuration. begun: how often its training was started; reason: why it failed."""

    number: int
    settings: Settings
    reports: tuple[Report, ...] = ()
    state: State = "running"
    reason: str | None = None
    begun: int = 0

    @property
    def values(self) -> tuple[float, ...] | None:
        """The objectives' values when the trial ended; None where it failed or has reported nothing."""
        return self.reports[-1].values if self.reports and self.state != "failed" else None

    @property
    def reached(self) -> tuple[int, float] | None:
        """What trials are ranked by, (budget, first objective): one that was stopped early was measured half trained,
        and counts as less than any that went further. None as for `values`."""
        return None if self.values is None else (self.reports[-1].budget, self.values[0])

    @property
    def figures(self) -> dict[str, float]:
        return self.reports[-1].figures if self.reports else {}

    @property
    def ended(self) -> bool:
        return self.state != "running"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Record:
        reports = tuple(Report(**{**each, "values": tuple(each["values"])}) for each in found["reports"])
        return cls(**{**found, "reports": reports})


def finished(records: Sequence[Record]) -> list[Record]:
    """The trials that ran to their end: what the others reached is no figure of a whole trial."""
    return [record for record in records if record.state == "finished" and record.values is not None]


class Trials:
    """The trials of a folder, by file; a trial writes its own while it runs, the driver how it ended."""

    def __init__(self, folder: Path) -> None:
        self._place = folder / "trials"

    def path(self, settings: Settings) -> Path:
        """The trial's file, named by its configuration; the folder of the same name without .json is its workplace."""
        return self._place / f"{hashlib.sha256(configuration_key(settings).encode()).hexdigest()[:24]}.json"

    def read(self, settings: Settings) -> Record | None:
        found = read(self.path(settings))
        return None if found is None else Record.from_json(found)

    def write(self, record: Record) -> None:
        write(self.path(record.settings), record.to_json())

    def end(self, settings: Settings, state: State, reason: str | None = None) -> Record | None:
        """Writes how a trial ended, unless that is known, and clears its workplace; None where it never began."""
        record = self.read(settings)
        if record is not None and not record.ended:
            record = replace(record, state=state, reason=reason)
            self.write(record)
        shutil.rmtree(self.path(settings).with_suffix(""), ignore_errors=True)
        return record

    def all(self) -> list[Record]:
        """In the order proposed."""
        found = [Record.from_json(read(path)) for path in sorted(self._place.glob("*.json"))]
        return sorted(found, key=lambda record: record.number)


class Scores:
    """Configurations that were scored again, one JSON object a line: there are thousands."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "scores.jsonl"

    def add(self, records: list[Record]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record.to_json()) + "\n" for record in records))

    def all(self) -> list[Record]:
        """In the order proposed: batches end in any order. A last line that was cut off by a kill is left out.

        Raises StoreError for any other damage.
        """
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8")
        whole, _, cut = text.rpartition("\n")
        if cut:
            self._path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        try:
            found = [Record.from_json(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self._path} is damaged ({error})", "remove it, and all is scored again") from error
        return sorted(found, key=lambda record: record.number)
