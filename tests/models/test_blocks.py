"""Domain features: channel means of a tower's blocks, of any tower, without changing what the tower says."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from condu_ray.models.blocks import MOST_CHANNELS, blocks_of, channel_means, spread, watched
from condu_ray.models.clip import Clip


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_features_are_those_of_the_plain_pass(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    features, domains, _ = tiny_clip.features(pixels)
    assert torch.equal(features, tiny_clip.images(pixels))
    first = tiny_clip.model.get_submodule("visual.transformer.resblocks.0")
    with watched([first]) as seen:
        tiny_clip.images(pixels)
    assert torch.equal(domains, seen[0])  # of two blocks, all but the last
    assert domains.shape == (3, 64)


@torch.no_grad()
def test_no_hook_stays(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    tiny_clip.features(pixels)
    assert not any(module._forward_hooks for module in tiny_clip.model.modules())


def test_a_pass_of_another_thread_is_not_watched() -> None:
    block = nn.Linear(2, 2)
    with watched([block]) as seen:
        other = threading.Thread(target=lambda: block(torch.ones(1, 2)))
        other.start()
        other.join()
        assert not seen
        block(torch.ones(1, 2))
    assert list(seen) == [0]


def test_blocks_are_the_children_of_the_heaviest_list() -> None:
    stages = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)))
    tower = nn.Sequential(nn.ModuleDict({"stem": nn.Linear(3, 8), "stages": stages}))
    assert blocks_of(tower) == list(stages)
    assert blocks_of(nn.Linear(3, 3)) == []


@pytest.mark.parametrize(
    ("channels", "chosen"),
    [
        ([16, 24, 40, 80, 112, 192, 320], [0, 1, 2, 3, 4, 5]),  # all but the last: 464
        ([768] * 12, [2, 8]),  # wide ones: two
        ([192] * 12, [2, 8]),
        ([64] * 3, [0, 1]),
        ([64], [0]),
    ],
)
def test_which_blocks(channels: list[int], chosen: list[int]) -> None:
    assert spread(channels) == chosen
    assert sum(channels[each] for each in chosen) <= max(MOST_CHANNELS, 2 * max(channels))


def test_means_are_over_places_and_over_tokens() -> None:
    maps, tokens = torch.rand(2, 5, 4, 4), torch.rand(2, 7, 5)
    torch.testing.assert_close(channel_means(maps), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(channel_means(tokens), tokens.mean(dim=1))
