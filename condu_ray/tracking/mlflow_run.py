"""One MLflow run a session, and each version as a model that MLflow can load.

The store is the truth; MLflow only tells of it. So nothing here is needed to go on, a run is written after its version
is published, and a run that could not be written costs a warning, not the session.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from condu_ray import __version__
from condu_ray.errors import ConfigError, without_credentials
from condu_ray.store import Manifest, absolute_url, open_store
from condu_ray.store.files import lock, publish, temporary
from condu_ray.store.manifest import dump
from condu_ray.tracking.matrix import AccuracyMatrix
from condu_ray.tracking.pictures import draw_matrix

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

STORE_TAG = "condu.store"
VERSION_TAG = "condu.version"
NEWEST = "newest"
_CHECK_S = 5.0  # how long a server may take to say that it is there
PARAMETER_LENGTH = 500  # characters that every MLflow server takes; the manifest has the rest
SOURCE_LENGTH = 5000  # characters of a description that every database takes; a command of many tasks may be longer
_FORMS = "give sqlite:////FOLDER/mlflow.db or http://HOST:PORT"
LATER = "`condu-ray track --replay` records later what is missing"
_BATCH = {"metrics": 1000, "params": 100}  # MLflow's limits for one request


@dataclass(frozen=True)
class Tracking:
    """Where the runs of a store go; made by `open_tracking`.

    uri: MLflow's tracking URI. artifacts: folder for files, None where the server decides. store: what `open_store`
    opens.
    """

    uri: str
    artifacts: Path | None
    store: str

    @property
    def shown(self) -> str:
        """The URI as it may be printed."""
        return without_credentials(self.uri)

    def check(self) -> str | None:
        """Asks whether runs can be recorded, before work starts; writes nothing and does not import MLflow.

        Returns a sentence of warning for a server that does not answer within 5 s: it is needed only at the end, and
        not even then (`condu-ray track --replay`). Raises ConfigError for a folder that does not exist, or a kind of
        URI that MLflow does not take.
        """
        kind = _kind_of(self.uri)
        if kind in ("http", "https"):
            return self.away()
        if kind == "sqlite":
            folder = Path(self.uri.removeprefix("sqlite:///")).parent
            if self.artifacts is not None and folder != Path(self.store) and not folder.is_dir():
                raise ConfigError(f"the tracking database {self.shown} has no folder {folder}", "make the folder first")
        elif kind in ("", "file"):
            raise ConfigError(
                f"MLflow does not keep runs in a plain folder any more (tracking URI {self.shown!r})",
                f"{_FORMS}, or leave it out",
            )
        return None

    def away(self) -> str | None:
        """A sentence of warning where an HTTP server does not answer within 5 s; None elsewhere."""
        parts = urlsplit(self.uri)
        if parts.scheme not in ("http", "https"):
            return None
        place = parts.netloc.rpartition("@")[2]  # urllib takes a user for a part of the host
        try:
            urllib.request.urlopen(f"{parts.scheme}://{place}{parts.path.rstrip('/')}/health", timeout=_CHECK_S).close()
        except urllib.error.HTTPError as error:  # it answers, if only that it wants a password
            error.close()
        except (OSError, HTTPException, UnicodeError) as error:  # the last of a host's name that is none
            reason = getattr(error, "reason", error)
            return f"the tracking server {self.shown} cannot be reached ({reason}); {LATER}."
        return None

    def prepare(self) -> None:
        """Does ahead what the first record would wait for: imports MLflow, and makes the tables of a database."""
        client_of(self.uri)
        import mlflow.pyfunc  # noqa: F401

    def recorded(self) -> set[int]:
        """Numbers of the store's versions that are recorded. Raises ConfigError where MLflow cannot be asked."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        store_id = open_store(self.store).header.id
        try:
            client = client_of(self.uri)
            # By name: of a server that many share, one page holds a thousand experiments.
            name = f"name LIKE '{model_name(store_id)}%'"
            found = [each.experiment_id for each in client.search_experiments(filter_string=name)]
            runs, token = list[Any](), ""
            while found and token is not None:
                page = client.search_runs(found, f"tags.`{STORE_TAG}` = '{store_id}'", page_token=token or None)
                runs, token = runs + list(page), page.token
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise ConfigError(
                f"the runs at {self.shown} cannot be read ({reason_of(error)})", "start it first"
            ) from error
        return {int(run.data.tags[VERSION_TAG]) for run in runs if run.info.status == "FINISHED"}

    def record(
        self,
        manifest: Manifest,
        losses: Mapping[str, Sequence[tuple[int, float]]],
        matrix: AccuracyMatrix | None,
        pictures: Sequence[Path],
        version_source: str,
    ) -> str | None:
        """Records a published version as a run and registers it as a model; a version is recorded once.

        losses: (step, loss) by task. pictures: files to keep with the run. version_source: what made the version, such
        as the command. Returns None, or, as the version is published already, a sentence of warning for the caller to
        show instead of an error. Raises StoreError if the store cannot be read any more.
        """
        store_id = open_store(self.store).header.id
        try:
            client = client_of(self.uri)
            source = without_credentials(version_source)[:SOURCE_LENGTH]  # the command may name this very URI
            self._record(client, store_id, manifest, losses, matrix, pictures, source)
        except Exception as error:  # files go where the server says, by that place's own library, or one that lacks
            what = f"version {manifest.version} is published, but was not recorded at {self.shown} ({reason_of(error)})"
            return f"{what}; {LATER}."
        return None

    def _record(
        self,
        client: MlflowClient,
        store_id: str,
        manifest: Manifest,
        losses: Mapping[str, Sequence[tuple[int, float]]],
        matrix: AccuracyMatrix | None,
        pictures: Sequence[Path],
        version_source: str,
    ) -> None:
        name = model_name(store_id)
        experiment = self.experiment(client, name)
        tags = {STORE_TAG: store_id, VERSION_TAG: str(manifest.version)}
        for run in runs_with(client, experiment, tags):
            if run.info.status == "FINISHED":
                return
            client.delete_run(run.info.run_id)  # of a session that was killed while it recorded
        run = client.create_run(
            experiment,
            run_name=f"version {manifest.version}: {manifest.message or manifest.kind}",
            tags=tags | {"mlflow.source.name": version_source, "condu.kind": manifest.kind},
        )
        run_id = run.info.run_id
        _log_numbers(client, run_id, manifest, losses, matrix)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "manifest.json").write_bytes(dump(manifest))
            if matrix is not None:
                (place / "accuracy_matrix.json").write_text(json.dumps(matrix.to_json(), indent=1) + "\n")
                draw_matrix(matrix, place / "accuracy_matrix.png")
            _save_model(place / "model", self.store, manifest.version)
            client.log_artifacts(run_id, folder)
        for picture in pictures:
            client.log_artifact(run_id, str(picture), "pictures")
        _register(client, name, manifest, f"{run.info.artifact_uri}/model", run_id, version_source)
        client.set_terminated(run_id)

    def experiment(self, client: MlflowClient, name: str) -> str:
        """Returns the id of the store's experiment, made if absent.

        A database that moved with its store still names the old folder for files; then a new experiment is made.
        """
        from mlflow.exceptions import MlflowException

        location = None if self.artifacts is None else self.artifacts.as_uri()
        found = client.get_experiment_by_name(name)
        if found is not None and location not in (None, found.artifact_location):
            name = f"{name} in {self.artifacts}"
            found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another session made it in this moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)


