"""Stratified splits: seeded, and decided by the pictures' content, so that names and folder order do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from condu_ray.data.task import Labels, Split
from condu_ray.errors import DataError


def choose_test(
    labels: Labels,
    digests: Sequence[bytes],
    classes: Sequence[str],
    share: float,
    seed: int,
    every_class: bool = True,
) -> npt.NDArray[np.bool_]:
    """Returns for each picture whether it goes to the test split: `share` of each class, one or more on each side.

    Equal pictures of a class stay on one side. They do not take the test split more than one picture above its share
    where others can fill it, and half of the different pictures (or 1 - `share`) stay to train on. For a class with
    fewer than two different pictures raises DataError, or (`every_class` false) sets none aside.
    """
    test = np.zeros(len(labels), dtype=np.bool_)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        ranked = sorted((_rank(digests[i], seed), i) for i in members.tolist())
        groups = [[i for _, i in group] for _, group in groupby(ranked, key=lambda pair: pair[0])]
        if len(groups) < 2:
            if not every_class:
                continue
            what = "one picture" if len(members) == 1 else f"{len(members)} equal pictures"
            raise DataError(
                f"the class {name!r} has only {what}, too few to set one aside as a test",
                "add pictures, or give a test split yourself",
            )
        wanted = max(1, round(len(members) * share))
        most = min(round(len(groups) * max(share, 0.5)), len(groups) - 1)
        aside: list[list[int]] = []
        for group in groups:
            if wanted > 0 and len(group) <= wanted + 1 and len(aside) < most:
                aside.append(group)
                wanted -= len(group)
        for group in aside or [min(groups, key=len)]:
            test[group] = True
    return test


def sample(split: Split, count: int, seed: int) -> Split:
    """Returns a stratified part of `count` pictures in the split's order, or the split itself if it has no more.

    Every class keeps its share (largest remainders), and at least one picture where count allows.
    """
    if count < 1:
        raise DataError(f"a sample of {count} pictures was asked for", "ask for at least one")
    if count >= len(split):
        return split
    random = np.random.default_rng(seed)
    present, sizes = np.unique(split.labels, return_counts=True)
    quota = _quota(sizes, count)
    chosen = [
        random.permutation(np.flatnonzero(split.labels == label))[:take]
        for label, take in zip(present, quota.tolist(), strict=True)
    ]
    return split.take(np.sort(np.concatenate(chosen)))


def _rank(digest: bytes, seed: int) -> bytes:
    return hashlib.blake2b(digest, digest_size=16, key=str(seed).encode()).digest()


def _quota(sizes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Parts of `count` in proportion to `sizes`, none above its size; at least 1 each if count >= len(sizes)."""
    exact = sizes * (count / sizes.sum())
    quota: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    if count >= len(sizes):
        quota = np.maximum(quota, 1)
    while (missing := count - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        # Raising to 1 may have taken too many: then the largest surplus gives back, never below 1.
        usable = quota < sizes if step > 0 else quota > 1
        gap = np.where(usable, (exact - quota) * step, -np.inf)
        order = np.argsort(-gap, kind="stable")[: min(abs(missing), int(usable.sum()))]
        quota[order] += step
    return quota
