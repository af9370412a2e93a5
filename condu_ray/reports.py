"""What commands print: tables for people, one JSON document for programs (`--json`)."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from condu_ray.data import Skipped
    from condu_ray.store import GcReport, Manifest, StoreHeader

SKIPPED_SHOWN = 5
CLASSES_SHOWN = 8
PIPE_WIDTH = 200
_AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # names may hold [brackets]


def emit(document: Any) -> None:
    """Prints JSON on standard output; where that is not UTF-8 (an old locale), in ASCII, or it would be no JSON."""
    coding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    print(json.dumps(document, indent=1, ensure_ascii=coding not in ("utf-8", "utf8"), allow_nan=False))


def warn(text: str) -> None:
    """Says on standard error what went another way than one may think."""
    print(f"warning: {text}", file=sys.stderr)


def say(text: str = "") -> None:
    """Prints a line for people, as it is."""
    Console(**_AS_IT_IS, soft_wrap=True).print(text)


def show_skipped(pictures: Sequence[Skipped]) -> None:
    """Says on standard error which files of folders were left out; of many the first."""
    for one in pictures[:SKIPPED_SHOWN]:
        print(f"skipped {one.path}: {one.reason}", file=sys.stderr)
    if len(pictures) > SKIPPED_SHOWN:
        print(f"skipped {len(pictures) - SKIPPED_SHOWN} more", file=sys.stderr)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; numbers to the right, None as a dash. Nothing is cut off: long texts go on in the next line."""
    table = Table(title=title, title_justify="left", header_style="bold")
    rows = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_text(value) for value in row))
    console = Console(**_AS_IT_IS)
    if not console.is_terminal:
        console = Console(**_AS_IT_IS, width=PIPE_WIDTH)
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def megabytes(count: float) -> str:
    """Bytes as MB with one digit."""
    return f"{count / 1e6:.1f} MB"


def task_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """One object a task of a version."""
    return [
        {
            "name": card.name,
            "classes": card.classes,
            "learned_in": card.learned_in,
            "method": card.method,
            "source": card.source,
            "pictures": card.pictures,
            "figures": card.figures,
        }
        for card in manifest.tasks
    ]


