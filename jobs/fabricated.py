"""A store of tasks that nobody trained: deltas, prototypes and classes drawn at random, to measure time and memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from condu_ray.config import SessionConfig
from condu_ray.engine.plan import header_of
from condu_ray.methods import registry
from condu_ray.models.load import load
from condu_ray.sources import resolve
from condu_ray.store import Manifest, Store, TaskCard, create_store
from condu_ray.store.manifest import ObjectRef
from condu_ray.voting.prototypes import FeatureSums, make_prototypes

CLASSES = 4
SIZE = 1e-3  # of a delta's entries; what fine-tuning moves is of this order


def fabricate(folder: Path, tasks: int, pictures: Tensor, **settings: object) -> Store:
    """Makes a store with one version of so many tasks; settings by dotted names with `__` for the dot.

    Every picture is answered by `vote.k` experts and θ⁰, never adaptive. Prototypes are the features of `pictures`
    f32[N, 3, H, W], dealt out to the tasks, so that these pictures spread over all experts.
    """
    given = {name.replace("__", "."): value for name, value in settings.items()}
    fixed = {"store": str(folder), "vote.router": "cosine", "vote.adaptive": "no"}
    config: SessionConfig = resolve({**fixed, **given})[0]
    store = create_store(config.store, header_of(config)[0])
    if store.versions():
        return store
    clip, method = load(config.model_spec), registry.get(config.method)
    layout, random = method.layout(clip, config), np.random.default_rng(0)
    state = method.empty(layout, config)
    with torch.no_grad():
        features = clip.images(pictures).cpu().numpy()
    features -= features.mean(axis=0)  # random weights see nearly the same in every picture
    width = features.shape[1]
    objects: dict[str, ObjectRef] = {}
    cards = []
    for uid in range(1, tasks + 1):
        name, delta = f"task-{uid}", np.zeros(layout.total, np.float32)
        for values in layout.views(delta).values():
            values[...] = SIZE * random.standard_normal(values.shape, np.float32)
        state = state.add(name, delta)
        text = np.resize(features[uid - 1 :: tasks], (CLASSES, width))
        prototypes = make_prototypes(FeatureSums.zero(CLASSES, width), text, np.empty((0, width), np.float32))
        objects[f"prototypes-{uid}"] = store.put("features", f"prototypes-{uid}", prototypes.arrays())
        classes = [f"thing {number} of {name}" for number in range(CLASSES)]
        cards.append(
            TaskCard(
                name=name,
                uid=uid,
                classes=classes,
                templates=["a photo of a {c}."],
                source="drawn",
                fingerprint=name,
                method=config.method,
                train_key=name,
                learned_in=1,
                pictures={"train": 0, "test": 0},
            )
        )
    for name, arrays in state.objects().items():
        objects[name] = store.put("state", name, arrays)
    store.commit(
        Manifest(
            version=1,
            kind="learn",
            tasks=cards,
            objects=objects,
            state={"method": state.meta()},
            settings={"vote": config.vote.model_dump()},
            message="drawn at random",
        )
    )
    return store
