"""The phases of pretraining a small CLIP: material, text tower, start, image tower, finish (for pretrain_default)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captioned_world import CLASSES, FAMILIES, SIDE, Class, draw
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from condu_ray.data import load_picture, open_task

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
STORED_SIDE = 32  # of the photographs
TELL_SECONDS, KEEP_SECONDS = 20.0, 120.0


@dataclass(frozen=True)
class Recipe:
    """What was settled by pilots; docs/default_model.md has them."""

    text_batch: int = 320
    text_rate: float = 2e-3
    image_batch: int = 128
    world_batch: int = 16
    world_pictures: int = 40_000
    trunk_rate: float = 8e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.03
    crop: float = 0.4  # least share of a picture's area
    smoothing: float = 0.05
    cosine_share: float = 0.5
    teacher_share: float = 0.75
    teacher_side: int = 128
    validation_pictures: int = 2000
    logit_scale: float = 50.0  # of the finished model


@dataclass(frozen=True)
class Order:
    """What one run was asked for."""

    config: dict[str, Any]
    images: str
    trunk: str | None
    text_targets: str
    minutes_text: float
    minutes_image: float
    work: str
    out: str
    seed: int
    compiled: bool
    recipe: Recipe = Recipe()


@dataclass(frozen=True)
class Place:
    """This worker among the workers. tell: takes a line of progress."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    tell: Callable[[str], None] = print

    def say(self, message: str) -> None:
        if self.rank == 0:
            self.tell(f"{time.strftime('%H:%M:%S')} {message}")

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, values: Sequence[float]) -> list[float]:
        """The first worker's values."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return [float(value) for value in told]

    def spread(self, module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module) if self.size > 1 else module


# ---- material


@dataclass(frozen=True)
class Pictures:
    """pixels: uint8 [n, 3, 32, 32]; labels: int64 [n]; names: one a class."""

    pixels: Tensor
    labels: Tensor
    names: Sequence[str]

    def at(self, rows: NDArray[np.int64]) -> Pictures:
        return Pictures(self.pixels[rows], self.labels[rows], self.names)


def _small(picture: Image.Image) -> NDArray[np.uint8]:
    """u8[3, 32, 32]: the middle square."""
    if picture.size != (STORED_SIDE, STORED_SIDE):
        picture = ImageOps.fit(picture, (STORED_SIDE, STORED_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def read_pictures(order: Order, place: Place) -> Pictures:
    """The training pictures of any source that a task can be learned from."""
    task = open_task("images", order.images)

    def make(part: range) -> NDArray[np.uint8]:
        return np.stack([_small(load_picture(task.train.pictures[row])) for row in part])

    pixels = together(Path(order.work) / f"pictures-{task.fingerprint[:16]}.npy", len(task.train), place, make)
    return Pictures(torch.from_numpy(pixels), torch.from_numpy(task.train.labels), task.classes)


@dataclass(frozen=True)
class Targets:
    """names: the vocabulary; vectors: unit f32[names, 256]; held_out: rows that the text tower never sees.

    head: how many names at the head are the most wanted: common things, ImageNet's classes, frequent nouns. Held out:
    one in 16 names, by a hash of the name, of those that are not common (these are what people will ask for).
    """

    names: list[str]
    vectors: Tensor
    held_out: list[int]
    head: int

    def meaning(self, classes: Sequence[Class]) -> Tensor:
        """Unit f32[classes, 256]: the sum of the vectors of a caption's words."""
        row = {name: place for place, name in enumerate(self.names)}
        missing = sorted({word for one in classes for word in one.words if word not in row})
        if missing:
            raise ValueError(f"no text target for {missing[0]!r}: make the targets with jobs/pretrain_sources.py")
        sums = [self.vectors[[row[word] for word in one.words]].sum(0) for one in classes]
        return F.normalize(torch.stack(sums), dim=-1)


def read_targets(folder: Path) -> Targets:
    listed = json.loads((folder / "names.json").read_text())
    names, common = listed["vocab_target256"], set(listed.get("common") or listed["clip_vitb32_text"])
    vectors = F.normalize(load_file(folder / "text_targets.safetensors")["vocab_target256"].float(), dim=-1)
    held_out = [
        row
        for row, name in enumerate(names)
        if name not in common and int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 16 == 0
    ]
    return Targets(names, vectors, held_out, listed.get("head", len(names)))


