"""Measures the shipped model (or any open_clip model) zero-shot on every webdataset folder in a folder.

    python jobs/eval_default.py --data DATA [--text-targets TARGETS] [--model local-dir:FOLDER] [--json]

Prints top-1, top-5, chance and a linear probe for each set, pictures per second and bytes. At most 1,000 test pictures
and 4,000 training pictures (for the probe) a set. The model is loaded by open_clip alone.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_default import read_targets, vectors_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor

SHIPPED = Path(__file__).resolve().parent.parent / "condu_ray" / "models" / "shipped"
SEEN = {"tiny_imagenet"}  # trained on its train split; its classes are no news to the model
TEST_PICTURES, PROBE_PICTURES = 1000, 4000


def read_split(folder: Path, split: str, most: int) -> tuple[list[Image.Image], Tensor]:
    """The first `most` pictures of a split (their order is by content hash, so classes are mixed) and their labels."""
    pictures: list[Image.Image] = []
    labels: list[int] = []
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if len(pictures) == len(labels) == most:
                    break
                content = tar.extractfile(member)
                if content is None:
                    continue
                if member.name.endswith(".cls"):
                    labels.append(int(content.read()))
                else:
                    pictures.append(Image.open(io.BytesIO(content.read())).convert("RGB"))
    return pictures, torch.tensor(labels)


@torch.no_grad()
def image_vectors(model: open_clip.CLIP, preprocess: object, pictures: list[Image.Image]) -> tuple[Tensor, float]:
    """Unit image vectors [n, embed_dim], and the seconds taken by preprocessing and the image tower."""
    begun = time.monotonic()
    parts = []
    for k in range(0, len(pictures), 100):
        batch = torch.stack([preprocess(picture) for picture in pictures[k : k + 100]])  # type: ignore[operator]
        parts.append(model.encode_image(batch, normalize=True))
    return torch.cat(parts), time.monotonic() - begun


@torch.no_grad()
def class_vectors(model: open_clip.CLIP, tokenizer: object, folder: Path) -> Tensor:
    """One unit vector a class: the mean over the folder's prompt templates."""
    names = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    each = [
        model.encode_text(tokenizer([t.replace("{c}", n) for n in names]), normalize=True)  # type: ignore[operator]
        for t in templates
    ]
    return F.normalize(torch.stack(each).mean(0), dim=-1)


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a logistic regression on the image vectors, scaled by 10 so that the default penalty suits them."""
    regression = LogisticRegression(max_iter=1000).fit(10 * train.numpy(), train_labels.numpy())
    return float(regression.score(10 * test.numpy(), test_labels.numpy()))


def held_out_top1(model: open_clip.CLIP, targets: Path) -> float:
    """Share of the names held out of the text training whose nearest target, among all names, is their own."""
    names, wanted, held_out = read_targets(targets)
    said = vectors_of(model, [names[row] for row in held_out], ("a photo of a {c}.",), "cpu")[0]
    return float(((said @ wanted.T).argmax(1) == torch.tensor(held_out)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of webdataset folders")
    parser.add_argument("--model", default=f"local-dir:{SHIPPED}", help="open_clip name (default: the shipped model)")
    parser.add_argument("--text-targets", type=Path, help="folder with the targets, to find held-out names again")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    model, _, preprocess = open_clip.create_model_and_transforms(options.model)
    tokenizer = open_clip.get_tokenizer(options.model)
    model.eval()
    sets, seconds, count = [], 0.0, 0
    for folder in sorted(path.parent for path in options.data.glob("*/classnames.txt")):
        pictures, labels = read_split(folder, "test", TEST_PICTURES)
        images, spent = image_vectors(model, preprocess, pictures)
        seconds, count = seconds + spent, count + len(pictures)
        classes = class_vectors(model, tokenizer, folder)
        best = (images @ classes.T).topk(min(5, len(classes))).indices == labels[:, None]
        known, known_labels = read_split(folder, "train", PROBE_PICTURES)
        sets.append(
            {
                "name": folder.name,
                "seen": folder.name in SEEN,
                "classes": len(classes),
                "chance": round(1 / len(classes), 4),
                "top1": round(float(best[:, 0].float().mean()), 4),
                "top5": round(float(best.any(1).float().mean()), 4),
                "linear_probe": round(
                    probe(image_vectors(model, preprocess, known)[0], known_labels, images, labels), 4
                ),
            }
        )
    if not sets:
        raise SystemExit(f"{options.data} holds no webdataset folder (NAME/classnames.txt, NAME/test/0.tar)")
    folder = Path(options.model.removeprefix("local-dir:"))
    weights = folder / "open_clip_model.safetensors"
    result = {
        "sets": sets,
        "images_per_second": round(count / seconds, 1),
        "bytes": weights.stat().st_size if weights.exists() else None,
        "held_out_names_top1": round(held_out_top1(model, options.text_targets), 4) if options.text_targets else None,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'set':15} {'classes':>7} {'chance':>7} {'top-1':>7} {'top-5':>7} {'probe':>7}")
    for row in sets:
        figures = " ".join(f"{100 * row[k]:6.1f}%" for k in ("chance", "top1", "top5", "linear_probe"))
        print(f"{row['name']:15} {row['classes']:7} {figures}" + ("  (trained on)" if row["seen"] else ""))
    print(f"{result['images_per_second']} pictures/s on {torch.get_num_threads()} threads, {result['bytes']} bytes")
    if options.text_targets:
        print(f"names held out of text training, found among all names: {100 * result['held_out_names_top1']:.1f}%")


if __name__ == "__main__":
    main()
