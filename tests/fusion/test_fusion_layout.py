"""Layouts: where tensors lie in the flat vector, what is refused, and what stays the same across processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from condu_ray.errors import FusionError
from condu_ray.fusion.layout import Entry, Layout


@pytest.fixture
def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"weight": (3, 50), "bias": (7,), "scale": (), "conv": (4, 2, 3, 3)}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def test_every_tensor_starts_at_a_multiple_of_64(tensors: dict[str, Any]) -> None:
    layout = Layout.of(tensors)
    assert [(e.name, e.offset, e.size) for e in layout.entries] == [
        ("weight", 0, 150),
        ("bias", 192, 7),
        ("scale", 256, 1),
        ("conv", 320, 72),
    ]
    assert (layout.total, layout.parameters) == (448, 230)
    assert layout.rows.tolist() == [0, 3, 4, 5, 9]


def test_flatten_and_views_are_inverse_and_views_do_not_copy(tensors: dict[str, Any]) -> None:
    layout = Layout.of(tensors)
    vector = layout.flatten(dict(reversed(tensors.items())))  # order of the mapping does not matter
    views = layout.views(vector)
    for name, tensor in tensors.items():
        assert views[name].shape == tensor.shape
        assert np.array_equal(views[name], tensor)
    views["bias"][0] = 42
    assert vector[192] == 42
    padding = np.ones(layout.total, bool)
    for entry in layout.entries:
        padding[entry.offset : entry.stop] = False
    assert padding.sum() == layout.total - layout.parameters
    assert not vector[padding].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torch_tensors_of_any_precision_and_stride_are_taken(dtype: torch.dtype) -> None:
    source = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = torch.nn.Parameter(source).t()  # not contiguous, and part of a graph
    layout = Layout.of({"a": turned})
    assert layout.entries[0].dtype == str(dtype).removeprefix("torch.")
    assert np.array_equal(layout.views(layout.flatten({"a": turned}))["a"], source.t().to(torch.float32).numpy())


def test_numpy_halves_and_strides_are_taken() -> None:
    source = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float16)
    strided = source[::2, ::-3]
    layout = Layout.of({"a": strided})
    assert np.array_equal(layout.views(layout.flatten({"a": strided}))["a"], strided.astype(np.float32))


def test_what_differs_is_named(tensors: dict[str, Any]) -> None:
    layout = Layout.of(tensors)
    with pytest.raises(FusionError, match="'bias' is missing"):
        layout.flatten({name: t for name, t in tensors.items() if name != "bias"})
    with pytest.raises(FusionError, match=r"'conv' has shape \(4, 18\), the layout has \(4, 2, 3, 3\)"):
        layout.flatten({**tensors, "conv": tensors["conv"].reshape(4, 18)})
    with pytest.raises(FusionError, match="'head' is not in the layout"):
        layout.flatten({**tensors, "head": tensors["bias"]})
    with pytest.raises(FusionError, match=r"shape \(447,\), the layout needs \(448,\)"):
        layout.views(np.zeros(447, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_in_float32_are_refused_by_name(tensors: dict[str, Any], value: float) -> None:
    layout = Layout.of(tensors)
    conv = tensors["conv"].astype(np.float64)
    conv[1, 1, 1, 1] = value
    with pytest.raises(FusionError, match="'conv' is not finite"):
        layout.flatten({**tensors, "conv": conv})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one tensor"),
        ({"steps": np.zeros(3, np.int64)}, "'steps' has dtype int64"),
        ({"none": np.zeros((3, 0), np.float32)}, "'none' has shape"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        Layout.of(tensors)


def test_json_gives_the_same_layout_and_digest(tensors: dict[str, Any]) -> None:
    layout = Layout.of(tensors)
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.digest == layout.digest
    assert Layout.of({**tensors, "bias": np.zeros(8, np.float32)}).digest != layout.digest
    assert Layout.of(dict(reversed(tensors.items()))).digest != layout.digest
    assert len(layout.digest) == 64


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"entries": [], "total": 0}', '{"entries": [{}]}'])
def test_json_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(FusionError):
        Layout.from_json(text)


def test_a_layout_that_overlaps_is_refused() -> None:
    with pytest.raises(FusionError, match="'b' starts at 64, expected 128"):
        Layout((Entry("a", (100,), "float32", 0, 100), Entry("b", (1,), "float32", 64, 1)), 192)


def test_fusing_arrays_imports_neither_torch_nor_ray() -> None:
    program = """
import sys
import numpy as np
from condu_ray.fusion.forget import forget
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import FusionState, objects
from condu_ray.fusion.unify import unify
layout = Layout.of({"a": np.ones((2, 3), np.float32)})
state = unify(FusionState.empty(layout, "row"), "x", layout.flatten({"a": np.ones((2, 3))}))
reconstruct(state, "x"), objects(forget(state, "x"))
print(sorted({"torch", "ray"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
