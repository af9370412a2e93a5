"""How fast fusing is, beside a copy of the bytes that have to move and beside the dense formula; all in one run.

    uv run python jobs/bench_fusion.py                    ViT-B/16 (149.6 M parameters) at eleven tasks, about 2 min
    uv run python jobs/bench_fusion.py --json             the same numbers as one JSON object
    uv run python jobs/bench_fusion.py --vehicles         what else could make the pass, side by side
    uv run python jobs/bench_fusion.py --fuzz 10000       random sessions against the dense formula, bit for bit

States are synthetic (time does not depend on what the bits say): normal values, births of half the coordinates, flips
of a quarter in the second session, an eighth in the third, and so on. Memory: about 4 GB at the default size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion import kernels, reference, signs, threads
from condu_ray.fusion.groups import group_count
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import add_to
from condu_ray.fusion.signs import SignedTask, SignState
from condu_ray.fusion.state import FusionState, Task, load, objects
from condu_ray.fusion.unify import EmptyTrigger, unify
from condu_ray.store.local import LocalStore
from condu_ray.store.manifest import StoreHeader

LAYER = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]  # of a transformer
REFERENCE_PARAMETERS = 1_000_000
GROWTH_PARAMETERS = 20_000_000
SIZES = (1_000_000, 20_000_000, 60_000_000)


def layout_of(parameters: int) -> Layout:
    """Layers of a transformer 768 wide until there are so many parameters; the last matrix is cut to fit."""
    shapes, left = list[tuple[int, ...]](), parameters
    while left >= 768:
        shape = LAYER[len(shapes) % len(LAYER)]
        if int(np.prod(shape)) > left:
            shape = (left // 768, 768)
        shapes.append(shape)
        left -= int(np.prod(shape))
    return Layout.of({f"{place}": np.broadcast_to(np.float32(0), shape) for place, shape in enumerate(shapes)})


def normal(layout: Layout, rng: np.random.Generator) -> NDArray[np.float32]:
    vector = rng.standard_normal(layout.total, np.float32)
    for entry, end in zip(layout.entries, [*layout.offsets[1:], layout.total], strict=True):
        vector[entry.stop : end] = 0
    return vector


def rare(layout: Layout, rng: np.random.Generator, halvings: int) -> NDArray[np.uint8]:
    """A bit plane with about one bit in 2^halvings."""
    plane = rng.integers(0, 256, layout.total // 8, np.uint8)
    for _ in range(halvings - 1):
        plane &= rng.integers(0, 256, layout.total // 8, np.uint8)
    return plane


def masks(layout: Layout, tasks: int, granularity: Any = "row") -> FusionState:
    """A state of so many tasks."""
    rng, groups = np.random.default_rng(0), group_count(layout, granularity)
    held = tuple(
        Task(f"t{n}", n, np.ones(groups), rng.uniform(0.5, 2, groups).astype(np.float32), rare(layout, rng, 1), n)
        for n in range(tasks)
    )
    flips = {n: rare(layout, rng, min(n + 1, 9)) for n in range(1, tasks)}
    return FusionState(layout, granularity, normal(layout, rng), held, flips, tasks)


def best(work: Callable[[], Any], times: int = 3) -> float:
    """Least seconds of some runs."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def copying(moved: float) -> float:
    """Seconds of a plain copy by all cores that reads half of `moved` bytes and writes the other half."""
    size = int(moved / 2) // 8
    source, target = np.ones(size), np.ones(size)
    edges = np.linspace(0, size, 16 * threads.cores() + 1).astype(int)
    parts = [slice(int(a), int(b)) for a, b in pairwise(edges)]
    return best(lambda: threads.each(lambda part: np.copyto(target[part], source[part]), parts), 5)


