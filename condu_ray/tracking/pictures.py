"""Pictures for people: the accuracy matrix, accuracy over versions, the votes for one picture, methods side by side.

Drawn without a display or any global state; the same input gives the same bytes. The suffix of the path chooses the
format (.png, .svg). Colours are those of cividis and of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condu_ray.tracking.matrix import AccuracyMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_GREY = "#6b6b6b"
_NUMBERS_UP_TO = 24  # tasks; beyond, numbers in the cells would not be readable
_LABELS_UP_TO = 40  # ticks on one axis
_NAME_LENGTH = 24


def draw_matrix(matrix: AccuracyMatrix, path: Path) -> None:
    """Draws the accuracy matrix as a heat map: a row per session, a column per task, own sessions framed."""
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    n = len(matrix.tasks)
    numbers = n <= _NUMBERS_UP_TO
    cell = 0.52 if numbers else max(0.09, 9.0 / n)
    figure = _figure(2.6 + n * max(cell, 0.5 if n < 6 else 0), 2.2 + n * cell)
    axes = figure.add_subplot()
    norm = Normalize(0, 100)
    axes.set_facecolor("#d9d9d9")
    drawn = axes.imshow(matrix.values, cmap="cividis", norm=norm, aspect="auto")
    if numbers:
        for row, values in enumerate(matrix.values):
            for column, value in enumerate(values):
                measured = not math.isnan(value)
                text = f"{value:.0f}" if measured else "–"
                colour = "white" if measured and value < 55 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        for own in range(n):
            axes.add_patch(Rectangle((own - 0.5, own - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.8))
    names = [_plain(task) for task in matrix.tasks]
    _ticks(axes, "x", names)
    _ticks(axes, "y", names)
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after the session of")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    means = {"Transfer": matrix.transfer(), "Average": matrix.average(), "Last": matrix.last()}
    axes.set_title("   ".join(f"{name} {_figure_text(value)}" for name, value in means.items()), fontsize=10)
    figure.colorbar(drawn, ax=axes, label="accuracy (%)", fraction=0.04, pad=0.02)
    _save(figure, path)


def draw_history(histories: Mapping[str, Sequence[tuple[int, float | None]]], path: Path) -> None:
    """Draws the accuracy of each task, in percent, over the versions; None or NaN: not measured, not drawn."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    lines = {
        task: [(version, value) for version, value in points if value is not None and not math.isnan(value)]
        for task, points in histories.items()
    }
    few = len(lines) <= len(COLOURS) - 1
    figure = _figure(7.6, 4.4)
    axes = figure.add_subplot()
    shades = colormaps["viridis"]
    by_version: dict[int, list[float]] = {}
    for index, (task, points) in enumerate(lines.items()):
        versions, accuracies = [version for version, _ in points], [value for _, value in points]
        for version, value in points:
            by_version.setdefault(version, []).append(value)
        if few:
            axes.plot(versions, accuracies, color=COLOURS[index], marker="o", markersize=4, label=_plain(task))
        else:
            axes.plot(versions, accuracies, color=shades(index / (len(lines) - 1)), linewidth=0.9, alpha=0.7)
    if few:
        if lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="task")
    else:
        means = sorted((version, math.fsum(values) / len(values)) for version, values in by_version.items())
        if means:  # merged weights are not measured
            axes.plot(*zip(*means, strict=True), color="black", linewidth=2.4, label="mean of the tasks measured")
            axes.legend(loc="lower left", frameon=True, framealpha=0.9)
        _order_bar(figure, axes, [_plain(task) for task in lines])
    axes.set_ylim(-2, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("version")
    axes.set_ylabel("accuracy (%)")
    _quiet(axes)
    _save(figure, path)


def draw_votes(answer: Mapping[str, Any], image: str | Path | Image, path: Path) -> None:
    """Draws a picture beside its answer: the most likely labels, and the weight and similarity of each vote.

    answer: one object of what `predict --json` prints. image: its file, or the picture itself, which is
    drawn as a model sees it. Raises DataError for a file that is no picture.
    """
    import numpy as np

    from condu_ray.data.picture import load_picture, to_rgb
    from condu_ray.data.task import Picture

    pixels = np.asarray(load_picture(Picture(str(image))) if isinstance(image, (str, Path)) else to_rgb(image))
    labels = [(_labelled(item["label"], item["task"]), item["probability"], "") for item in answer["labels"][:5]]
    votes = [
        (
            _voter(item["task"]),
            item["weight"],
            "" if item["similarity"] is None else f"similarity {item['similarity']:.2f}",
        )
        for item in answer["votes"]
    ]
    figure = _figure(9.0, max(2.8, 1.6 + 0.34 * (len(labels) + len(votes))))
    parts = figure.add_gridspec(2, 2, width_ratios=[1, 1.5], height_ratios=[max(len(labels), 1), max(len(votes), 1)])
    shown = figure.add_subplot(parts[:, 0])
    shown.imshow(pixels, interpolation="nearest" if max(pixels.shape[:2]) < 100 else "antialiased")
    shown.set_axis_off()
    surety = f"{100 * answer['probability']:.0f} %, version {answer['version']}"
    shown.set_title(f"{_labelled(answer['label'], answer['task'])}\n{surety}", fontsize=11)
    _bars(figure.add_subplot(parts[0, 1]), labels, "probability of the label", COLOURS[0])
    _bars(figure.add_subplot(parts[1, 1]), votes, "weight of the vote", COLOURS[1])
    _save(figure, path)


def draw_comparison(matrices: Mapping[str, AccuracyMatrix], path: Path) -> None:
    """Draws Transfer, Average and Last of several methods side by side, in percent."""
    means = ("Transfer", "Average", "Last")
    width = 0.82 / max(len(matrices), 1)
    figure = _figure(min(14.0, max(6.0, 2.2 + 1.35 * len(matrices))), 4.0)
    axes = figure.add_subplot()
    for index, (method, matrix) in enumerate(matrices.items()):
        for group, value in enumerate((matrix.transfer(), matrix.average(), matrix.last())):
            place = group - 0.41 + width * (index + 0.5)
            hatch = "//" if index >= len(COLOURS) else None
            label = _plain(method) if group == 0 else None
            colour = COLOURS[index % len(COLOURS)]
            axes.bar(place, value or 0.0, width * 0.92, color=colour, hatch=hatch, edgecolor="white", label=label)
            axes.text(place, (value or 0.0) + 1, _figure_text(value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(means)), means)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy (%)")
    axes.tick_params(axis="x", length=0)
    if matrices:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(matrices), 4), frameon=False)
    _quiet(axes)
    _save(figure, path)