def open_tracking(uri: str | None, store: str | Path) -> Tracking:
    """Says where the runs of a store go, and makes nothing yet.

    uri: an MLflow tracking URI, such as http://HOST:PORT; None: `mlflow.db` and `mlruns/` in the folder of the store.
    Files of a sqlite database stay in `mlruns/` beside it; a server decides for itself. Raises ConfigError for a URI
    that cannot be read, or that does not say how to ask its server.
    """
    place = absolute_url(store)
    if uri is None:
        if place.startswith("s3://"):
            mend = "give --tracking URI, or --tracking off (any version can be recorded later)"
            raise ConfigError(f"MLflow's database cannot be in {place}", mend)
        return Tracking(f"sqlite:///{place}/mlflow.db", Path(place) / "mlruns", place)
    _check_form(uri)
    if _kind_of(uri) == "sqlite":
        database = Path(uri.removeprefix("sqlite:///")).absolute()
        return Tracking(f"sqlite:///{database}", database.parent / "mlruns", place)
    return Tracking(uri, None, place)


def _kind_of(uri: str) -> str:
    try:
        return urlsplit(uri).scheme
    except ValueError as error:
        raise ConfigError(
            f"the tracking URI {without_credentials(uri)!r} cannot be read ({error})",
            _FORMS,
        ) from None


