"""`condu-ray serve`: the application on a cluster, until it is stopped."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from ray import serve
from ray.exceptions import RayError

from condu_ray.config import ServeConfig
from condu_ray.engine.cluster import Cluster, connected
from condu_ray.errors import ConfigError, ServiceError
from condu_ray.serving.app import application
from condu_ray.store import open_store
from condu_ray.voting.open import check_pictured

NAME = "condu-ray"
LOOK_SECONDS = 5.0


@contextmanager
def serving(config: ServeConfig, cluster: Cluster | None = None) -> Iterator[str]:
    """The URL of a server that runs as long as the block, on a cluster that is given or as `connect` finds it.

    Raises ConduError before anything is started where store, version or port cannot be meant; ServiceError where no
    replica comes up.
    """
    store = open_store(config.store)
    for version in dict.fromkeys((config.version, config.shadow_version or config.version)):
        check_pictured(store.manifest(version))
    _check_port(config)
    config = config.model_copy(update={"store": os.path.abspath(config.store)} if os.path.isdir(config.store) else {})
    with connected(cluster) as found:
        _check_free()
        if not found.joined:
            _check_room(config, found)
        serve.start(http_options={"host": config.host, "port": config.port})
        try:
            with _waits_said():
                serve.run(application(config), name=NAME, route_prefix="/")
            host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
            yield f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
        except RuntimeError as error:
            raise ServiceError(
                f"no replica came up: {str(error).strip().splitlines()[0]}",
                "the logs are in /tmp/ray/session_latest/logs/serve",
            ) from error
        finally:
            _stop(found)


@contextmanager
def _waits_said() -> Iterator[None]:
    """Passes on what Serve says of a deployment that does not come up, for want of cores say: it waits without end, and
    writes of that into its controller's log only."""
    through, said = threading.Event(), set[str]()

    def look() -> None:
        while not through.wait(LOOK_SECONDS):
            with suppress(KeyError, RayError):  # not deployed yet, or the controller is started anew
                for name, each in serve.status().applications[NAME].deployments.items():
                    if each.message and name not in said:
                        said.add(name)
                        print(" ".join(each.message.split()), file=sys.stderr, flush=True)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        through.set()
        looking.join()


def _check_free() -> None:
    """Raises ConfigError where Serve runs already: its applications would go with this server."""
    there = serve.status()
    if there.applications or there.proxies:
        names = ", ".join(there.applications) or "none yet"
        raise ConfigError(
            f"Ray Serve runs on this cluster already (applications: {names})",
            "use `serve deploy clusters/serve.yaml` there, or unset RAY_ADDRESS to serve on this machine",
        )


def _stop(cluster: Cluster) -> None:
    """Ends the application, and Serve with it unless others have brought theirs to the cluster meanwhile."""
    there = serve.status().applications if cluster.joined else {}
    if not set(there) - {NAME}:
        serve.shutdown()
    elif NAME in there:
        serve.delete(NAME)


def _check_room(config: ServeConfig, cluster: Cluster) -> None:
    """Raises ConfigError where this machine has no room for all processes that answer: Ray would wait without end."""
    asked, ((cores, gpus), *_) = config.replicas + config.expert_replicas, cluster.nodes
    if asked * config.cpus > cores or asked * config.gpus > gpus:
        each = f"{config.cpus:g} CPU cores" + (f" and {config.gpus:g} GPUs" if config.gpus else "")
        raise ConfigError(
            f"{asked} processes that answer need {each} each, this machine has {cores} cores and {gpus} GPUs",
            "use fewer --replicas or --expert-replicas, or smaller ones (--cpus, --gpus)",
        )


def run(config: ServeConfig, say: Callable[[str], None], wait: Callable[[], None]) -> None:
    """Serves until `wait` returns, or Ctrl-C."""
    out = sys.stdout  # of the command; what is printed while Ray is connected goes to standard error
    with serving(config) as url:
        with redirect_stdout(out):
            say(f"serving {config.store} at {url} (Ctrl-C stops it)")
        wait()


def _check_port(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        mend = "give another --port" if error.errno == errno.EADDRINUSE else "give an address of this machine"
        raise ConfigError(f"cannot listen on {config.host}:{config.port} ({error.strerror})", mend) from None