def resident(field: str) -> int:
    """Bytes by /proc: VmRSS now, VmHWM the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def mask_figures(layout: Layout, tasks: int, granularity: Any) -> dict[str, float]:
    """The session that adds task number `tasks`, in place."""
    state, delta = masks(layout, tasks - 1, granularity), normal(layout, np.random.default_rng(1))
    unify(state, "warm", delta, out=state.u)
    before = resident("VmRSS")
    reset_peak()
    took = best(lambda: unify(state, "new", delta, out=state.u))
    extra = resident("VmHWM") - before
    planes = (tasks - 1) + max(0, tasks - 2)
    copy = copying(layout.total * (12 + (planes + 2) / 8))
    start = normal(layout, np.random.default_rng(2))
    restore = best(lambda: add_to(state, "t0", start))
    restore_copy = copying(layout.total * (12 + (1 + max(0, tasks - 2)) / 8))
    return {
        "seconds": took,
        "copy_seconds": copy,
        "ratio_to_copy": took / copy,
        "extra_bytes": extra,
        "reconstruct_seconds": restore,
        "reconstruct_ratio_to_copy": restore / restore_copy,
    }


def sign_figures(layout: Layout) -> dict[str, float]:
    rng, groups = np.random.default_rng(0), group_count(layout, "row")
    held = SignedTask("t0", 0, np.ones(groups, np.float32), rare(layout, rng, 1))
    magnitudes = rng.integers(0, 1 << 17, layout.total, np.uint32)
    state = SignState(layout, "row", magnitudes, np.ones(groups, np.int64), (held,), 1)
    delta = normal(layout, rng)
    signs.unify(state, "warm", delta, out=state.magnitudes)
    took = best(lambda: signs.unify(state, "new", delta, out=state.magnitudes))
    copy = copying(layout.total * 12.125)
    start = normal(layout, rng)
    restore = best(lambda: signs.add_to(state, "t0", start))
    return {
        "sign_seconds": took,
        "sign_ratio_to_copy": took / copy,
        "sign_reconstruct_ratio_to_copy": restore / copying(layout.total * 12.125),
    }


def reference_seconds(tasks: int, granularity: Any) -> float:
    """Seconds a parameter of the dense formula, for the session that adds task number `tasks`."""
    layout = layout_of(REFERENCE_PARAMETERS)
    state, delta = masks(layout, tasks - 1, granularity), normal(layout, np.random.default_rng(1))
    held = np.array([state.mask(name) for name in state.names])
    norms, rescalers = (np.array([getattr(task, n) for task in state.tasks]) for n in ("norms", "rescalers"))
    dense = reference.Dense(state.u, held, norms, rescalers)
    return best(lambda: reference.add(dense, layout, granularity, delta), 2) / layout.parameters


def pass_seconds(parameters: int, tasks: int, granularity: Any) -> float:
    layout = layout_of(parameters)
    state, delta = masks(layout, tasks - 1, granularity), normal(layout, np.random.default_rng(1))
    unify(state, "warm", delta, out=state.u)
    return best(lambda: unify(state, "new", delta, out=state.u))


def session_figures(layout: Layout, tasks: int, granularity: Any) -> dict[str, float]:
    """A whole session in a process of its own: state and delta mapped from a store, fused, written back."""
    header = StoreHeader(method="condu", model={}, model_sha256="", layout=json.loads(layout.to_json()))
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore.create(Path(folder) / "store", header)
        state = masks(layout, tasks - 1, granularity)
        refs = {name: store.put("before", name, arrays) for name, arrays in objects(state).items()}
        refs["delta"] = store.put("train", "delta", {"delta": normal(layout, np.random.default_rng(1))})
        Path(folder, "refs.json").write_text(json.dumps({n: r.model_dump() for n, r in refs.items()}))
        del state
        command = [sys.executable, __file__, "--session", folder, "--granularity", granularity]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def session(folder: Path, granularity: Any) -> None:
    """What the fusing actor does between two versions; prints its peak memory, seconds and the bytes it wrote."""
    from condu_ray.store.manifest import ObjectRef

    begun, store = time.perf_counter(), LocalStore.open(folder / "store")
    refs = {n: ObjectRef(**r) for n, r in json.loads((folder / "refs.json").read_text()).items()}
    delta = store.get(refs.pop("delta"))["delta"]
    layout = Layout.from_json(json.dumps(store.header.layout))
    state = unify(load(layout, granularity, {name: store.get(ref) for name, ref in refs.items()}), "new", delta)
    new = {name: arrays for name, arrays in objects(state).items() if name not in refs}
    written = sum(store.put("after", name, arrays).bytes for name, arrays in new.items())
    flips = next(sum(a.nbytes for a in arrays.values()) for name, arrays in new.items() if name.startswith("flips"))
    peak = resident("VmHWM")
    took = time.perf_counter() - begun
    figures = {"session_peak_bytes": peak, "disk_bytes_per_session": written, "flips_bytes": flips}
    print(json.dumps(figures | {"session_seconds": took}))


def measure(parameters: int, tasks: int, granularity: Any) -> dict[str, Any]:
    layout = layout_of(parameters)
    found: dict[str, Any] = {
        "parameters": layout.parameters,
        "tasks": tasks,
        "granularity": granularity,
        "vehicle": "numba" if layout.total >= kernels.COMPILED_FROM else "numpy",
        "threads": threads.cores(),
    }
    found |= mask_figures(layout, tasks, granularity)
    found |= sign_figures(layout)
    dense = reference_seconds(tasks, granularity) * layout.parameters
    found |= {"reference_parameters": REFERENCE_PARAMETERS, "speedup_vs_reference": dense / found["seconds"]}
    found["t64_over_t8"] = pass_seconds(GROWTH_PARAMETERS, 64, granularity) / pass_seconds(
        GROWTH_PARAMETERS, 8, granularity
    )
    sizes = {size: pass_seconds(size, tasks, granularity) for size in SIZES} | {layout.parameters: found["seconds"]}
    found["ns_per_parameter"] = {str(size): 1e9 * took / size for size, took in sizes.items()}
    found |= session_figures(layout, tasks, granularity)
    floor = 4 * layout.parameters + layout.parameters // 8 + found["flips_bytes"]
    found["disk_bytes_over_floor"] = found["disk_bytes_per_session"] / floor
    return found


def fuzz(count: int) -> dict[str, int]:
    """Random sessions by both vehicles against the dense formula: u and masks bit for bit, rescalers to a rounding."""
    warnings.simplefilter("ignore", EmptyTrigger)
    done = {"sessions": 0, "differences": 0}
    seed = 0
    while done["sessions"] < count:
        rng = np.random.default_rng(seed)
        seed += 1
        choices: list[tuple[int, ...]] = [(), (7,), (130,), (3, 5), (40, 24), (6, 3, 3, 3), (5, 200), (1, 33), (70, 64)]
        shapes = [choices[i] for i in rng.integers(0, len(choices), rng.integers(1, 5))]
        layout = Layout.of({str(i): np.zeros(shape, np.float32) for i, shape in enumerate(shapes)})
        granularity: Any = ("l1", "tensor_mean", "tensor", "row")[seed % 4]
        kernels.COMPILED_FROM = 0 if seed % 2 else 1 << 62
        state, dense = FusionState.empty(layout, granularity), None
        grid, scale = rng.random() < 0.5, np.exp(rng.uniform(-11, 2))
        deltas = []
        for number in range(min(int(rng.integers(1, 20)), count - done["sessions"])):
            drawn = rng.integers(-3, 4, layout.total) * rng.integers(0, 2, layout.total) / 4
            values = drawn if grid else rng.standard_t(3, layout.total) * scale
            delta = layout.flatten(layout.views(values.astype(np.float32)))
            state = unify(state, f"t{number}", delta)
            if dense is None:
                dense = reference.sessions(layout, granularity, [delta])[0]
            else:
                dense = reference.add(dense, layout, granularity, delta)
            deltas.append(delta)
            same = np.array_equal(state.u.view(np.uint32), dense.u.view(np.uint32))
            same &= np.array_equal(np.array([state.mask(name) for name in state.names]), dense.masks)
            rescalers = np.array([task.rescalers for task in state.tasks])
            same &= bool(np.allclose(rescalers, dense.rescalers, rtol=1.2e-7))
            done["sessions"] += 1
            done["differences"] += not same
    return done


def vehicles(tasks: int, granularity: Any) -> dict[str, float]:
    """Seconds for one session at 20 M parameters by each vehicle, and how long each needs before its first."""
    layout = layout_of(GROWTH_PARAMETERS)
    state, delta = masks(layout, tasks - 1, granularity), normal(layout, np.random.default_rng(1))
    found = {}
    for name, border in (("numpy", 1 << 62), ("numba", 0)):
        kernels.COMPILED_FROM = border
        begun = time.perf_counter()
        unify(state, "warm", delta)
        found[f"{name} first"] = time.perf_counter() - begun
        for workers in sorted({1, threads.cores()}):
            work = lambda workers=workers: unify(state, "new", delta, out=state.u, threads=workers)  # noqa: E731
            found[f"{name} {workers} threads"] = best(work)
    return found | torch_vehicles(state, delta)


def torch_vehicles(state: FusionState, delta: NDArray[np.float32]) -> dict[str, float]:
    """The pass by torch, eager and compiled: one rescaler a task, masks packed already, sums in any order."""
    import torch

    from condu_ray.fusion.planes import packed

    total, count = state.layout.total, len(state.tasks)
    codes = torch.from_numpy(packed(state.planes.masks(slice(0, total // 8)), 0, total))
    tables = []
    for first in range(0, count, 8):
        bits = np.arange(256)[:, None] >> np.arange(8) & 1
        own = np.array([task.rescalers[0] for task in state.tasks[first : first + 8]])
        on = bits[:, : len(own)]
        tables.append((torch.from_numpy(on @ own.astype(np.float64)), torch.from_numpy((on * own).max(1))))

    def one(u: Any, d: Any, codes: Any) -> Any:
        share = sum(table[code.int()] for (table, _), code in zip(tables, codes, strict=True))
        largest = torch.stack([top[code.int()] for (_, top), code in zip(tables, codes, strict=True)]).amax(0)
        positive = share * u + d > 0
        born = ((d > 0) == positive) & (d != 0)
        flipped = (codes.amax(0) != 0) & ((u < 0) == positive)
        size = torch.maximum(largest.float() * u.abs(), d.abs() * born)
        after = codes * ~flipped
        return torch.where(positive, size, -size), after, born, flipped, size, d.abs().double().sum()

    def run(step: Callable[..., Any]) -> None:
        for start in range(0, total, 1 << 20):
            here = slice(start, start + (1 << 20))
            _, after, *_, size, _ = step(torch.from_numpy(state.u[here]), torch.from_numpy(delta[here]), codes[:, here])
            for code in after:
                torch.bincount(code, size.double(), 256)

    found = {}
    for name, step in (("torch", one), ("torch.compile", torch.compile(one, dynamic=False))):
        begun = time.perf_counter()
        run(step)
        found[f"{name} first"] = time.perf_counter() - begun
        found[f"{name} {torch.get_num_threads()} threads"] = best(lambda step=step: run(step))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=149_600_000)
    parser.add_argument("--tasks", type=int, default=11)
    parser.add_argument("--granularity", choices=("row", "tensor", "tensor_mean", "l1"), default="row")
    parser.add_argument("--vehicles", action="store_true")
    parser.add_argument("--fuzz", type=int, metavar="SESSIONS")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.session:
        session(asked.session, asked.granularity)
        return
    if asked.fuzz:
        found: dict[str, Any] = dict(fuzz(asked.fuzz))
    elif asked.vehicles:
        found = dict(vehicles(asked.tasks, asked.granularity))
    else:
        found = measure(asked.parameters, asked.tasks, asked.granularity)
    if asked.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:32} {value:,.3f}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
