"""Domain features: what a tower's blocks put out, of any tower, without changing what the tower says."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from condu_ray.models.blocks import (
    MOST_CHANNELS,
    blocks_of,
    channel_means,
    map_deviations,
    spread,
    token_deviations,
    watch_list,
    watched,
)
from condu_ray.models.clip import Clip


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_of_a_transformer_the_deviations_of_patches_and_tokens(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    features, domains, _ = tiny_clip.features(pixels)
    assert torch.equal(features, tiny_clip.images(pixels))
    outputs: dict[str, torch.Tensor] = {}
    names = ("visual.conv1", "visual.transformer.resblocks.0")
    for name in names:
        tiny_clip.model.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: outputs.__setitem__(name, output), always_call=True
        )
    try:
        tiny_clip.images(pixels)
    finally:
        for name in names:
            tiny_clip.model.get_submodule(name)._forward_hooks.clear()
    patches, tokens = (outputs[name] for name in names)  # of two blocks, all but the last
    expected = [patches.std(dim=(2, 3), correction=0).sqrt(), tokens.std(dim=1, correction=0).sqrt()]
    torch.testing.assert_close(domains, torch.cat(expected, dim=1))
    assert domains.shape == (3, 128)


@torch.no_grad()
def test_of_convolutions_and_in_older_stores_means(tiny_clip: Clip, conv_clip: Clip, pixels: torch.Tensor) -> None:
    torch.testing.assert_close(conv_clip.features(pixels), replace(conv_clip, domains="means").features(pixels))
    older = replace(tiny_clip, domains="means")
    first = tiny_clip.model.get_submodule("visual.transformer.resblocks.0")
    with watched([(first, channel_means)]) as seen:
        tiny_clip.images(pixels)
    assert torch.equal(older.features(pixels).domains, seen[0])


@torch.no_grad()
def test_a_blank_picture_has_features(tiny_clip: Clip) -> None:
    assert torch.isfinite(tiny_clip.features(torch.zeros(2, 3, 32, 32)).domains).all()


def test_channels_may_come_last() -> None:
    output = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(token_deviations(output), map_deviations(output.permute(0, 3, 1, 2)))


def test_blocks_that_convolve_are_a_convolutional_tower() -> None:
    stages = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8)) for _ in range(3)]
    tower = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "stages": nn.Sequential(*stages)})
    assert watch_list(tower, "distributions") == [(stage, channel_means) for stage in stages]
    tokens = [nn.Linear(8, 8) for _ in range(3)]
    without_patches = nn.ModuleDict({"embed": nn.Linear(3, 8), "blocks": nn.Sequential(*tokens)})
    assert watch_list(without_patches, "distributions") == [(block, token_deviations) for block in tokens]


@torch.no_grad()
def test_no_hook_stays(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    tiny_clip.features(pixels)
    assert not any(module._forward_hooks for module in tiny_clip.model.modules())


def test_a_pass_of_another_thread_is_not_watched() -> None:
    block = nn.Linear(2, 2)
    with watched([(block, channel_means)]) as seen:
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


@pytest.mark.parametrize(
    ("channels", "chosen"), [([192] * 7, [0, 3]), ([768] * 13, [0, 6]), ([64] * 3, [0, 1]), ([64] * 2, [0, 1])]
)
def test_which_blocks_after_the_patches(channels: list[int], chosen: list[int]) -> None:
    assert spread(channels, first=1) == chosen
    assert sum(channels[each] for each in chosen) <= max(MOST_CHANNELS, 2 * max(channels))


def test_means_are_over_places_and_over_tokens() -> None:
    maps, tokens = torch.rand(2, 5, 4, 4), torch.rand(2, 7, 5)
    torch.testing.assert_close(channel_means(maps), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(channel_means(tokens), tokens.mean(dim=1))
