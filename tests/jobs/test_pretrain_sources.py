"""Where pretraining's text vectors come from: WordNet's files and any open_clip text tower."""

from __future__ import annotations

from pathlib import Path

import torch
from pretrain_sources import clip_vectors, imagenet_names, wordnet_names

from condu_ray.models.load import SHIPPED

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00015388 05 n 02 animal 0 animate_being 0 003 @ 00004475 n 0000 | a living organism
00017222 20 n 01 flowering_plant 0 001 @ 00004475 n 0000 | a plant
01314781 05 n 01 Felis 0 001 @ 00015388 n 0000 | a genus
05809192 09 n 01 faculty 0 001 @ 00015388 n 0000 | not a thing to photograph
"""
ADJECTIVES = "00001740 00 a 01 able(p) 0 001 = 05200169 n 0000 | having means\n"


def test_wordnet_gives_pictured_nouns_and_adjectives_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "data.adj").write_text(ADJECTIVES)
    assert wordnet_names(tmp_path) == ["animal", "flowering plant", "able"]


def test_any_open_clip_text_tower_gives_vectors_that_keep_what_is_alike() -> None:
    names = ["cat", "kitten", "airplane", "helicopter", *imagenet_names()[::40]]
    vectors = clip_vectors(names, f"local-dir:{SHIPPED}")
    assert vectors.shape == (len(names), 256)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(names)), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert vectors[2] @ vectors[3] > vectors[0] @ vectors[3]
