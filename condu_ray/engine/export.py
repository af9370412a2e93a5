"""One task's expert as plain weights: a safetensors file that needs nothing of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from condu_ray.config import ModelSpec
from condu_ray.engine.merge import WEIGHTS, Weights
from condu_ray.errors import ConfigError, ModelError
from condu_ray.methods import registry
from condu_ray.methods.experts import Experts
from condu_ray.methods.states import FusedState
from condu_ray.methods.stored import config_of, layout_of, state_of
from condu_ray.models.load import load
from condu_ray.store import Manifest, Store
from condu_ray.voting.open import buffers_of


def export(store: Store, manifest: Manifest, task: str, out: Path) -> int:
    """Writes the expert's weights to `out`, all tensors of the base model by their names; returns the bytes written.

    What follows the towers (models/head.py) stands beside them, as `head.weight` and so on.

    open_clip loads the file as the checkpoint of the model that the store was made with. Raises NotFound for an
    unknown task, ModelError for another base, ConfigError where the file cannot be written.
    """
    manifest.card(task)
    merged = str(store.header.model["name"]).startswith(WEIGHTS)
    if not out.name or out.is_dir():
        raise ConfigError(f"--output {out} is a folder", "give the path of a file")
    if merged:
        base = _base_of(store)
        if any(out.resolve() == file.resolve() for file in base.files):
            raise ConfigError(f"--output {out} is the base that this store needs", "give the path of another file")
        if base.path.is_dir() and out.suffix == ".safetensors" and out.resolve().parent == base.path.resolve():
            what = f"--output {out} would be one more shard of the base that this store needs"
            raise ConfigError(what, "give a file in another folder")
    weights = _of_weights if merged else _of_model
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights(store, manifest, task).items()}
    part = out.with_name(f"{out.name}.part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(out)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"--output {out} cannot be written ({error})", "give a file in a folder that can be written"
        ) from None
    return out.stat().st_size


def _of_model(store: Store, manifest: Manifest, task: str) -> dict[str, Tensor]:
    """open_clip's own state dict, with the expert's tensors in it."""
    header = store.header
    clip = load(ModelSpec(**header.model), expect_sha256=header.model_sha256)
    state = state_of(store, manifest)
    method, layout = registry.get(header.method), layout_of(header)
    experts = Experts(clip, method, layout, config_of(header), state, buffers_of(store, manifest))
    own = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    head = experts.head(task)
    return own | dict(experts.merged(task) or {}) | (head.tensors() if head else {})


def _base_of(store: Store) -> Weights:
    return Weights(Path(str(store.header.model["name"]).removeprefix(WEIGHTS)))


def _of_weights(store: Store, manifest: Manifest, task: str) -> dict[str, Tensor]:
    """The base's own tensors, those that are fused moved by the task's delta and rounded once to their dtype; running
    statistics as the task had them."""
    header, layout, base = store.header, layout_of(store.header), _base_of(store)
    if base.sha256() != header.model_sha256:
        raise ModelError(f"{base.path} has changed since the store was made", "put the base back from a copy")
    state = state_of(store, manifest)
    assert isinstance(state, FusedState), "merged weights are fused"
    moved = layout.flatten({entry.name: base[entry.name] for entry in layout.entries})
    state.add_to(task, moved)
    found = {**layout.views(moved), **buffers_of(store, manifest).get(task, {})}
    return {name: torch.tensor(found[name]).to(base[name].dtype) if name in found else base[name] for name in base}
