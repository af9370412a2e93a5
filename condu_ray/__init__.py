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
# Idle OpenMP threads that spin at a barrier cost more than they save as soon as a core is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
