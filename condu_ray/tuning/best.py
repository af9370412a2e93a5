"""What a sweep found, as a file that `learn --config` takes as it is, with where it comes from."""

from __future__ import annotations

from pathlib import Path

import yaml

from condu_ray import __version__
from condu_ray.tuning.objectives import UNITS
from condu_ray.tuning.records import Record
from condu_ray.tuning.settings import Sweep, best_session


def write_best(sweep: Sweep, record: Record, path: Path, source: str, trials: int) -> None:
    """Writes the configuration of a trial below comments that say how it was found. source: the sweep's file."""
    assert record.values is not None
    found = ", ".join(f"{UNITS[n]} {v:.2f}" for n, v in zip(sweep.goals.names, record.values, strict=True))
    if sweep.goals.too_slow(record.figures):
        slow = f"{record.figures['latency']:.3g} ms a picture, more than latency_ms {sweep.latency_ms:g}"
        found = f"{slow}, so that its accuracy does not count,"
    lines = [
        f"# Found by condu-ray sweep {source} (condu-ray {__version__}), for: condu-ray learn --config {path.name}",
        f"# trial {record.number} of {trials}: {found} on validation pictures, "
        f"{100 * sweep.validation_share:g} % of the training pictures, labels {sweep.asked}, seed {sweep.config.seed}",
        f"# searched: {', '.join(sweep.space)}, by {sweep.search}"
        + (f" and {sweep.early_stopping}" if sweep.stops_early else ""),
    ]
    session = best_session(sweep, record.settings)
    if "tracking" in sweep.session and "tracking" not in session:
        lines.append("# session.tracking names a password and is left out: give it by --tracking or CONDU_TRACKING")
    body = yaml.safe_dump(session, sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, body]), encoding="utf-8")