def together(path: Path, count: int, place: Place, make: Callable[[range], NDArray[Any]]) -> NDArray[Any]:
    """An array of `count` rows that the workers make in parts, once: kept in a file, mapped into memory."""
    if not path.exists():
        part = path.with_name(f"{path.stem}.{place.rank}-of-{place.size}.npy")
        if not part.exists():
            rows = range(count * place.rank // place.size, count * (place.rank + 1) // place.size)
            made = make(rows)
            np.save(part.with_suffix(".partial.npy"), made)
            os.replace(part.with_suffix(".partial.npy"), part)
        place.wait()
        if place.rank == 0:
            parts = [path.with_name(f"{path.stem}.{rank}-of-{place.size}.npy") for rank in range(place.size)]
            np.save(path.with_suffix(".partial.npy"), np.concatenate([np.load(each) for each in parts]))
            os.replace(path.with_suffix(".partial.npy"), path)
            for each in parts:
                each.unlink()
        place.wait()
    return np.asarray(np.load(path, mmap_mode="c"))  # copy on write: torch wants to be able to write


# ---- a loop that keeps to the clock and survives a kill


def _save(tensors: dict[str, Tensor], facts: dict[str, float], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"facts": json.dumps(facts)})
    os.replace(partial, path)


def _facts(path: Path) -> dict[str, float]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["facts"]))


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    loss_of: Callable[[int], Tensor],
    minutes: float,
    checkpoint: Path,
    unit: str,
    batch: int,
    place: Place,
) -> None:
    """AdamW with 100 steps of warm-up and a cosine over the wall clock of the first worker. loss_of(step)."""
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
        place.say(f"{phase}: goes on at step {facts['step']}, {facts['seconds']:.0f}/{60 * minutes:.0f} s")
    step, seconds, budget = int(facts["step"]), facts["seconds"], 60 * minutes

    def keep() -> None:
        if place.rank == 0:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
            for row, p in enumerate(parameters):
                if p in optimiser.state:
                    tensors[f"mean.{row}"] = optimiser.state[p]["exp_avg"]
                    tensors[f"square.{row}"] = optimiser.state[p]["exp_avg_sq"]
            _save(tensors, {"step": step, "seconds": seconds}, checkpoint)

    begun_at, begun_step = seconds, step
    before = told = kept = time.monotonic()
    told_step, running = step, float("nan")
    while seconds < budget:
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * seconds / budget))
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{phase}: the loss is {loss.item()} at step {step}; use another --seed")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        step += 1
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        now = time.monotonic()
        if step == begun_step + 1:
            before = now  # the first step may include a compilation
        seconds, before = place.agree([seconds + now - before])[0], now
        if now - told > TELL_SECONDS:
            rate = (step - told_step) * batch / (now - told)
            place.say(f"{phase}: {seconds:.0f}/{budget:.0f} s, step {step}, loss {running:.3f}, {rate:.0f} {unit}/s")
            told, told_step = now, step
        if now - kept > KEEP_SECONDS:
            keep()
            kept = now
    if step > begun_step or not checkpoint.exists():
        keep()
    place.wait()
    spent = max(seconds - begun_at, 1e-9)
    rate = (step - begun_step) * batch / spent
    place.say(f"{phase}: done, {step} steps, {step * batch} {unit}, {seconds:.0f} s, {rate:.0f} {unit}/s")


# ---- text


