"""condu-ray: a CLIP model that keeps learning."""

import os

__version__ = "0.1.0"

# Read by Ray when it is first imported. Under `uv run` Ray would otherwise zip the current folder and build a new
# environment for every worker; the workers use this process's own environment instead.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train's second generation is the one that restarts a worker group from the last checkpoint.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# How often OpenMP threads look before they sleep at a barrier: for long costs fivefold as soon as a core is shared,
# not at all costs a fifth where it is not (docs/decisions.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
