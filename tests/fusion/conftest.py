"""The two vehicles of the one definition: NumPy for small vectors, machine code for large ones."""

from __future__ import annotations

import pytest

from condu_ray.fusion import kernels


@pytest.fixture(params=["numpy", "compiled"])
def vehicle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "COMPILED_FROM", 0 if request.param == "compiled" else 1 << 62)
    return str(request.param)
