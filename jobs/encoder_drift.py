"""How far the image tower of a dmc or dmc-ot store drifted, session after session, and what calibrations recover.

    python jobs/encoder_drift.py STORE
    python jobs/encoder_drift.py STORE --version 3 --json

Every figure was taken in the session itself, on a tenth of its pictures that the maps were not fitted on. Residuals:
‖Z₂ - (A Z₁ + a)‖² / ‖Z₂ - Z₁‖², 1 where a calibration is no better than none. Shares of ‖Z₂ - Z₁‖²: explained by a
shift, by the best symmetric map further, by the best linear map further (rotation), and by neither. relative: of the
pictures' spread.
"""

from __future__ import annotations

import argparse
from typing import Any

from ending import job

from condu_ray.errors import ConfigError
from condu_ray.methods.remembered import Remembered
from condu_ray.methods.stored import state_of
from condu_ray.reports import emit, show_table
from condu_ray.store import open_store

SHARES = ("relative", "shift", "symmetric", "rotation", "rest")


def drifts(url: str, version: int | None) -> list[dict[str, Any]]:
    """One object a session after the first, in their order. Raises ConfigError for a store of another method."""
    store = open_store(url)
    manifest = store.manifest(version)
    memory = state_of(store, manifest).memory
    rows = []
    for card in manifest.tasks:
        if "encoder" not in memory.get(card.name, {}):
            raise ConfigError(f"{url} holds a store of {store.header.method}", "name one of dmc or dmc-ot")
        found = Remembered.from_arrays(memory[card.name]).session_drift
        if found is not None:
            rows.append(
                {
                    "task": card.name,
                    "calibration": found.mode,
                    "residuals": dict(found.drift.residuals),
                    **{name: getattr(found.drift, name) for name in SHARES},
                    "distance_before": found.distances[0],
                    "distance_after": found.distances[1],
                }
            )
    return rows


@job
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="of dmc or dmc-ot")
    parser.add_argument("--version", type=int, help="as it was then [default: the newest]")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(arguments)
    rows = drifts(given.store, given.version)
    if given.json:
        emit(rows)
        return
    modes = list(rows[0]["residuals"]) if rows else []
    show_table(
        "drift of the image tower by session; residuals by calibration",
        ["task", "calibration", *modes, *SHARES],
        [
            [row["task"], row["calibration"]]
            + [f"{value:.3f}" for value in (*row["residuals"].values(), *(row[name] for name in SHARES))]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
