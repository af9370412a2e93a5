"""The files in clusters/ are what Ray's launcher takes, by its own schema, and KubeRay, by its published fields."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from condu_ray import __version__
from condu_ray.errors import ConfigError
from condu_ray.sources import resolve_serving

CLUSTERS = Path(__file__).parents[2] / "clusters"
KINDS = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob", "rayservice.yaml": "RayService"}

# Of KubeRay's API reference (ray.io/v1, release 1.6): the fields that are used here, by type.
FIELDS: dict[str, set[str]] = {
    "RayClusterSpec": {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "headGroupSpec",
        "rayVersion",
        "workerGroupSpecs",
    },
    "RayJobSpec": {
        "backoffLimit",
        "entrypoint",
        "rayClusterSpec",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "ttlSecondsAfterFinished",
    },
    "RayServiceSpec": {"rayClusterConfig", "serveConfigV2"},
    "HeadGroupSpec": {"rayStartParams", "template"},
    "WorkerGroupSpec": {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "template"},
    "AuthOptions": {"mode", "secretName"},
    "AutoscalerOptions": {"idleTimeoutSeconds"},
}


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTERS / name).read_text(encoding="utf-8"))
    return found


def test_the_launcher_s_file_fits_ray_s_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    file = load("aws.yaml")
    jsonschema.validate(file, schema)
    types = file["available_node_types"]
    assert file["head_node_type"] in types
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--env RAY_AUTH_MODE=token" in file["docker"]["run_options"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(file | {"head_node": {}}, schema)


def cluster_of(file: dict[str, Any]) -> dict[str, Any]:
    spec = file["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_has_only_published_fields(name: str) -> None:
    file = load(f"kuberay/{name}")
    assert (file["apiVersion"], file["kind"]) == ("ray.io/v1", KINDS[name])
    spec, cluster = file["spec"], cluster_of(file)
    assert set(spec) <= FIELDS[f"{KINDS[name]}Spec"]
    assert set(cluster) <= FIELDS["RayClusterSpec"]
    assert set(cluster["authOptions"]) <= FIELDS["AuthOptions"]
    assert cluster["authOptions"]["mode"] == "token"
    assert set(cluster.get("autoscalerOptions", {})) <= FIELDS["AutoscalerOptions"]
    assert set(cluster["headGroupSpec"]) <= FIELDS["HeadGroupSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= FIELDS["WorkerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


@pytest.mark.parametrize("name", KINDS)
def test_shared_memory_is_large_enough_for_ray_to_use_it(name: str) -> None:
    """A smaller one Ray leaves aside and takes the disk. Without one, KubeRay mounts one as large as the memory."""
    cluster = cluster_of(load(f"kuberay/{name}"))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            memory = gib(container["resources"]["limits"]["memory"])
            for mount in container.get("volumeMounts", []):
                if mount["mountPath"] == "/dev/shm":
                    size = gib(volumes[mount["name"]]["emptyDir"]["sizeLimit"])
                    assert memory * ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION < size < memory


def gib(size: str) -> float:
    number, unit = size[:-2], size[-2:]
    assert unit == "Gi"
    return float(number)


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay/rayservice.yaml"])
def test_a_serve_config_serves_its_store_to_other_machines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load(name)
    config = file if name == "serve.yaml" else yaml.safe_load(file["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "condu_ray.serving.app:app"
    monkeypatch.delenv("CONDU_SERVE__TOKEN", raising=False)
    with pytest.raises(ConfigError, match="no token is set"):  # so it is not for its own machine alone
        resolve_serving(application.args)
    monkeypatch.setenv("CONDU_SERVE__TOKEN", "a-token-of-the-test")
    store = "/shared/store" if name == "serve.yaml" else "s3://BUCKET/condu-store"
    assert resolve_serving(application.args).store == store


def test_every_node_of_a_service_has_the_token_that_clients_show() -> None:
    cluster = cluster_of(load("kuberay/rayservice.yaml"))
    secret = {
        "name": "CONDU_SERVE__TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "condu-serve-token", "key": "token"}},
    }
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert [container["env"] for container in group["template"]["spec"]["containers"]] == [[secret]]
    assert "create secret generic condu-serve-token --from-literal=token=" in (CLUSTERS / "README.md").read_text()


def test_a_session_on_the_launcher_s_head_is_a_job_of_the_image_and_joins_the_cluster() -> None:
    (given,) = re.findall(r"`ray exec clusters/aws.yaml '(.+?)'`", (CLUSTERS / "README.md").read_text(encoding="utf-8"))
    address, python, script, name, *options = given.split()
    assert (address, python, name) == ("RAY_ADDRESS=auto", "python", "birds")
    assert "--node-wait-seconds" in options  # the cluster begins without a worker
    image = (CLUSTERS / "Containerfile").read_text(encoding="utf-8")
    assert "COPY jobs /opt/condu-ray/jobs" in image
    assert (CLUSTERS.parent / script.removeprefix("/opt/condu-ray/")).is_file()


def test_ray_start_s_values_are_text() -> None:
    """KubeRay takes no numbers there."""
    for name in KINDS:
        cluster = cluster_of(load(f"kuberay/{name}"))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_one_image_and_one_release_everywhere() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(CLUSTERS.rglob("*")) if path.is_file()]
    images = {image for text in texts for image in re.findall(r"REGISTRY/condu-ray:([\w.]+)", text)}
    assert images == {__version__}
    releases = {cluster_of(load(f"kuberay/{name}"))["rayVersion"] for name in KINDS}
    assert releases == {version("ray")}, "what is tested is what the manifests start"
    assert f'"ray=={version("ray")}"' in (CLUSTERS / "Containerfile").read_text(encoding="utf-8")


def test_a_job_s_command_is_one_that_learn_takes() -> None:
    import shlex

    import typer

    from condu_ray.cli import app

    words = shlex.split(load("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "/opt/condu-ray/jobs/session.py"]
    learn = typer.main.get_command(app).commands["learn"]  # type: ignore[attr-defined]  # it is a group
    assert learn.make_context("learn", words[2:]).params["name"] == "birds"


def test_the_container_holds_what_the_files_name() -> None:
    text = (CLUSTERS / "Containerfile").read_text(encoding="utf-8")
    for source in re.findall(r"^COPY (.+) /opt", text, re.MULTILINE):
        for name in source.split():
            assert (CLUSTERS.parent / name).exists(), name
    assert re.search(r"^USER ray$", text, re.MULTILINE)
    assert "OMP_" not in text  # condu_ray says how threads wait, unless the environment does
