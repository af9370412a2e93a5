"""What an issue report needs: versions of what is installed, the machine, the settings, the state of the store."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from condu_ray import __version__
from condu_ray.errors import ConduError, without_credentials
from condu_ray.store import open_store
from condu_ray.store.history import readable

PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "numpy",
    "safetensors",
    "mlflow",
    "boto3",
    "pydantic",
    "typer",
)
SETTINGS = ("CONDU_", "RAY_", "OMP_", "CUDA_", "MLFLOW_", "AWS_REGION", "AWS_ENDPOINT_URL")
SECRET = ("TOKEN", "PASSWORD", "SECRET", "KEY", "CREDENTIAL")


def examine(store: str) -> dict[str, Any]:
    """Everything as JSON; a store that cannot be read is a finding, not an error. Reads every object once."""
    return {
        "condu_ray": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {
            name: "(set)" if any(word in name for word in SECRET) else without_credentials(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(SETTINGS)
        },
        "store": _store(store),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _store(url: str) -> dict[str, Any]:
    try:
        store = open_store(url)
        manifests, unread = readable(store)
    except ConduError as error:
        return {"url": url, "fault": str(error)}
    objects = {ref.path: ref for manifest in manifests for ref in manifest.objects.values()}
    faults = {f"version {version}": str(fault) for version, fault in unread.items()}
    faults |= {path: fault for path, ref in objects.items() if (fault := store.fault(ref)) is not None}
    return {
        "url": store.url,
        "id": store.header.id,
        "method": store.header.method,
        "model": store.header.model,
        "versions": len(manifests) + len(unread),
        "tasks": len(manifests[-1].tasks) if manifests else 0,
        "objects": len(objects),
        "bytes": sum(ref.bytes for ref in objects.values()),
        "damaged": faults,
    }