class TextTower(nn.Module):
    """Unit text vectors, as open_clip's encode_text gives them, with the padding cut off (causal: nothing changes)."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.text_projection = clip.text_projection
        self.mask: Tensor
        self.register_buffer("mask", clip.attn_mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = int(tokens.argmax(dim=-1).max()) + 1
        tokens = tokens[:, :length]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=self.mask[:length, :length]))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return F.normalize(x @ self.text_projection, dim=-1)


@torch.no_grad()
def vectors_of(
    clip: open_clip.CLIP, names: Sequence[str], templates: Sequence[str] = TEMPLATES, device: str = "cpu"
) -> Tensor:
    """Unit text vectors [templates, names, embed_dim]."""
    tokenizer, tower = open_clip.SimpleTokenizer(context_length=clip.context_length), TextTower(clip)
    rows = []
    for template in templates:
        prompts = [template.format(c=name) for name in names]
        parts = [tokenizer(prompts[k : k + 512]).to(device) for k in range(0, len(prompts), 512)]
        rows.append(torch.cat([tower(part) for part in parts]))
    return torch.stack(rows)


def unit_mean(vectors: Tensor) -> Tensor:
    """[templates, classes, d] to unit [classes, d]."""
    return F.normalize(vectors.mean(0), dim=-1)


def names_found(clip: open_clip.CLIP, targets: Targets) -> float:
    """Share of the held-out names whose nearest target, among all names, is their own."""
    device = clip.logit_scale.device
    names = [targets.names[row] for row in targets.held_out]
    said = vectors_of(clip, names, ("a photo of a {c}.",), str(device))[0].cpu()
    return float(((said @ targets.vectors.T).argmax(1) == torch.tensor(targets.held_out)).float().mean())


def train_text(clip: open_clip.CLIP, targets: Targets, order: Order, place: Place) -> None:
    """loss = (1 - cosine to the target) + 0.3 x InfoNCE over the batch (scale 20); any template, the same target.

    A batch: 45 % names from the head of the vocabulary, 35 % others, 20 % captions of the generated world.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    captions = [one for one in CLASSES if len(one.words) > 1 and not one.held_out]
    texts = [*targets.names, *(one.caption for one in captions)]
    wanted = torch.cat([targets.vectors, targets.meaning(captions)]).to(place.device)
    kept = np.setdiff1d(np.arange(len(targets.names)), targets.held_out)
    size = max(1, order.recipe.text_batch // place.size)
    first, rest = kept[kept < targets.head], kept[kept >= targets.head]
    pools = [(first, 0.45), (rest, 0.35), (np.arange(len(targets.names), len(texts)), 0.2)]
    tower = place.spread(TextTower(clip))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((order.seed, 1, step, place.rank))
        drawn = [rng.choice(pool, min(len(pool), round(share * size)), replace=False) for pool, share in pools]
        rows = np.concatenate(drawn)
        templates = rng.integers(len(TEMPLATES), size=len(rows))
        batch = tokenizer([TEMPLATES[t].format(c=texts[row]) for t, row in zip(templates, rows, strict=True)])
        cosine: Tensor = tower(batch.to(place.device)) @ wanted[rows].T
        each = torch.arange(len(rows), device=place.device)
        return 1 - cosine.diagonal().mean() + 0.3 * F.cross_entropy(20 * cosine, each)

    parameters = [p for n, p in clip.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    group = {"params": parameters, "lr": order.recipe.text_rate, "weight_decay": 0.02}
    fit(
        clip,
        [group],
        loss_of,
        order.minutes_text,
        Path(order.work) / "text.safetensors",
        "texts",
        size * place.size,
        place,
    )


# ---- pictures


def normalised(pixels: Tensor, side: int) -> Tensor:
    """uint8 [n, 3, s, s] to float [n, 3, side, side] in -1..1, bicubic."""
    x = pixels.float()
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
    return (x.clamp(0, 255) / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, side: int, least_area: float, rng: np.random.Generator) -> Tensor:
    """Saturation (10 % grey), contrast, brightness, then flip, crop and enlargement in one sampling."""
    n = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, n).astype(np.float32)).to(pixels.device)

    x = pixels.float() / 127.5 - 1
    grey = x.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < 0.1, 0.0, uniform(0.6, 1.4)).view(n, 1, 1, 1)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + uniform(0.6, 1.4).view(n, 1, 1, 1) * (x - mean) + uniform(-0.25, 0.25).view(n, 1, 1, 1)).clamp(-1, 1)
    area, aspect = uniform(least_area, 1.0), uniform(-0.29, 0.29).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=pixels.device)
    theta[:, 0, 0] = torch.where(uniform(0, 1) < 0.5, -width, width)
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def jitter(pixels: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """Contrast and brightness alone: colours, places and which way round are what the captions say."""
    x = normalised(pixels, side)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(x), 1, 1, 1)).astype(np.float32)).to(x.device)
    shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(x), 1, 1, 1)).astype(np.float32)).to(x.device)
    return (gain * x + shift).clamp(-1, 1)


def world_rows(count: int, seed: int, held_out: bool = False) -> NDArray[np.int64]:
    """Which class each generated picture shows: the families in turn, a class of the family at random."""
    rng = np.random.default_rng((seed, 6, held_out))
    pools = [
        [row for row, one in enumerate(CLASSES) if one.family == family and one.held_out == held_out]
        for family in FAMILIES
    ]
    pools = [pool for pool in pools if pool]
    return np.array([pools[k % len(pools)][rng.integers(len(pools[k % len(pools)]))] for k in range(count)])


