"""Opens a version of a store as a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from condu_ray.catalogue import info
from condu_ray.config import ModelSpec, VoteConfig
from condu_ray.errors import NotFound
from condu_ray.methods import registry
from condu_ray.methods.experts import Experts
from condu_ray.methods.stored import config_of, layout_of, state_of
from condu_ray.models.clip import Clip, Expert
from condu_ray.models.load import load
from condu_ray.store import Manifest, Store, StoreHeader, open_store
from condu_ray.voting.classifier import Classifier, TaskExpert
from condu_ray.voting.domains import Domain
from condu_ray.voting.prototypes import Prototypes
from condu_ray.voting.router import Calibrated, for_prototypes


def load_classifier(
    url: str | Path,
    version: int | None = None,
    vote: Mapping[str, Any] | None = None,
    clip: Clip | None = None,
    cache: int = 8,
) -> Classifier:
    """The version (None: the newest) as a classifier; `vote` changes settings of the vote by name.

    clip: the store's base model, where it is loaded already; its precision is that of the experts too. cache: how many
    experts that are as large as models are kept.

    Raises NotFound for no such store or version, DamagedObject, and ModelError for another base model.
    """
    store = open_store(url)
    manifest = store.manifest(version)
    experts = task_experts(store, manifest)
    clip = replace(clip, domains=store.header.domains) if clip else base_of(store.header)
    learned = manifest.settings.get("vote", {})
    settings, calibrated = VoteConfig(**{**learned, **(vote or {})}), Calibrated.from_state(manifest.state)
    if experts and any(getattr(settings, name) != getattr(VoteConfig(**learned), name) for name in ("k", "prototypes")):
        calibrated = for_prototypes(experts, settings, calibrated)
    return Classifier(
        clip,
        experts,
        expert_maker(store, manifest.version, clip),
        registry.vote_of(store.header.method, settings),
        calibrated,
        manifest.version,
        cache,
        info(store.header.method).single,
    )


def expert_maker(store: Store, version: int, clip: Clip) -> Callable[[str], Expert | None]:
    """Makes the experts of a version: task -> parameters in the precision of `clip`, None where θ⁰ answers."""
    manifest, header = store.manifest(version), store.header
    state, method = state_of(store, manifest), registry.get(header.method)
    buffers, half = buffers_of(store, manifest), clip.precision == "bf16"
    return Experts(clip, method, layout_of(header), config_of(header), state, buffers, half)


def base_of(header: StoreHeader, device: str = "cpu") -> Clip:
    """θ⁰ of a store. Raises ModelError where it cannot be loaded or has other weights."""
    return load(ModelSpec(**header.model), device, header.model_sha256, header.domains)


def check_pictured(manifest: Manifest) -> None:
    """Raises NotFound for a task that was merged from weights: without pictures there is nothing to route by."""
    for card in manifest.tasks:
        if f"prototypes-{card.uid}" not in manifest.objects:
            raise NotFound(f"task {card.name} was merged from weights, it has no classes", "use `condu-ray export`")


def task_experts(store: Store, manifest: Manifest) -> list[TaskExpert]:
    """The tasks of a version as voting sees them. Raises NotFound for a task that was merged from weights."""
    check_pictured(manifest)
    return [
        TaskExpert(
            card.name,
            tuple(card.classes),
            tuple(card.templates),
            Prototypes.from_arrays(store.get(manifest.objects[f"prototypes-{card.uid}"])),
            Domain.from_arrays(store.get(domain)) if (domain := manifest.objects.get(f"domain-{card.uid}")) else None,
        )
        for card in manifest.tasks
    ]


def buffers_of(store: Store, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Buffers that a task's training changed, by task."""
    return {
        card.name: store.get(manifest.objects[f"buffers-{card.uid}"])
        for card in manifest.tasks
        if f"buffers-{card.uid}" in manifest.objects
    }
