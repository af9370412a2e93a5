"""Trains the small CLIP that ships with the package, from ImageNet classifier weights and text targets (CPU or GPU).

    python jobs/pretrain_default.py --images DATA/tiny_imagenet --trunk LITE0.safetensors --text-targets TARGETS \
        --minutes-text 8 --minutes-image 37 --work WORK --out condu_ray/models/shipped

Order of work: the text tower learns a vector for every name of the vocabulary; a ridge regression ties the image trunk
to the text tower's own class vectors (the start, M0); the image tower is trained; its weights are interpolated with M0
(the share is chosen on training pictures held out); the projection is fitted once more if that helps; float16 is saved.

Killed, the same command goes on from the last checkpoint in --work. Time spent is counted over all runs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
STORED_SIDE, SIDE = 32, 64
TEXT_BATCH, IMAGE_BATCH, DISTIL_BATCH = 256, 128, 32
VALIDATION_PICTURES = 2000
FINAL_LOGIT_SCALE = 50.0
TEMPLATES = (
    "{c}",
    "a {c}",
    "the {c}",
    "a photo of a {c}.",
    "a photo of the {c}.",
    "a photo of {c}.",
    "a photo of one {c}.",
    "a photo of my {c}.",
    "a photo of a small {c}.",
    "a photo of a large {c}.",
    "a good photo of a {c}.",
    "a bad photo of a {c}.",
    "a bright photo of a {c}.",
    "a dark photo of the {c}.",
    "a black and white photo of a {c}.",
    "a cropped photo of the {c}.",
    "a close-up photo of a {c}.",
    "a blurry photo of a {c}.",
    "a tiny blurry photo of the {c}.",
    "a low resolution photo of a {c}.",
    "a small, blurry picture of a {c}.",
    "a centered image of one {c}.",
    "an image showing a {c}.",
    "a picture showing a {c}.",
    "a picture of {c}.",
    "a drawing of a {c}.",
    "a painting of the {c}.",
    "a {c} in a small picture.",
    "a photo of a {c} scene.",
    "an outdoor photo of {c}.",
    "a photo of a {c} texture.",
    "a satellite photo of a {c}.",
    "an aerial image of a {c}.",
    "a photo of {c}, a type of food.",
)


def log(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)


# ---- material


@dataclass(frozen=True)
class Pictures:
    """pixels: uint8 [n, 3, 32, 32]; labels: int64 [n]; names: one a class."""

    pixels: Tensor
    labels: Tensor
    names: list[str]

    def part(self, rows: Tensor) -> Pictures:
        return Pictures(self.pixels[rows], self.labels[rows], self.names)


def _small(stream: io.BufferedIOBase | Path) -> np.ndarray:
    with Image.open(stream) as picture:
        rgb = picture.convert("RGB")
        cut = min(rgb.size)
        left, top = (rgb.width - cut) // 2, (rgb.height - cut) // 2
        if rgb.size != (STORED_SIDE, STORED_SIDE):
            rgb = rgb.crop((left, top, left + cut, top + cut)).resize((STORED_SIDE,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(rgb).transpose(2, 0, 1)


def read_pictures(folder: Path) -> Pictures:
    """Reads the training pictures of a webdataset folder (classnames.txt, train/*.tar) or of FOLDER/CLASS/picture."""
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    if (folder / "classnames.txt").exists():
        names = (folder / "classnames.txt").read_text().splitlines()
        for path in sorted((folder / "train").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None:
                        continue
                    if member.name.endswith(".cls"):
                        labels.append(int(content.read()))
                    else:
                        pixels.append(_small(io.BytesIO(content.read())))
    else:
        names = sorted(child.name for child in folder.iterdir() if child.is_dir())
        for label, name in enumerate(names):
            files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
            pixels += [_small(path) for path in files]
            labels += [label] * len(files)
    if not pixels or len(pixels) != len(labels):
        raise SystemExit(f"{folder}: {len(pixels)} pictures, {len(labels)} labels: need as many of both, at least one")
    return Pictures(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), names)


def read_targets(folder: Path) -> tuple[list[str], Tensor, list[int]]:
    """Returns the names of the vocabulary, their unit targets [names, 256], and the positions of the names held out.

    Held out: 5 % of the names, by a hash of the name, from those without a text vector of CLIP itself (common things
    stay in training, for they are what people will ask for).
    """
    listed = json.loads((folder / "names.json").read_text())
    names, common = listed["vocab_target256"], set(listed["clip_vitb32_text"])
    targets = F.normalize(load_file(folder / "text_targets.safetensors")["vocab_target256"].float(), dim=-1)
    held_out = [
        row
        for row, name in enumerate(names)
        if name not in common and int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 16 == 0
    ]
    return names, targets, held_out


# ---- a loop that keeps to the clock and survives a kill


def _save(tensors: dict[str, Tensor], facts: dict[str, float], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"facts": json.dumps(facts)})
    os.replace(partial, path)


def _facts(path: Path) -> dict[str, float]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def train(
    model: nn.Module,
    groups: list[dict[str, object]],
    loss_of: Callable[[int], Tensor],
    minutes: float,
    checkpoint: Path,
    unit: str,
    batch: int,
) -> None:
    """AdamW with 100 steps of warm-up and a cosine over the wall clock. loss_of(step)."""
    phase = checkpoint.stem
    optimiser = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in optimiser.param_groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    facts: dict[str, float] = {"step": 0, "seconds": 0.0}
    if checkpoint.exists():
        facts, saved = _facts(checkpoint), load_file(checkpoint)
        model.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("model.")})
        for row, p in enumerate(parameters):
            if f"mean.{row}" in saved:
                optimiser.state[p] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": saved[f"mean.{row}"].to(p.device),
                    "exp_avg_sq": saved[f"square.{row}"].to(p.device),
                }
        log(f"{phase}: goes on at step {facts['step']}, {facts['seconds']:.0f}/{60 * minutes:.0f} s")
    step, seconds, budget = int(facts["step"]), facts["seconds"], 60 * minutes

    def keep() -> None:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for row, p in enumerate(parameters):
            if p in optimiser.state:
                tensors[f"mean.{row}"] = optimiser.state[p]["exp_avg"]
                tensors[f"square.{row}"] = optimiser.state[p]["exp_avg_sq"]
        _save(tensors, {"step": step, "seconds": seconds}, checkpoint)

    before = told = kept = time.monotonic()
    told_step, running = step, float("nan")
    while seconds < budget:
        share = seconds / budget
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise SystemExit(f"{phase}: the loss is {loss.item()} at step {step}; use another --seed")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        step += 1
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        now = time.monotonic()
        seconds, before = seconds + now - before, now
        if now - told > 20:
            rate = (step - told_step) * batch / (now - told)
            log(f"{phase}: {seconds:.0f}/{budget:.0f} s, step {step}, loss {running:.3f}, {rate:.0f} {unit}/s")
            told, told_step = now, step
        if now - kept > 120:
            keep()
            kept = now
    if step > facts["step"] or not checkpoint.exists():
        keep()
    log(f"{phase}: done, {step} steps, {step * batch} {unit}, {seconds:.0f} s")


# ---- text


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Unit text vectors, as model.encode_text gives them, with the padding cut off (causal, so nothing changes)."""
    length = int(tokens.argmax(dim=-1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
    return F.normalize(x @ model.text_projection, dim=-1)


@torch.no_grad()
def vectors_of(model: open_clip.CLIP, names: list[str], templates: tuple[str, ...], device: str) -> Tensor:
    """Unit text vectors [templates, names, 256]."""
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    rows = []
    for template in templates:
        prompts = [template.format(c=name) for name in names]
        parts = [tokenizer(prompts[k : k + 512]).to(device) for k in range(0, len(prompts), 512)]
        rows.append(torch.cat([encode_text(model, part) for part in parts]))
    return torch.stack(rows)


def train_text(
    model: open_clip.CLIP,
    names: list[str],
    targets: Tensor,
    held_out: list[int],
    minutes: float,
    work: Path,
    seed: int,
    device: str,
) -> None:
    """loss = (1 - cosine to the target) + 0.3 x InfoNCE over the batch (scale 20); any template, the same target."""
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    tokens = torch.stack([tokenizer([t.format(c=n) for n in names]) for t in TEMPLATES]).to(torch.int32)
    kept = np.setdiff1d(np.arange(len(names)), held_out)
    targets = targets.to(device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 1, step))
        rows = rng.choice(kept, min(TEXT_BATCH, len(kept)), replace=False)
        batch = tokens[rng.integers(len(TEMPLATES), size=len(rows)), rows].long().to(device)
        said, want = encode_text(model, batch), targets[rows]
        cosine = said @ want.T
        order = torch.arange(len(rows), device=device)
        return 1 - cosine.diagonal().mean() + 0.3 * F.cross_entropy(20 * cosine, order)

    parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    group: dict[str, object] = {"params": parameters, "lr": 2e-3, "weight_decay": 0.02}
    train(model, [group], loss_of, minutes, work / "text.safetensors", "texts", TEXT_BATCH)
    said = vectors_of(model, names, ("a photo of a {c}.",), device)[0]
    right = (said @ targets.T).argmax(1).cpu() == torch.arange(len(names))
    cosine = (said * targets).sum(1).cpu()
    for what, rows in (("trained", kept), ("held out", np.asarray(held_out))):
        found = right[rows].float().mean()
        log(f"names {what}: {len(rows)}, cosine {cosine[rows].mean():.3f}, found among all names {found:.3f}")


# ---- pictures


def enlarge(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, s, s] to normalised float [n, 3, 64, 64], as the shipped preprocessing does."""
    x = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return (x.clamp(0, 255) / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Saturation (10 % grey), contrast, brightness, then flip, crop of 35-100 % and enlargement in one sampling."""
    n = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, n).astype(np.float32)).to(pixels.device)

    x = pixels.float() / 127.5 - 1
    grey = x.mean(1, keepdim=True)
    saturation = torch.where(draw(0, 1) < 0.1, 0.0, draw(0.6, 1.4)).view(n, 1, 1, 1)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + draw(0.6, 1.4).view(n, 1, 1, 1) * (x - mean) + draw(-0.25, 0.25).view(n, 1, 1, 1)).clamp(-1, 1)
    area, aspect = draw(0.35, 1.0), draw(-0.29, 0.29).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=pixels.device)
    theta[:, 0, 0] = torch.where(draw(0, 1) < 0.5, -width, width)
    theta[:, 0, 2] = draw(-1, 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = draw(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features_of(model: open_clip.CLIP, pixels: Tensor, device: str) -> Tensor:
    """Pooled features of the image trunk [n, 1280]."""
    model.eval()
    return torch.cat([model.visual.trunk(enlarge(pixels[k : k + 256].to(device))) for k in range(0, len(pixels), 256)])


def accuracy(model: open_clip.CLIP, features: Tensor, labels: Tensor, classes: Tensor) -> float:
    with torch.no_grad():
        z = F.normalize(model.visual.head(features), dim=-1)
        return float(((z @ classes.T).argmax(1).cpu() == labels).float().mean())


def unit_mean(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.mean(0), dim=-1)


def tie_projection(model: open_clip.CLIP, pictures: Pictures, classes: Tensor, device: str) -> None:
    """Ridge regression from trunk features to the text tower's class vectors (lambda 20 for each 4,000 pictures)."""
    x = features_of(model, pictures.pixels, device).double().cpu()
    y = classes[pictures.labels.to(classes.device)].double().cpu()
    weight = torch.linalg.solve(x.T @ x + 20 * len(x) / 4000 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(weight.T.float())


def train_image(
    model: open_clip.CLIP,
    start: open_clip.CLIP,
    pictures: Pictures,
    vectors: Tensor,
    vocabulary: Tensor,
    minutes: float,
    work: Path,
    seed: int,
    device: str,
) -> None:
    """loss = cross-entropy over the classes + 0.5 (1 - cosine to the class) + 0.25 KL to the start.

    The last term compares the similarities to every name of the vocabulary (scale 20) on a quarter of each batch; it is
    our addition, to keep what the starting weights knew about other things.
    """
    count, size = len(pictures.labels), min(IMAGE_BATCH, len(pictures.labels))
    steps_an_epoch = count // size

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 2, step))
        epoch, place = divmod(step, steps_an_epoch)
        order = np.random.default_rng((seed, 3, epoch)).permutation(count)
        rows = torch.from_numpy(order[place * size : (place + 1) * size])
        x = augment(pictures.pixels[rows].to(device), rng)
        y = pictures.labels[rows].to(device)
        keep = torch.from_numpy(rng.beta(0.2, 0.2, size).astype(np.float32)).to(device)
        partner = torch.from_numpy(rng.permutation(size)).to(device)
        x = torch.lerp(x[partner], x, keep.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
        classes = unit_mean(vectors[rng.choice(len(vectors), 4, replace=False)])
        share_of = torch.zeros(size, len(classes), device=device)
        share_of.scatter_add_(1, y[:, None], keep[:, None])
        share_of.scatter_add_(1, y[partner][:, None], 1 - keep[:, None])

        z = F.normalize(model.visual(x), dim=-1)
        cosine = z @ classes.T
        loss = F.cross_entropy(model.logit_scale.exp().clamp(max=60) * cosine, share_of, label_smoothing=0.1)
        loss = loss + 0.5 * (1 - (share_of * cosine).sum(1).mean())
        with torch.no_grad():
            before = F.log_softmax(20 * F.normalize(start.visual(x[:DISTIL_BATCH]), dim=-1) @ vocabulary.T, dim=-1)
        after = F.log_softmax(20 * z[:DISTIL_BATCH] @ vocabulary.T, dim=-1)
        return loss + 0.25 * F.kl_div(after, before, reduction="batchmean", log_target=True)

    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    model.visual.train()
    groups: list[dict[str, object]] = [
        {"params": list(model.visual.trunk.parameters()), "lr": 8e-4, "weight_decay": 0.03},
        {"params": list(model.visual.head.parameters()), "lr": 1e-3, "weight_decay": 0.03},
        {"params": [model.logit_scale], "lr": 1e-3, "weight_decay": 0.0},
    ]
    train(model, groups, loss_of, minutes, work / "image.safetensors", "pictures", size)
    model.eval()


def interpolate(model: open_clip.CLIP, trained: dict[str, Tensor], start: dict[str, Tensor], share: float) -> None:
    """Image tower = share x trained + (1 - share) x start, running statistics too."""
    mixed = {k: torch.lerp(start[k], v, share) if v.is_floating_point() else v for k, v in trained.items()}
    model.visual.load_state_dict(mixed)


def choose_interpolation(
    model: open_clip.CLIP, start: open_clip.CLIP, validation: Pictures, classes: Tensor, device: str
) -> float:
    """The share nearest to the start whose accuracy on held-out training pictures is within a point of the best."""
    trained = {k: v.clone() for k, v in model.visual.state_dict().items()}
    first = {k: v.clone() for k, v in start.visual.state_dict().items()}
    found: dict[float, float] = {}
    for share in (0.0, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        interpolate(model, trained, first, share)
        found[share] = accuracy(model, features_of(model, validation.pixels, device), validation.labels, classes)
        log(f"interpolation {share:.2f}: {found[share]:.3f} on held-out training pictures")
    chosen = min(share for share, right in found.items() if right >= max(found.values()) - 0.01)
    interpolate(model, trained, first, chosen)
    log(f"interpolation {chosen:.2f} chosen")
    return chosen


def refit_projection(
    model: open_clip.CLIP, pictures: Pictures, validation: Pictures, vectors: Tensor, seed: int, device: str
) -> None:
    """100 Adam steps on the projection alone; undone unless the held-out training pictures gain."""
    rng = np.random.default_rng((seed, 4))
    rows = torch.from_numpy(rng.permutation(len(pictures.labels))[:6000])
    x, y = features_of(model, pictures.pixels[rows], device), pictures.labels[rows].to(device)
    seen, classes = features_of(model, validation.pixels, device), unit_mean(vectors)
    before, weight = accuracy(model, seen, validation.labels, classes), model.visual.head.proj.weight
    kept = weight.detach().clone()
    optimiser = torch.optim.Adam([weight], lr=3e-4)
    for _ in range(100):
        batch = torch.from_numpy(rng.integers(len(x), size=256)).to(device)
        cosine = F.normalize(x[batch] @ weight.T, dim=-1) @ classes.T
        loss = F.cross_entropy(model.logit_scale.exp().detach() * cosine, y[batch], label_smoothing=0.1)
        loss = loss + 0.5 * (1 - cosine.gather(1, y[batch][:, None]).mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = accuracy(model, seen, validation.labels, classes)
    log(f"projection fitted again: {before:.3f} -> {after:.3f}" + ("" if after > before else ", undone"))
    if after <= before:
        with torch.no_grad():
            weight.copy_(kept)


# ---- the whole


def new_model(trunk: Path, seed: int, device: str, work: Path) -> open_clip.CLIP:
    folder = work / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {k: v.float() for k, v in load_file(trunk).items() if not k.startswith("classifier.")}
    missing, unexpected = model.visual.trunk.load_state_dict(weights, strict=False)
    if unexpected or any(not k.endswith("num_batches_tracked") for k in missing):
        raise SystemExit(f"{trunk} is not a tf_efficientnet_lite0: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.to(device).to(memory_format=torch.channels_last).eval()


def save_shipped(model: open_clip.CLIP, out: Path) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(math.log(FINAL_LOGIT_SCALE))
    half = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in model.state_dict().items()}
    bad = [k for k, v in half.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise SystemExit(f"{bad[0]} does not fit float16")
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    save_file(half, out / "open_clip_model.safetensors", {"format": "pt"})
    log(f"saved {out}: {(out / 'open_clip_model.safetensors').stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="webdataset folder, or FOLDER/CLASS/picture")
    parser.add_argument("--trunk", type=Path, required=True, help="EfficientNet-Lite0 (safetensors, timm names)")
    parser.add_argument("--text-targets", type=Path, required=True, help="text_targets.safetensors, names.json")
    parser.add_argument("--minutes-text", type=float, default=8, help="wall clock for the text tower")
    parser.add_argument("--minutes-image", type=float, default=37, help="wall clock for the image tower")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; an empty one starts anew")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work: Path = options.work
    model = new_model(options.trunk, options.seed, device, work)

    names, targets, held_out = read_targets(options.text_targets)
    train_text(model, names, targets, held_out, options.minutes_text, work, options.seed, device)

    pictures = read_pictures(options.images)
    order = torch.from_numpy(np.random.default_rng((options.seed, 5)).permutation(len(pictures.labels)))
    aside = min(VALIDATION_PICTURES, len(order) // 10)
    validation, pictures = pictures.part(order[:aside]), pictures.part(order[aside:])
    log(f"{len(pictures.labels)} pictures to train on, {aside} held out, {len(pictures.names)} classes, on {device}")
    vectors = vectors_of(model, pictures.names, TEMPLATES, device)
    vocabulary = vectors_of(model, names, ("a photo of a {c}.",), device)[0]
    classes = unit_mean(vectors)

    tie_projection(model, pictures.part(torch.arange(min(12000, len(pictures.labels)))), classes, device)
    start = new_model(options.trunk, options.seed, device, work)
    start.load_state_dict(model.state_dict())
    right = accuracy(start, features_of(start, validation.pixels, device), validation.labels, classes)
    log(f"start: {right:.3f} on held-out training pictures")

    train_image(model, start, pictures, vectors, vocabulary, options.minutes_image, work, options.seed, device)
    choose_interpolation(model, start, validation, classes, device)
    refit_projection(model, pictures, validation, vectors, options.seed, device)
    save_shipped(model, options.out)


if __name__ == "__main__":
    main()