def show_tasks(manifest: Manifest) -> None:
    """The table of a version: what each task was, is, and how much of its own fine-tuning is left."""
    show_table(
        f"version {manifest.version}: accuracy in percent on each task's test pictures",
        ("task", "classes", "zero-shot", "before", "alone", "now", "kept %", "L2 error", "cosine", "alive"),
        [
            (
                card.name,
                len(card.classes),
                card.figures.get("zero_shot"),
                card.figures.get("before"),
                card.figures.get("own"),
                card.figures.get("expert"),
                card.figures.get("gain_kept"),
                _two(card.figures.get("relative_l2")),
                _two(card.figures.get("cosine")),
                _two(card.figures.get("bits_alive")),
            )
            for card in manifest.tasks
        ],
    )
    say(
        "zero-shot: the base model. before: the vote of the version before it was learned (zero-shot kept).\n"
        "alone: fine-tuned for this task only. now: its expert. kept: of what fine-tuning alone gains.\n"
        "L2 error, cosine: the expert's delta against the one trained (fidelity). alive: share of its bits left."
    )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def version_rows(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One object a version, oldest first."""
    return [
        {
            "version": each.version,
            "kind": each.kind,
            "parent": each.parent,
            "tasks": [card.name for card in each.tasks],
            "message": each.message,
            "created": each.created,
            "bytes": sum({ref.path: ref.bytes for ref in each.objects.values()}.values()),
        }
        for each in manifests
    ]


def show_versions(manifests: Sequence[Manifest]) -> None:
    show_table(
        "versions",
        ("version", "what", "tasks", "size", "created"),
        [
            (r["version"], r["message"], len(r["tasks"]), megabytes(r["bytes"]), r["created"])
            for r in version_rows(manifests)
        ],
    )


def show_version(manifest: Manifest, header: StoreHeader) -> None:
    say(f"version {manifest.version} ({manifest.message}), {manifest.created}")
    say(f"method {header.method}, base model {header.model['name']} ({header.model_sha256[:12]})")
    show_tasks(manifest)
    rows = {ref.path: (name, ref.path, megabytes(ref.bytes), ref.sha256[:12]) for name, ref in manifest.objects.items()}
    show_table("objects", ("name", "path", "size", "sha256"), rows.values())
    if manifest.seconds:
        say("seconds: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in manifest.seconds.items()))


def show_difference(found: dict[str, Any]) -> None:
    say(f"version {found['from']} -> {found['to']}, {megabytes(found['new_bytes'])} new")
    say("learned: " + (", ".join(found["learned"]) or "nothing") + "; gone: " + (", ".join(found["gone"]) or "nothing"))
    changes = [
        (task, figure, before, after)
        for task, figures in found["figures"].items()
        for figure, (before, after) in figures.items()
    ]
    if changes:
        show_table("figures that changed", ("task", "figure", "before", "after"), changes)
    if found["settings"]:
        show_table(
            "settings that changed",
            ("setting", "before", "after"),
            [(n, str(a), str(b)) for n, (a, b) in found["settings"].items()],
        )


def show_answers(answers: Sequence[dict[str, Any]]) -> None:
    versions = " and ".join(map(str, sorted({each["version"] for each in answers})))  # a server may take up a newer one
    show_table(
        f"answers by version {versions}, label space {answers[0]['label_space']}" if answers else "no pictures",
        ("image", "label", "task", "probability", "votes"),
        [
            (
                each["image"],
                each["label"],
                each["task"],
                f"{each['probability']:.3f}",
                ", ".join(f"{vote['task'] or 'base'} {vote['weight']:.2f}" for vote in each["votes"]),
            )
            for each in answers
        ],
    )


def show_data(found: Sequence[dict[str, Any]]) -> None:
    """What was found in the data of each task."""
    for each in found:
        train, test = each["train"], each["test"]
        width, height = each["width"], each["height"]
        say(
            f"{each['name']}: {len(each['classes'])} classes, {train['pictures']} pictures to train on "
            f"({train['least_per_class']} to {train['most_per_class']} a class), {test['pictures']} to test on"
            f"{' (split made here)' if each['split_made'] else ''}, {width['min']}x{height['min']} to "
            f"{width['max']}x{height['max']} px"
        )
        more = ", ..." if len(each["classes"]) > CLASSES_SHOWN else ""
        say(f"  classes: {', '.join(each['classes'][:CLASSES_SHOWN])}{more}")
        for skipped in each["skipped"][:SKIPPED_SHOWN]:
            say(f"  skipped {skipped['path']}: {skipped['reason']}")
        if len(each["skipped"]) > SKIPPED_SHOWN:
            say(f"  and {len(each['skipped']) - SKIPPED_SHOWN} more skipped")
        if each["leaked"]:
            say(f"  warning: {each['leaked']} test pictures are also among those to train on")


def show_plan(plan: dict[str, Any]) -> None:
    say(f"store {plan['store']} ({'exists' if plan['store_exists'] else 'will be made'})")
    show_table(
        "plan",
        ("task", "action", "steps", "learning rate"),
        [(t["name"], t["action"], t["steps"], f"{t['learning_rate']:g}") for t in plan["tasks"]],
    )
    names = {
        "worker": "memory of a training process, without activations",
        "fusion": "memory of the fusion actor at its peak",
        "scorer": "memory of an evaluation process",
        "version": "disk of each new version",
        "passing": "disk until the tasks are committed",
    }
    say(f"{plan['need']['parameters']:,} parameters, {plan['need']['fused']:,} of them fused")
    show_table("need", ("what", "about"), [(text, megabytes(plan["need"][name])) for name, text in names.items()])


def show_evaluation(found: dict[str, Any]) -> None:
    show_table(
        f"version {found['version']}, label space {found['labels']}",
        ("task", "pictures", "accuracy %"),
        [(row["name"], row["pictures"], row["accuracy"]) for row in found["tasks"]] + [("mean", None, found["mean"])],
    )


def show_drift(found: dict[str, Any], data: str) -> None:
    """A line a task, and what to do."""
    show_table(
        f"{found['pictures']} of {found['of']} pictures against version {found['version']}",
        ("nearest task", "pictures", "similarity", "learned", "distance", "p", "drifted"),
        [
            (
                row["name"],
                row["pictures"],
                _two(row["similarity"]),
                _two(row["learned"]),
                _two(row["distance"]),
                "-" if row["p"] is None else f"{row['p']:.1g}",
                "yes" if row["drifted"] else "no",
            )
            for row in found["tasks"]
        ],
    )
    if found["drifted"]:
        share = 100 * found["drifted"]
        say(f"{share:.0f} % look like nothing learned; next: condu-ray learn NAME --data {data} (in class folders)")
    elif all(row["p"] is None for row in found["tasks"]):
        say("too few pictures, here or when the tasks were learned, to tell")
    else:
        say("they look like what was learned")


def show_tracking(found: dict[str, Any]) -> None:
    """What MLflow knows."""
    rest = f"; missing: {', '.join(map(str, found['missing']))}" if found["missing"] else ""
    say(f"{len(found['recorded'])} of {len(found['versions'])} versions are recorded at {found['tracking']}{rest}")
    if found["missing"]:
        say("next: condu-ray track --replay")


def show_gc(report: GcReport) -> None:
    would = "would free" if report.dry_run else "freed"
    say(
        f"{would} {megabytes(report.bytes)}: {len(report.versions)} versions, {len(report.objects)} objects, "
        f"{len(report.leftovers)} leftovers"
    )
    if report.in_use:
        say(f"kept {len(report.in_use)} young objects that a running session may need")


def show_doctor(found: dict[str, Any]) -> None:
    say(f"condu-ray {found['condu_ray']}, Python {found['python']}, {found['platform']}, {found['cpus']} CPUs")
    say(", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items()))
    for name, value in found["environment"].items():
        say(f"  {name}={value}")
    store = found["store"]
    if "fault" in store:
        say(f"store: {store['fault']}")
        return
    say(
        f"store {store['url']}: method {store['method']}, {store['versions']} versions, {store['tasks']} tasks, "
        f"{store['objects']} objects, {megabytes(store['bytes'])}"
    )
    for path, fault in store["damaged"].items():
        say(f"  damaged: {path}: {fault}")
    if not store["damaged"]:
        say("  every object is whole")


def show_benchmark(found: dict[str, Any]) -> None:
    """A table a label space, and one for the rest; several seeds as mean ± sample standard deviation."""
    seeds = sorted({row["seed"] for row in found["results"]})
    say(
        f"model {found['model']}, seeds {', '.join(map(str, seeds))}, learned in the order {', '.join(found['stream'])}"
    )
    by_labels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in found["results"]:
        by_labels.setdefault(row["labels"], {}).setdefault(row["method"], []).append(row)
    figures = {"Transfer": "transfer", "Average": "average", "Last": "last", "of the gain kept": "retention"}
    incremental = {"Avg": "incremental_average", "Last, by picture": "incremental_last"}
    for labels, methods in by_labels.items():
        shown = figures | (incremental if labels == "union" else {})
        rows = [(method, *(_spread(runs, key) for key in shown.values())) for method, runs in methods.items()]
        show_table(f"labels {labels}, percent", ("method", *shown), rows)
    show_table(
        "router and cost",
        ("method", "task first %", "among two %", "AUROC", "alone %", "s a task", "MB a task", "MB shared", "rank"),
        [
            (
                method,
                _spread(runs, "router_accuracy"),
                _spread(runs, "router_top2"),
                _spread(runs, "auroc", digits=3),
                _spread(runs, "router_alone"),
                _spread(runs, "seconds"),
                _spread(runs, "bytes_per_task", scale=1e-6, digits=2),
                _spread(runs, "bytes_shared", scale=1e-6, digits=2),
                runs[0]["rank"],
            )
            for method, runs in by_labels["task"].items()
        ],
    )


def _spread(runs: Sequence[dict[str, Any]], key: str, scale: float = 1.0, digits: int = 1) -> str | None:
    """Mean over the seeds, and the spread where there are several; None where one of them has no such figure."""
    values = [run[key] for run in runs]
    if None in values:
        return None
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def show_demo(found: dict[str, Any]) -> None:
    """The three methods side by side, where the pictures are, and what to try next."""
    say(f"learned one after another: {', '.join(found['tasks'])}")
    show_table(
        "accuracy in percent",
        ("method", "Transfer", "Average", "Last"),
        [(name, row["transfer"], row["average"], row["last"]) for name, row in found["methods"].items()],
    )
    say("Transfer: tasks not yet learned. Average: over the whole stream. Last: all tasks, at the end.")
    if found["alone"] is not None:
        say(f"Fine-tuning one model a task, forgetting nothing, would end at {found['alone']:.1f}.")
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    for picture in found["pictures"]:
        say(f"picture: {picture}")
    say("next:")
    for command in found["next"]:
        say(f"  {command}")


def show_sweep(found: dict[str, Any]) -> None:
    """The best trials, what matters, what does not, what to try."""
    trials = found["trials"]
    say(
        f"{trials['finished']} trials finished"
        + (f", {trials['stopped']} stopped early" if trials["stopped"] else "")
        + (f", {trials['failed']} failed" if trials["failed"] else "")
        + (f"; {found['steps']:,} steps trained" if found["steps"] else "")
    )
    for failed in found["failed"][:SKIPPED_SHOWN]:
        say(f"  trial {failed['number']} failed: {failed['reason']}")
    best = found["front"]
    names = list(best[0]["settings"])
    show_table(
        "the best" if len(best) == 1 else "Pareto front: none of these is better than another in everything",
        ("trial", *names, *found["objectives"]),
        [
            (
                row["number"],
                *(_short(row["settings"][name]) for name in names),
                *(_two(v) for v in row["values"].values()),
            )
            for row in best
        ],
    )
    share = {name: f"{name} ({100 * value:.0f} %)" for name, value in found["importance"].items()}
    say("matters: " + (", ".join(share[name] for name in found["matters"]) or "nothing stands out"))
    say("hardly matters: " + (", ".join(share[name] for name in found["hardly"]) or "nothing"))
    for sentence in found["try"]:
        say(f"try: {sentence}")
    for picture in found["pictures"]:
        say(f"picture: {picture}")
    say(f"next: condu-ray learn --config {found['config']}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "unset" if value is None else str(value)