def draw_world(rows: NDArray[np.int64], part: range, seed: int) -> NDArray[np.uint8]:
    """u8[part, 3, 64, 64]."""
    drawn = [draw(CLASSES[rows[k]], np.random.default_rng((seed, 7, k))).transpose(2, 0, 1) for k in part]
    return np.stack(drawn) if drawn else np.empty((0, 3, SIDE, SIDE), np.uint8)


class ImageTower(nn.Module):
    """Unit image vectors and the scale of their cosines."""

    def __init__(self, clip: open_clip.CLIP, compiled: bool) -> None:
        super().__init__()
        self.visual = torch.compile(clip.visual) if compiled else clip.visual
        self.logit_scale = clip.logit_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.visual(x), dim=-1), self.logit_scale.exp().clamp(max=60)


def side_of(clip: open_clip.CLIP) -> int:
    size = clip.visual.image_size
    return int(size[0] if isinstance(size, tuple | list) else size)


@torch.no_grad()
def image_vectors(clip: open_clip.CLIP, pixels: Tensor, device: str) -> Tensor:
    clip.eval()
    side = side_of(clip)
    parts = [clip.visual(normalised(pixels[k : k + 250].to(device), side)) for k in range(0, len(pixels), 250)]
    return F.normalize(torch.cat(parts), dim=-1)


def accuracy(clip: open_clip.CLIP, pictures: Pictures, classes: Tensor, device: str) -> float:
    found = (image_vectors(clip, pictures.pixels, device) @ classes.T).argmax(1).cpu()
    return float((found == pictures.labels).float().mean())


@dataclass(frozen=True)
class World:
    """Generated pictures: uint8 [n, 3, 64, 64] in a mapped file, their classes, and which captions share a family."""

    pixels: NDArray[np.uint8]
    labels: Tensor  # into `vectors`
    vectors: Tensor  # [templates, seen classes, d]
    family: Tensor  # [seen classes]


def make_world(clip: open_clip.CLIP, order: Order, place: Place) -> World:
    count = order.recipe.world_pictures
    rows = world_rows(count, order.seed)
    pixels = together(Path(order.work) / "world.npy", count, place, lambda part: draw_world(rows, part, order.seed))
    seen = [row for row, one in enumerate(CLASSES) if not one.held_out]
    at = {row: k for k, row in enumerate(seen)}
    return World(
        pixels,
        torch.tensor([at[row] for row in rows.tolist()]),
        vectors_of(clip, [CLASSES[row].caption for row in seen], device=place.device),
        torch.tensor([FAMILIES.index(CLASSES[row].family) for row in seen], device=place.device),
    )


@dataclass(frozen=True)
class Teacher:
    """logits: f16 [n, 1000] of the starting weights' own classifier on every picture; names: unit vectors [1000, d]."""

    logits: NDArray[np.float16]
    names: Tensor
    rows: Tensor  # the classifier's weights [1000, features]


def make_teacher(clip: open_clip.CLIP, pictures: Pictures, order: Order, place: Place) -> Teacher | None:
    """The trunk's own ImageNet-1k classifier on enlarged pictures; none where --trunk has no classifier."""
    if order.trunk is None or order.recipe.teacher_share == 0:
        return None
    weights = load_file(order.trunk)
    if "classifier.weight" not in weights:
        return None
    import timm
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(row).split(",")[0] for row in range(1000)]

    def make(part: range) -> NDArray[Any]:
        net = timm.create_model(order.config["model_cfg"]["vision_cfg"]["timm_model_name"], num_classes=1000)
        net.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        net = net.to(place.device).to(memory_format=torch.channels_last).eval()
        said = np.empty((len(part), 1000), np.float16)
        with torch.no_grad():
            for k in range(0, len(part), 100):
                x = pictures.pixels[part.start + k : min(part.start + k + 100, part.stop)].to(place.device)
                said[k : k + len(x)] = net(normalised(x, order.recipe.teacher_side)).half().cpu().numpy()
        return said

    place.say("teacher: the starting weights look at every picture")
    logits = together(Path(order.work) / "teacher.npy", len(pictures.labels), place, make)
    vectors = unit_mean(vectors_of(clip, names, TEMPLATES[:8], place.device))
    return Teacher(logits, vectors, weights["classifier.weight"].float())