def draw_parallel(trials: Sequence[tuple[Mapping[str, Any], float]], unit: str, path: Path) -> None:
    """Draws trials of a sweep as lines through an axis a setting, coloured by what they reached: (settings, value).

    unit: of the value, for its bar. Numbers lie by size (by magnitude where the largest is a hundred times the
    smallest), other values in a row.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = list(trials[0][0])
    figure = _figure(min(16.0, max(5.0, 2.4 + 1.5 * len(names))), 4.6)
    axes = figure.add_subplot()
    values = [value for _, value in trials]
    norm = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    scales = [_scale([settings[name] for settings, _ in trials]) for name in names]
    shades = colormaps["cividis"]
    for settings, value in sorted(trials, key=lambda trial: trial[1]):  # the best on top
        heights = [place(settings[name]) for name, (place, _) in zip(names, scales, strict=True)]
        axes.plot(
            range(len(names)), heights, color=shades(norm(value)), linewidth=1.1, alpha=0.75, marker="o", markersize=3
        )
    for column, (_, ticks) in enumerate(scales):
        axes.axvline(column, color=_GREY, linewidth=0.8, zorder=0)
        for height, text in ticks:
            axes.text(column + 0.03, height, text, fontsize=7, va="center", color="black")
    axes.set_xticks(range(len(names)), [_plain(name) for name in names], fontsize=9)
    axes.set_xlim(-0.15, len(names) - 0.6)
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(norm, shades), ax=axes, label=unit, fraction=0.04, pad=0.02)
    _save(figure, path)


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """(value -> height from 0 to 1, [(height, text)] of its ticks) of one axis."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        if high > low:
            by_size = low > 0 and high / low >= 100
            ends = (math.log(low), math.log(high)) if by_size else (low, high)
            place = lambda value: ((math.log(value) if by_size else value) - ends[0]) / (ends[1] - ends[0])  # noqa: E731
            return place, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    kinds = sorted({str(value) for value in values})
    heights = {kind: (row + 0.5) / len(kinds) for row, kind in enumerate(kinds)}
    return lambda value: heights[str(value)], [(height, _plain(kind)) for kind, height in heights.items()]


def draw_importance(importance: Mapping[str, float], unit: str, path: Path) -> None:
    """Draws how much of `unit` each setting of a sweep explains, the most on top; shares that sum to 1."""
    rows = [(_plain(name), share, "") for name, share in sorted(importance.items(), key=lambda pair: -pair[1])]
    figure = _figure(6.4, max(1.8, 1.0 + 0.36 * len(rows)))
    _bars(
        figure.add_subplot(), rows, f"importance for: {unit}" if rows else "no trial differs from another", COLOURS[0]
    )
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Writes the picture without its date or the version of the drawing library."""
    from matplotlib import rc_context

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "condu-ray"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font lacks
        figure.savefig(path, dpi=130, metadata=metadata)


def _plain(text: str) -> str:
    """A name as it is, shortened, with nothing taken for a formula."""
    short = text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "…"
    return short.replace("$", r"\$")


def _labelled(label: str, task: str | None) -> str:
    return _plain(label) if task is None else f"{_plain(label)} ({_plain(task)})"


def _voter(task: str | None) -> str:
    return "base model" if task is None else _plain(task)


def _figure_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _ticks(axes: Axes, side: str, names: Sequence[str]) -> None:
    """Names every tick while there is room, then every second, fifth, tenth ..."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, len(names)) if len(names) <= step * _LABELS_UP_TO)
    places = range(0, len(names), step)
    chosen = [names[place] for place in places]
    if side == "x":
        axes.set_xticks(places, chosen, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    else:
        axes.set_yticks(places, chosen, fontsize=8)


def _order_bar(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), "viridis"), ax=axes, pad=0.02, aspect=30)
    places = sorted({round(part * (len(names) - 1) / 8) for part in range(9)})
    bar.set_ticks(places, labels=[names[place] for place in places], fontsize=8)
    bar.set_label("task, in the order learned")


def _bars(axes: Axes, rows: Sequence[tuple[str, float, str]], title: str, colour: str) -> None:
    places = range(len(rows))
    values = [value for _, value, _ in rows]
    axes.barh(places, values, color=colour, height=0.66)
    for place, (_, value, note) in enumerate(rows):
        text = f"{value:.2f}" + (f"   {note}" if note else "")
        axes.text(value + 0.015, place, text, va="center", fontsize=8, color="black")
    axes.set_yticks(places, [name for name, _, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35)
    axes.set_xticks([])
    axes.set_title(title, fontsize=9, loc="left", color=_GREY)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _quiet(axes: Axes) -> None:
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