def _check_form(uri: str) -> None:
    """Raises ConfigError for localhost:5000, whose host would pass for a kind of URI that MLflow may know."""
    # What stands before the host, and after a question mark, may be a password.
    kind, address = _kind_of(uri), uri.rpartition("@")[2].partition("?")[0]
    if kind != "file" and "://" not in uri and re.fullmatch(r"[^/]+:\d+(/.*)?", address):
        raise ConfigError(
            f"the tracking URI {address!r} does not begin with http:// or https://", f"give http://{address}"
        )
    whole = uri.startswith("sqlite:///") if kind == "sqlite" else "://" in uri
    if kind not in ("", "file") and not whole:
        raise ConfigError(f"the tracking URI {address!r} is none that MLflow takes", _FORMS)


def reason_of(error: Exception) -> str:
    """What an error says, in one line that may be printed."""
    return without_credentials((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def model_name(store_id: str) -> str:
    """Returns the name under which the versions of a store are registered."""
    return f"condu-ray-{store_id[:8]}"


def version_alias(version: int) -> str:
    """Returns the alias of a version: `models:/NAME@version-3`. MLflow keeps names such as `v3` for itself."""
    return f"version-{version}"


def client_of(uri: str) -> MlflowClient:
    # A server that went away after the session must not hold the command for MLflow's usual quarter of an hour, and
    # standard output belongs to the command's own answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a page of lines when a database is new
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # that an environment of uv has no pip
    if _kind_of(uri) == "sqlite":
        _make_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """Makes the tables aside where there is no file yet, so that it appears whole: one that a kill left half made would
    be refused for ever, and two processes that make it at once get into each other's way."""
    from mlflow import MlflowClient

    if path.exists() or not path.parent.is_dir():  # MLflow itself says what is wrong with the folder
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
        with (
            lock(path.parent) as locked,
            temporary(path.parent, [made.read_bytes()]) as whole,
            contextlib.suppress(FileExistsError),  # another process was faster
        ):
            publish(whole, path, locked)


def runs_with(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Run]:
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment], wanted))


def _log_numbers(
    client: MlflowClient,
    run_id: str,
    manifest: Manifest,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    matrix: AccuracyMatrix | None,
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)

    def metric(name: str, value: float, step: int = manifest.version) -> Metric:
        return Metric(key_of(name), value, now, step)

    metrics = [metric(f"loss/{task}", loss, step) for task, curve in losses.items() for step, loss in curve]
    for card in manifest.tasks:
        metrics += [metric(f"{name}/{card.name}", value) for name, value in card.figures.items() if value is not None]
    metrics += [metric(name, value) for name, value in _numbers(manifest.figures)]
    metrics += [metric(f"seconds/{name}", value) for name, value in manifest.seconds.items()]
    if matrix is not None:
        means = {"transfer": matrix.transfer(), "average": matrix.average(), "last": matrix.last()}
        metrics += [metric(name, value) for name, value in means.items() if value is not None]
    metrics = [metric for metric in metrics if math.isfinite(metric.value)]
    params = [Param(key_of(name), text[:PARAMETER_LENGTH]) for name, text in texts_of(manifest.settings)]
    for start in range(0, len(metrics), _BATCH["metrics"]):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH["metrics"]])
    for start in range(0, len(params), _BATCH["params"]):
        client.log_batch(run_id, params=params[start : start + _BATCH["params"]])


def texts_of(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, text) for each of nested settings: text as it is, other values as JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from texts_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def key_of(name: str) -> str:
    """MLflow's names hold letters, digits, '_', '-', '.', ':', '/' and spaces, at most 250, and are no paths."""
    clean = "".join(letter if letter.isalnum() or letter in "_-.:/ " else "_" for letter in name)
    return "/".join("_" if part in ("", ".", "..") else part for part in clean.split("/"))[:250]


def _save_model(place: Path, store: str, version: int) -> None:
    import mlflow.pyfunc

    mlflow.pyfunc.save_model(
        str(place),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        model_config={"store": store, "version": version},
        pip_requirements=[f"condu-ray=={__version__}"],  # explicit, or MLflow loads the model to find out
    )


def _register(
    client: MlflowClient, name: str, manifest: Manifest, source: str, run_id: str, version_source: str
) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Versions of the condu-ray store {name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [model.tags.get(VERSION_TAG, "") for model in client.search_model_versions(f"name='{name}'")]
    tags = {VERSION_TAG: str(manifest.version), "condu.tasks": ", ".join(task.name for task in manifest.tasks)[:500]}
    made = client.create_model_version(name, source, run_id, tags=tags, description=version_source)
    client.set_registered_model_alias(name, version_alias(manifest.version), made.version)
    if manifest.version >= max((int(tag) for tag in known if tag.isdecimal()), default=0):  # others were made by hand
        client.set_registered_model_alias(name, NEWEST, made.version)