@torch.no_grad()
def tie_projection(
    clip: open_clip.CLIP, pictures: Pictures, world: World, teacher: Teacher | None, classes: Tensor, device: str
) -> None:
    """Ridge regression from trunk features to text vectors: photographs, generated pictures, ImageNet's class means.

    The mean feature of a class that no picture shows is taken to lie from the mean of all in the direction of the
    classifier's row times the features' covariance (as for classes of one covariance); our reconstruction.
    """
    side = side_of(clip)

    def features(pixels: Tensor) -> Tensor:
        parts = [
            clip.visual.trunk(normalised(pixels[k : k + 250].to(device), side)) for k in range(0, len(pixels), 250)
        ]
        return torch.cat(parts).cpu()

    rows = torch.arange(min(12_000, len(pictures.labels)))
    x, y = features(pictures.pixels[rows]), classes.cpu()[pictures.labels[rows]]
    count = min(4_000, len(world.labels))
    drawn = features(torch.from_numpy(world.pixels[:count]))
    pairs = [(x, y, 1.0), (drawn, unit_mean(world.vectors).cpu()[world.labels[:count]], 1.0)]
    if teacher is not None:
        mean = x.mean(0)
        away = (teacher.rows - teacher.rows.mean(0)) @ torch.cov(x.T)
        length = 0.5 * (x - mean).norm(dim=1).mean()
        pairs.append((mean + length * F.normalize(away, dim=1), teacher.names.cpu(), 12.0))
    left = 20 * len(x) / 4000 * torch.eye(x.shape[1], dtype=torch.float64)
    right = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for inputs, wanted, weight in pairs:
        left += weight * inputs.double().T @ inputs.double()
        right += weight * inputs.double().T @ wanted.double()
    clip.visual.head.proj.weight.copy_(torch.linalg.solve(left, right).T.float())


