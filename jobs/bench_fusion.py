"""How fast fusing is, beside a copy of the bytes that have to move and beside the dense formula; all in one run.

    uv run python jobs/bench_fusion.py                    ViT-B/16 (149.6 M parameters) at eleven tasks, about 2 min
    uv run python jobs/bench_fusion.py --json             the same numbers as one JSON object
    uv run python jobs/bench_fusion.py --vehicles         what else could make the pass, side by side
    uv run python jobs/bench_fusion.py --effects [STORE]  drift, order and forgetting, of drawn deltas or real ones
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
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ending import job
from numpy.typing import NDArray

from condu_ray.catalogue import Triggers
from condu_ray.fusion import kernels, reference, signs, threads, triggers
from condu_ray.fusion.groups import group_count
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import add_to
from condu_ray.fusion.signs import SignedTask, SignState
from condu_ray.fusion.sizes import Sizes
from condu_ray.fusion.state import FusionState, Task, load, objects
from condu_ray.fusion.unify import EmptyTrigger, unify
from condu_ray.store import open_store
from condu_ray.store.local import LocalStore
from condu_ray.store.manifest import ObjectRef, StoreHeader

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
    held = SignedTask("t0", 0, np.ones(groups, np.float32), rare(layout, rng, 1), Sizes.none(layout, "row"))
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


def drawn(tasks: int = 12) -> tuple[Layout, dict[str, NDArray[np.float32]]]:
    """Deltas of 0.5 M parameters: Student t(3) values, scales of tensors, rows and a profile that all tasks share.

    Two tasks' signs agree a little more often than not.
    """
    rng, layout = np.random.default_rng(0), layout_of(500_000)
    profile = np.exp(rng.normal(0, 0.7, layout.total))
    shared, found = rng.standard_normal(layout.total), {}
    for number in range(tasks):
        values = np.abs(rng.standard_t(3, layout.total)) * profile
        values *= np.sign(0.6 * shared + rng.standard_normal(layout.total))
        scaled = {
            name: part
            * np.exp(rng.normal(0, 0.7))
            * np.exp(rng.normal(0, 0.5, (part.shape[0],) + (1,) * (part.ndim - 1)))
            for name, part in layout.views(values.astype(np.float32)).items()
        }
        found[f"t{number}"] = 1e-3 * layout.flatten(scaled)
    return layout, found


def learned_deltas(url: str) -> tuple[Layout, dict[str, NDArray[np.float32]]]:
    """The deltas that a store made with --method finetune holds."""
    from condu_ray.methods.stored import layout_of as layout_in  # brings torch, which no session here needs
    from condu_ray.methods.stored import state_of

    store = open_store(url)
    state = state_of(store, store.manifest())
    return layout_in(store.header), {name: np.asarray(state.delta(name)) for name in state.tasks}


def effects(url: str) -> dict[str, Any]:
    """Deltas of a store (without one: drawn ones) fused by masks and by signs, a rescaler a row.

    changed, moved: share of the older tasks' bits that each session changed, mean relative L1 change of their
    reconstructions. order: mean relative L1 distance of each task's reconstruction to that of the reverse order, and
    mean relative L2 error to the delta in both. forget: the same distance, of all others, between forgetting the
    first task and never having learned it; cosine of u with the forgotten delta before, after, and never learned.
    bf16: mean relative L1 distance of reconstructions when u is rounded to bfloat16.
    """
    layout, deltas = learned_deltas(url) if url else drawn()
    found = dict[str, Any](parameters=layout.parameters, tasks=list(deltas))
    kinds: tuple[Triggers, ...] = ("mask", "sign")
    for kind in kinds:
        found[kind] = _effects(layout, kind, deltas)
    return found


def _effects(layout: Layout, kind: Triggers, deltas: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    def learned(names: list[str]) -> triggers.State:
        state = triggers.empty(layout, "row", kind)
        for name in names:
            state = triggers.unify(state, name, deltas[name])
        return state

    def apart(one: triggers.State, other: triggers.State, names: list[str]) -> float:
        pairs = [(triggers.reconstruct(one, name), triggers.reconstruct(other, name)) for name in names]
        return float(np.mean([np.abs(a - b).sum(dtype=float) / np.abs(a).sum(dtype=float) for a, b in pairs]))

    def error(state: triggers.State) -> float:
        return float(
            np.mean([np.linalg.norm(triggers.reconstruct(state, n) - d) / np.linalg.norm(d) for n, d in deltas.items()])
        )

    def cosine(state: triggers.State, delta: NDArray[np.float32]) -> float:
        u, size = (state.u, delta) if isinstance(state, FusionState) else (state.magnitudes.astype(float), abs(delta))
        return float(u @ size / np.linalg.norm(u) / np.linalg.norm(size))

    names, changed, moved = list(deltas), list[float](), list[float]()
    state = learned(names[:1])
    for number in range(1, len(names)):
        before, state = state, learned(names[: number + 1])
        moved.append(apart(before, state, names[:number]))
        if isinstance(before, FusionState) and isinstance(state, FusionState):
            bits = [(before.mask(name) != state.mask(name)).sum() for name in names[:number]]
            changed.append(float(np.mean(bits)) / layout.parameters)
    turned, without = learned(names[::-1]), learned(names[1:])
    gone = triggers.forget(state, names[0])
    own = deltas[names[0]]
    half = state
    if isinstance(state, FusionState):
        raw = state.u.view(np.uint32)
        rounded = ((raw + 0x7FFF + (raw >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        half = replace(state, u=rounded)
    return {
        "changed": changed,
        "moved": moved,
        "order_distance": apart(state, turned, names),
        "order_errors": [error(state), error(turned)],
        "forget_distance": apart(gone, without, names[1:]),
        "forget_cosines": [cosine(state, own), cosine(gone, own), cosine(without, own)],
        "bf16_distance": apart(state, half, names),
    }


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
        found[f"{name} {torch.get_num_threads()} threads"] = best(partial(run, step))
    return found


@job
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=149_600_000)
    parser.add_argument("--tasks", type=int, default=11)
    parser.add_argument("--granularity", choices=("row", "tensor", "tensor_mean", "l1"), default="row")
    parser.add_argument("--vehicles", action="store_true")
    parser.add_argument("--fuzz", type=int, metavar="SESSIONS")
    parser.add_argument(
        "--effects", metavar="STORE", nargs="?", const="", help="a store of --method finetune, or drawn"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.session:
        session(asked.session, asked.granularity)
        return
    if asked.fuzz:
        found: dict[str, Any] = dict(fuzz(asked.fuzz))
    elif asked.effects is not None:
        found = effects(asked.effects)
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
