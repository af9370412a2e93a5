"""Opens an open_clip model by name and tag, local checkpoint, local folder, or the one that ships with the package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import nn

from condu_ray.config import DEFAULT_MODEL, DomainFeatures, ModelSpec
from condu_ray.errors import ModelError, nearest
from condu_ray.models.clip import Clip

SHIPPED = Path(__file__).parent / "shipped"
LOCAL_DIR = "local-dir:"
_OF_A_TAG = ("mean", "std", "interpolation", "resize_mode")


def load(
    spec: ModelSpec, device: str = "cpu", expect_sha256: str | None = None, domains: DomainFeatures = "distributions"
) -> Clip:
    """Loads θ⁰ in evaluation mode, without gradients.

    Raises ModelError for an unknown name, tag or file, for a model without pretrained weights (open_clip would hand out
    random ones), for weights named beside a folder that brings its own (open_clip would ignore them), and for weights
    whose digest is not `expect_sha256` (those of the store).
    """
    name = f"{LOCAL_DIR}{SHIPPED}" if spec.name == DEFAULT_MODEL else spec.name
    _check_names(spec, name)
    # open_clip logs to the root logger, and what it says there is said better by the errors below.
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL + 1)
    try:
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            name, pretrained=spec.pretrained, device=device, require_pretrained=True, **_preprocessing(spec)
        )
        tokenizer = _tokenizer(name)
    except Exception as error:
        # open_clip raises RuntimeError, ValueError, OSError and the hub's own errors for the same few mistakes.
        lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
        reason = " ".join(lines)[:300] or type(error).__name__
        raise ModelError(
            f"model {spec.name}, weights {spec.pretrained or 'of that folder'}: {reason}",
            "check the name, the tag (open_clip.list_pretrained()) and that the weights belong to this model",
        ) from error
    finally:
        logging.root.setLevel(level)
    model.eval().requires_grad_(False)
    if device != "cpu":
        torch.backends.cudnn.deterministic = True  # some of its gradients of convolutions add up in any order
    channels_last = _is_convolutional(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    digest = weights_sha256(model)
    if expect_sha256 and digest != expect_sha256:
        raise ModelError(
            f"model {spec.name} has weights {digest[:12]}, the store was made with {expect_sha256[:12]}",
            "give the base model that the store was created with, or use another --store",
        )
    return Clip(
        spec=spec,
        model=model,
        sha256=digest,
        train_transform=train_transform,
        eval_transform=eval_transform,
        tokenizer=tokenizer,
        channels_last=channels_last,
        domains=domains,
    )


@lru_cache(maxsize=8)
def _tokenizer(name: str) -> Any:
    """Read once a process: its vocabulary takes longer than a small model, and a session opens its model often."""
    return open_clip.get_tokenizer(name)


def _check_names(spec: ModelSpec, name: str) -> None:
    if name.startswith((LOCAL_DIR, "hf-hub:")):
        if spec.pretrained is not None:
            raise ModelError(
                f"model {spec.name} brings its own weights, so {spec.pretrained} would be ignored",
                "leave --pretrained out",
            )
        folder = Path(name.removeprefix(LOCAL_DIR))
        if name.startswith(LOCAL_DIR) and not (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"model {spec.name}: no open_clip_config.json there",
                "name a folder with that file and open_clip_model.safetensors",
            )
        with suppress(OSError, ValueError, AttributeError):  # open_clip says what is wrong with that file
            config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
            _check_packages(spec, config.get("model_cfg", {}))
        return
    if name not in open_clip.list_models():
        raise ModelError(f"model {name} is not an open_clip name", nearest(name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if spec.pretrained is None:
        known = ", ".join(tags[:8]) or "no tags known"
        raise ModelError(f"model {name} needs weights", f"add --pretrained with a checkpoint file or a tag ({known})")
    tag = _tag(spec.pretrained)
    if tag not in tags and not Path(spec.pretrained).is_file():
        raise ModelError(
            f"model {name}: {spec.pretrained} is neither a checkpoint file nor a tag of this model", nearest(tag, tags)
        )
    config, quick = open_clip.get_model_config(name) or {}, f"{name}-quickgelu"
    of_tag = open_clip.get_pretrained_cfg(name, tag) if tag in tags else {}
    if of_tag.get("quick_gelu") and not config.get("quick_gelu") and quick in open_clip.list_models():
        raise ModelError(
            f"model {name}: the weights {spec.pretrained} were trained with QuickGELU, which it lacks",
            f"use --model {quick}",
        )
    _check_packages(spec, config)


def _check_packages(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    text = config.get("text_cfg", {})
    wanted = isinstance(text, dict) and (text.get("hf_model_name") or text.get("hf_tokenizer_name"))
    if wanted and importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"model {spec.name} reads texts with the package transformers, which is not installed",
            "install it: uv sync --extra hf, or pip install 'condu-ray[hf]'",
        )


def _tag(pretrained: str) -> str:
    return pretrained.lower().replace("-", "_")


def _preprocessing(spec: ModelSpec) -> dict[str, Any]:
    """How pictures are prepared for a checkpoint file: as for the weights that open_clip has for that name, where all
    of them agree. A tag or a folder says it itself; a file does not, and open_clip would take OpenAI's."""
    if spec.pretrained is None:
        return {}
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if _tag(spec.pretrained) in tags:
        return {}
    known = [open_clip.get_pretrained_cfg(spec.name, tag) for tag in tags]
    found = [{f"image_{key}": each[key] for key in _OF_A_TAG if each.get(key)} for each in known]
    return found[0] if found and all(each == found[0] for each in found) else {}


def _is_convolutional(model: nn.Module) -> bool:
    """Whether channels last are faster; not where oneDNN's gradient of a kernel would write where it must not."""
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    unsafe = any(m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 8 for m in kernels)
    return len(kernels) > 4 and not unsafe


def device_of(gpu: Literal["auto", "no"]) -> str:
    """Where one process looks at pictures: on a GPU, if it sees one and may use it."""
    return "cuda" if gpu == "auto" and torch.cuda.is_available() else "cpu"


def weights_sha256(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer, in name order."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