def train_image(
    clip: open_clip.CLIP,
    pictures: Pictures,
    rows: NDArray[np.int64],
    vectors: Tensor,
    world: World,
    teacher: Teacher | None,
    order: Order,
    place: Place,
) -> None:
    """Photographs: cross-entropy over the classes + (1 - cosine to the class) + the teacher's view of 1,000 names.

    Generated pictures, in the same batch: cross-entropy over the captions of their family. rows: the photographs to
    train on. Every term's weight is in the recipe.
    """
    recipe, device = order.recipe, place.device
    size = max(1, min(recipe.image_batch, len(rows)) // place.size)
    drawn = max(1, recipe.world_batch // place.size)
    steps_an_epoch = max(1, len(rows) // (size * place.size))
    side, tower = side_of(clip), ImageTower(clip, order.compiled)
    spread = place.spread(tower)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((order.seed, 2, step, place.rank))
        epoch, at = divmod(step, steps_an_epoch)
        shuffled = np.random.default_rng((order.seed, 3, epoch)).permutation(rows)
        first = (at * place.size + place.rank) * size
        chosen = shuffled[first : first + size]
        x = augment(pictures.pixels[chosen].to(device), side, recipe.crop, rng)
        y = pictures.labels[chosen].to(device)
        which = np.sort(rng.integers(len(world.labels), size=drawn))
        generated = jitter(torch.from_numpy(world.pixels[which]).to(device), side, rng)
        z, scale = spread(torch.cat([x, generated]).contiguous(memory_format=torch.channels_last))
        z, seen = z[:size], z[size:]

        templates = rng.choice(len(vectors), 4, replace=False)
        classes = unit_mean(vectors[templates])
        cosine = z @ classes.T
        loss = F.cross_entropy(scale * cosine, y, label_smoothing=recipe.smoothing)
        loss = loss + recipe.cosine_share * (1 - cosine.gather(1, y[:, None]).mean())
        if teacher is not None:
            said = F.softmax(torch.from_numpy(teacher.logits[chosen].astype(np.float32)), dim=-1).to(device)
            loss = loss + recipe.teacher_share * F.cross_entropy(20 * z @ teacher.names.T, said)

        captions = unit_mean(world.vectors[templates])
        label = world.labels[which].to(device)
        other = world.family[None, :] != world.family[label][:, None]
        told = (scale * seen @ captions.T).masked_fill(other, -1e4)
        share = drawn / (size + drawn)
        together: Tensor = (1 - share) * loss + share * F.cross_entropy(told, label)
        return together

    with torch.no_grad():
        clip.logit_scale.fill_(math.log(20))
    clip.visual.train()
    if order.trunk is not None:  # a start's running statistics are part of what it knows
        for module in clip.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    head = [p for n, p in clip.visual.named_parameters() if n.startswith("head.") or n == "proj"]
    trunk = [p for n, p in clip.visual.named_parameters() if not (n.startswith("head.") or n == "proj")]
    groups = [
        {"params": trunk, "lr": recipe.trunk_rate, "weight_decay": recipe.weight_decay},
        {"params": head, "lr": recipe.head_rate, "weight_decay": recipe.weight_decay},
        {"params": [clip.logit_scale], "lr": recipe.head_rate, "weight_decay": 0.0},
    ]
    checkpoint = Path(order.work) / "image.safetensors"
    fit(clip, groups, loss_of, order.minutes_image, checkpoint, "pictures", (size + drawn) * place.size, place)
    clip.eval()


# ---- finish


def choose_interpolation(
    clip: open_clip.CLIP, start: dict[str, Tensor], validation: Pictures, classes: Tensor, place: Place
) -> None:
    """Image tower = share x trained + (1 - share) x start, running statistics too.

    The share nearest to the start whose accuracy on held-out training pictures is within a point of the best.
    """
    trained = {k: v.clone() for k, v in clip.visual.state_dict().items()}
    found: dict[float, float] = {}

    def mix(share: float) -> None:
        pairs = ((k, start[k].to(v.device), v) for k, v in trained.items())
        clip.visual.load_state_dict({k: torch.lerp(a, v, share) if v.is_floating_point() else v for k, a, v in pairs})

    for share in (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        mix(share)
        found[share] = accuracy(clip, validation, classes, place.device)
        place.say(f"interpolation {share:.2f}: {found[share]:.3f} on held-out training pictures")
    chosen = min(share for share, right in found.items() if right >= max(found.values()) - 0.01)
    mix(chosen)
    place.say(f"interpolation {chosen:.2f} chosen")


def new_clip(order: Order, place: Place) -> open_clip.CLIP:
    folder = Path(order.work) / "config"
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps(order.config, indent=1) + "\n")
    place.wait()
    torch.manual_seed(order.seed)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    if order.trunk is not None:
        weights = {k: v.float() for k, v in load_file(order.trunk).items() if not k.startswith("classifier.")}
        missing, unexpected = clip.visual.trunk.load_state_dict(weights, strict=False)
        if unexpected or any(not k.endswith("num_batches_tracked") for k in missing):
            raise ValueError(
                f"{order.trunk} does not fit the trunk: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
    return clip.to(place.device).to(memory_format=torch.channels_last).eval()


def save(clip: open_clip.CLIP, order: Order, place: Place) -> None:
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(order.recipe.logit_scale))
    half = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in clip.state_dict().items()}
    bad = [k for k, v in half.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise OverflowError(f"{bad[0]} does not fit float16")
    out = Path(order.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(order.config, indent=1) + "\n")
    save_file(half, out / "open_clip_model.safetensors", {"format": "pt"})
    place.say(f"saved {out}: {(out / 'open_clip_model.safetensors').stat().st_size} bytes")


def pretrain(order: Order, place: Place) -> None:
    """All phases in order; each finds what an interrupted run left in the work folder."""
    recipe = order.recipe
    clip = new_clip(order, place)
    targets = read_targets(Path(order.text_targets))
    train_text(clip, targets, order, place)
    place.say(f"names held out: {len(targets.held_out)}, found among all names {names_found(clip, targets):.3f}")

    pictures = read_pictures(order, place)
    shuffled = np.random.default_rng((order.seed, 5)).permutation(len(pictures.labels))
    aside = min(recipe.validation_pictures, len(shuffled) // 10)
    held = shuffled[:aside]
    validation = pictures.at(held)
    place.say(f"{len(shuffled) - aside} pictures to train on, {aside} held out, {len(pictures.names)} classes")
    vectors = vectors_of(clip, pictures.names, device=place.device)
    classes = unit_mean(vectors)
    world = make_world(clip, order, place)
    teacher = make_teacher(clip, pictures, order, place)

    if order.trunk is not None:
        known = pictures.at(shuffled[aside : aside + 12_000])
        tie_projection(clip, known, world, teacher, classes, place.device)
    start = {k: v.clone() for k, v in clip.visual.state_dict().items()}
    place.say(f"start: {accuracy(clip, validation, classes, place.device):.3f} on held-out training pictures")
    train_image(clip, pictures, shuffled[aside:], vectors, world, teacher, order, place)
    if place.rank == 0:
        if order.trunk is not None:
            choose_interpolation(clip, start, validation, classes, place)
        save(clip, order, place)
    place.wait()
