"""The command line: each command parses, calls and prints. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import errno
import io
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from condu_ray import __version__, reports
from condu_ray.config import ServeConfig, SessionConfig
from condu_ray.errors import ConduError, ConfigError, without_credentials
from condu_ray.options import with_settings
from condu_ray.sources import flatten

if TYPE_CHECKING:
    from condu_ray.data import Skipped

app = typer.Typer(
    help="A CLIP model that keeps learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try: condu-ray demo | condu-ray learn cars --data ./cars | condu-ray predict picture.jpg",
)

INTERRUPTED = 130
DEFAULT_STORE = SessionConfig.model_fields["store"].default
StoreOption = Annotated[
    str, typer.Option("--store", envvar="CONDU_STORE", help="folder or s3://BUCKET/FOLDER that holds the versions")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document")]
GpuOption = Annotated[
    Literal["auto", "no"], typer.Option("--gpu", envvar="CONDU_GPU", help="auto: a GPU where this process sees one")
]
PicturesOption = Annotated[Path | None, typer.Option("--pictures", help="folder to draw pictures into")]


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits 0 when done, 2 for the user's input or surroundings, 1 for a mistake of ours."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            app(args=arguments, prog_name="condu-ray")
        finally:
            sys.stdout.flush()  # what cannot be written is said here, not by Python when it ends
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        try:
            sys.stdout.flush()
        except OSError:  # what waits there would be tried once more when Python ends
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever read has enough, as typer has it
            sys.exit(1)
        print(f"error: no space left to write {error.filename or 'the output'}: free some space.", file=sys.stderr)
        sys.exit(2)
    except ConduError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as left:
        if left.code == INTERRUPTED:
            print("stopped; the same command goes on where this one ended", file=sys.stderr)
        raise


def _open_streams() -> None:
    """Puts /dev/null where a standard stream was closed (`2>&-`).

    Otherwise the next file that is opened takes its number, and gets what libraries print; and Python prints what is
    meant for the missing stream on the other.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _version(wanted: bool) -> None:
    if wanted:
        reports.say(f"condu-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command(epilog="Try: condu-ray learn cars --data ./cars --train.steps 200")
@with_settings("tasks")
def learn(
    name: Annotated[str | None, typer.Argument(help="name of the task to learn from --data")] = None,
    data: Annotated[
        str | None, typer.Option(help="image folder, webdataset folder, CSV (path,label) or torchvision name")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="a task; may be given several times")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings below")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print plan, need and merged settings; write nothing")
    ] = False,
    pictures: PicturesOption = None,
    json: JsonOption = False,
    settings: dict[str, Any] | None = None,
) -> None:
    """Learns one task, or several at once, and publishes a version for each."""
    tasks = _tasks(name, data, task)
    settings = dict(settings or {}) | ({"tasks": tasks} if tasks else {})
    from condu_ray.store.header import session_settings

    merged, origin = session_settings(settings, config)
    from condu_ray.engine import command
    from condu_ray.engine.keys import unread
    from condu_ray.engine.progress import stage

    if idle := sorted(unread(merged) & set(settings)):  # a file or the environment may serve several methods
        options = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ConfigError(f"{merged.method} does not read {options}", "leave it out, or choose another --method")
    if dry_run:
        found, plan = command.dry_run(merged, stage)
        values = flatten(merged.model_dump())
        values["tracking"] = values["tracking"] and without_credentials(values["tracking"])
        if json:
            reports.emit(
                {"data": found, **plan, "settings": {n: {"value": v, "from": origin[n]} for n, v in values.items()}}
            )
            return
        reports.show_data(found)
        reports.show_plan(plan)
        reports.show_table("settings", ("name", "value", "from"), [(n, str(v), origin[n]) for n, v in values.items()])
        return
    _make_folder(pictures)
    outcome = command.run(merged, stage, "condu-ray " + shlex.join(sys.argv[1:]))
    drawn = command.draw_store(merged.store, pictures) if pictures else []
    for warning in outcome.warnings:
        reports.warn(warning)
    if json:
        reports.emit(
            {
                "data": outcome.data,
                "made": [manifest.version for manifest in outcome.made],
                "version": outcome.newest.version,
                "tasks": reports.task_rows(outcome.newest),
                "seconds": {str(manifest.version): manifest.seconds for manifest in outcome.made},
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    reports.show_data(outcome.data)
    reports.show_tasks(outcome.newest)
    if not outcome.made:
        reports.say(f"nothing to do: version {outcome.newest.version} holds these tasks already")
    reports.say(f"next: condu-ray predict PICTURE --store {merged.store}")


def _make_folder(pictures: Path | None) -> None:
    """Makes the folder for pictures before the work starts."""
    if pictures is not None:
        try:
            pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--pictures {pictures}: {error.strerror}", "give a folder that can be written") from None


def _tasks(name: str | None, data: str | None, tasks: list[str] | None) -> list[str]:
    if (name is None) != (data is None):
        missing = "--data PATH" if data is None else "the task's NAME"
        raise ConfigError(f"{missing} is missing", "give both: condu-ray learn NAME --data PATH, or --task NAME=PATH")
    return ([f"{name}={data}"] if name else []) + (tasks or [])


@app.command(epilog="Try: condu-ray sweep sweep.yaml, then condu-ray learn --config sweep/best.yaml")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="what to search for; see docs/sweeps.md")],
    work: Annotated[
        Path | None, typer.Option(help="folder that holds all of it", show_default="as the file, without .yaml")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Searches for settings: of training (each trial trains) or of the vote (cached answers are scored again)."""
    from condu_ray.engine.progress import stage
    from condu_ray.tuning.command import run

    found = run(file, work or (file.with_suffix("") if file.name else file), stage)
    for warning in found["warnings"]:
        reports.warn(warning)
    reports.emit(found) if json else reports.show_sweep(found)


@app.command(epilog="Try: condu-ray predict cat.jpg --labels cat,dog,car")
def predict(
    image: Annotated[list[str], typer.Argument(help="pictures, or folders of pictures")],
    task: Annotated[str | None, typer.Option(help="answer among its classes, by its expert and the router")] = None,
    labels: Annotated[str | None, typer.Option(metavar="A,B,C", help="answer among these words")] = None,
    version: Annotated[int | None, typer.Option(help="version that answers", show_default="the newest")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="labels listed for each picture")] = 5,
    url: Annotated[
        str | None, typer.Option(help="ask a server instead of a store; its token comes from CONDU_SERVE__TOKEN")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    gpu: GpuOption = "auto",
    pictures: PicturesOption = None,
    json: JsonOption = False,
) -> None:
    """Says what pictures show, by the vote of the nearest experts."""
    words = None if labels is None else [word.strip() for word in labels.split(",")]
    skipped: list[Skipped] = []
    if url is None:
        from condu_ray.store import open_store

        opened = open_store(store)
        opened.manifest(version)  # a wrong place is said before a model is loaded
        _make_folder(pictures)
        from condu_ray.engine.progress import stage
        from condu_ray.models.load import device_of
        from condu_ray.voting.open import base_of, load_classifier
        from condu_ray.voting.pictures import classify_paths

        with stage("looking at pictures") as update:
            classifier = load_classifier(store, version, clip=base_of(opened.header, device_of(gpu)))
            answers = classify_paths(classifier, image, task, words, top, update, skipped.append)
    else:
        _make_folder(pictures)
        from condu_ray.client import predict_paths

        answers = predict_paths(url, image, skipped.append, task=task, labels=words, top_k=top, version=version)
    reports.show_skipped(skipped)
    if pictures:
        from condu_ray.tracking.pictures import draw_votes

        for index, answer in enumerate(answers):
            draw_votes(answer, answer["image"], pictures / f"votes_{index:04d}.png")
    if json:
        reports.emit(answers)
    else:
        reports.show_answers(answers)


@app.command(epilog="Try: condu-ray serve, then open http://127.0.0.1:8000")
@with_settings("store", "token", of=ServeConfig)
def serve(store: StoreOption = DEFAULT_STORE, settings: dict[str, Any] | None = None) -> None:
    """Serves the newest version over HTTP, with a page to try it; a new version is taken up while it runs."""
    from condu_ray.sources import resolve_serving

    config = resolve_serving({"store": store, **(settings or {})})
    from condu_ray.serving.start import run

    run(config, reports.say, signal.pause)


@app.command()
def tasks(
    store: StoreOption = DEFAULT_STORE,
    version: Annotated[int | None, typer.Option(help="version to look at", show_default="the newest")] = None,
    json: JsonOption = False,
) -> None:
    """Lists what a version has learned, and how much of it is left."""
    from condu_ray.store import open_store

    manifest = open_store(store).manifest(version)
    reports.emit(reports.task_rows(manifest)) if json else reports.show_tasks(manifest)


@app.command()
def versions(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Lists the versions of a store."""
    from condu_ray.store import open_store
    from condu_ray.store.history import readable

    manifests, faults = readable(open_store(store))
    for fault in faults.values():
        reports.warn(str(fault))
    reports.emit(reports.version_rows(manifests)) if json else reports.show_versions(manifests)


@app.command()
def show(
    version: Annotated[int | None, typer.Argument(help="version to look at", show_default="the newest")] = None,
    store: StoreOption = DEFAULT_STORE,
    pictures: PicturesOption = None,
    json: JsonOption = False,
) -> None:
    """Shows one version: tasks, figures, objects; with --json its settings too."""
    from condu_ray.store import open_store

    opened = open_store(store)
    manifest = opened.manifest(version)
    if pictures:
        from condu_ray.store.history import readable
        from condu_ray.tracking.history import draw

        _make_folder(pictures)
        draw([each for each in readable(opened)[0] if each.version <= manifest.version], pictures)
    if json:
        reports.emit(manifest.model_dump(mode="json"))
    else:
        reports.show_version(manifest, opened.header)


@app.command()
def diff(before: int, after: int, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Shows how two versions differ."""
    from condu_ray.store import open_store
    from condu_ray.store.history import difference

    found = difference(open_store(store), before, after)
    reports.emit(found) if json else reports.show_difference(found)


@app.command()
def rollback(version: int, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Makes a new version that is what an earlier one was."""
    from condu_ray.store import open_store
    from condu_ray.store.history import rollback as roll

    made = roll(open_store(store), version)
    reports.emit({"version": made.version, "from": version}) if json else reports.say(
        f"version {made.version} is what version {version} was; next: condu-ray tasks --store {store}"
        + _to_record(store)
    )


def _to_record(store: str) -> str:
    """What tells MLflow of a version that no session made, where runs are kept at all; '' elsewhere."""
    tracking = os.environ.get("CONDU_TRACKING")
    kept = tracking != "off" if tracking else Path(store, "mlflow.db").is_file()
    return f"; condu-ray track --replay --store {store} records it" if kept else ""


@app.command()
def forget(name: str, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Makes a new version without a task; all others answer as before, bit for bit."""
    from condu_ray.store import open_store

    opened = open_store(store)
    opened.manifest()
    from condu_ray.engine.forget import forget as drop

    made = drop(opened, name)
    reports.emit({"version": made.version, "forgotten": name}) if json else reports.say(
        f"version {made.version} is without {name}; earlier versions still hold it (condu-ray gc --keep 1 removes them)"
        + _to_record(store)
    )


@app.command(epilog="Try: condu-ray merge base.safetensors birds.safetensors cars=tuned/cars.safetensors -o merged")
def merge(
    base: Annotated[Path, typer.Argument(help="base model: a safetensors file, or a folder of shards")],
    tuned: Annotated[list[str], typer.Argument(metavar="[NAME=]PATH...", help="fine-tuned weights of the same names")],
    output: Annotated[str, typer.Option("--output", "-o", help="folder of the store")],
    granularity: Annotated[str, typer.Option(help="over what a rescaler is shared: row, tensor, tensor_mean, l1")] = (
        "row"
    ),
    triggers: Annotated[str, typer.Option(help="what a task's bits say: mask (published) or sign")] = "mask",
    json: JsonOption = False,
) -> None:
    """Fuses fine-tuned weights of any PyTorch model, without pictures; `export` gives each back."""
    from condu_ray.engine.merge import merge as fuse
    from condu_ray.engine.merge import named
    from condu_ray.engine.progress import stage
    from condu_ray.store import open_store

    made = fuse(base, named(tuned), output, granularity, triggers, stage, reports.warn)
    newest = open_store(output).manifest()
    if json:
        rows = reports.task_rows(newest)
        reports.emit({"made": [each.version for each in made], "version": newest.version, "tasks": rows})
        return
    reports.show_tasks(newest)
    reports.say(f"next: condu-ray export {output} --task {newest.tasks[-1].name} -o expert.safetensors")


@app.command(epilog="Try: condu-ray export condu-store --task birds -o birds.safetensors")
def export(
    store: Annotated[str, typer.Argument(metavar="STORE", help="folder that holds the versions")],
    task: Annotated[str, typer.Option(help="whose expert")],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file to write")],
    version: Annotated[int | None, typer.Option(help="version to look at", show_default="the newest")] = None,
    json: JsonOption = False,
) -> None:
    """Writes one task's expert as plain weights, which open_clip (or whoever made the base) loads."""
    from condu_ray.store import open_store

    opened = open_store(store)
    manifest = opened.manifest(version)
    from condu_ray.engine.export import export as write

    size = write(opened, manifest, task, output)
    reports.emit({"task": task, "version": manifest.version, "path": str(output), "bytes": size}) if json else (
        reports.say(f"{output}: the expert of {task} in version {manifest.version}, {size:,} bytes")
    )


@app.command()
def evaluate(
    data: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME=PATH", help="measure on this data instead")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="task (named), candidates (its classes are given) or union (all classes)")
    ] = "task",
    version: Annotated[int | None, typer.Option(help="version to look at", show_default="the newest")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Measures a version's accuracy on the test pictures of its tasks."""
    from condu_ray.store import open_store

    open_store(store).manifest(version)
    from condu_ray.engine.evaluate import evaluate as measure
    from condu_ray.engine.progress import stage

    found = measure(store, version, labels, data or [], stage)
    reports.emit(found) if json else reports.show_evaluation(found)


@app.command(epilog="Try: condu-ray drift --data ./new-pictures")
def drift(
    data: Annotated[list[str], typer.Option(help="pictures, or folders of pictures; may be given several times")],
    version: Annotated[int | None, typer.Option(help="version to look at", show_default="the newest")] = None,
    store: StoreOption = DEFAULT_STORE,
    gpu: GpuOption = "auto",
    json: JsonOption = False,
) -> None:
    """Says whether pictures still look like what was learned, or a new task should be."""
    from condu_ray.store import open_store

    open_store(store).manifest(version)
    from condu_ray.engine.progress import stage
    from condu_ray.models.load import device_of
    from condu_ray.voting.drift import examine

    skipped: list[Skipped] = []
    with stage("looking at pictures") as update:
        found = examine(store, version, data, update, skipped.append, device_of(gpu))
    reports.show_skipped(skipped)
    reports.emit(found) if json else reports.show_drift(found, data[0])


@app.command(epilog="Try: condu-ray track --replay --tracking http://127.0.0.1:5000")
def track(
    replay: Annotated[bool, typer.Option("--replay", help="record what is missing")] = False,
    tracking: Annotated[
        str | None,
        typer.Option(envvar="CONDU_TRACKING", help="MLflow tracking server", show_default="beside the store"),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Lists which versions MLflow knows; --replay tells it of the others, from the store alone."""
    from condu_ray.store import open_store

    open_store(store).manifest()
    from condu_ray.engine.progress import stage
    from condu_ray.tracking.replay import track as mirror

    found = mirror(store, tracking, replay, stage)
    reports.emit(found) if json else reports.show_tracking(found)


@app.command()
def methods(json: JsonOption = False) -> None:
    """Lists the systems that can learn."""
    from condu_ray.catalogue import METHODS

    rows = [{"name": m.name, "summary": m.summary, "source": m.source} for m in METHODS.values()]
    if json:
        reports.emit(rows)
    else:
        reports.show_table("methods", ("name", "what it does", "source"), [tuple(row.values()) for row in rows])


@app.command()
def gc(
    keep: Annotated[
        int | None, typer.Option(min=1, help="how many of the newest versions stay", show_default="all")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="first make a version that needs no flips of earlier sessions")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Removes what no kept version needs."""
    from dataclasses import asdict

    from condu_ray.store import open_store

    opened, made = open_store(store), None
    if fold and not dry_run:
        from condu_ray.engine.fold import fold as take_in

        made = take_in(opened)
    report = opened.gc(keep, dry_run=dry_run)
    if fold and dry_run:
        what = "--fold makes a version first where there are flips to take in, and it counts among those that stay"
        reports.warn(what)
    reports.emit(asdict(report)) if json else reports.show_gc(report)
    if made and not json:
        reports.say(f"version {made.version} holds the flips of all sessions in its masks{_to_record(store)}")


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Prints what an issue report needs: versions, machine, settings, state of the store."""
    from condu_ray.doctor import examine

    found = examine(store)
    reports.emit(found) if json else reports.show_doctor(found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the stores and pictures")] = Path("condu-demo"),
    json: JsonOption = False,
) -> None:
    """Learns five small domains, offline: sequential fine-tuning forgets, ConDU keeps. At most 4 min on two cores."""
    from condu_ray.benchmark.demo import run
    from condu_ray.engine.progress import stage

    found = run(out, stage)
    reports.emit(found) if json else reports.show_demo(found)


if __name__ == "__main__":
    main()
