"""Every setting in one place: its name, unit, default and limits.

The same names are used in a YAML file (nested), on the command line (dotted: `--train.steps 500`) and in the
environment (`CONDU_TRAIN__STEPS=500`); `sources.py` merges them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from condu_ray.catalogue import (
    AdapterBasis,
    Calibration,
    Choices,
    MemoryCalibration,
    MethodInfo,
    MethodName,
    Shrinkage,
    Triggers,
    info,
)
from condu_ray.paths import as_path

Granularity = Literal["l1", "tensor_mean", "tensor", "row"]
DEFAULT_MODEL = "default"

DomainFeatures = Literal["means", "distributions"]
"""means: of every tower, as older releases did; distributions: means of convolutions, deviations of transformers."""

RESCALER_SHARE = 0.08  # steps that train rescalers, over those of the task's training; measured, docs/decisions.md


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSpec(_Section):
    """Which open_clip model is the base model."""

    name: str = Field(
        default=DEFAULT_MODEL, min_length=1, description="open_clip name, 'local-dir:FOLDER', or 'default'"
    )
    pretrained: str | None = Field(
        default=None, description="open_clip tag or checkpoint file (none for 'default', local-dir)"
    )


class TrainConfig(_Section):
    """How one task is fine-tuned (defaults: the published recipe, ConDU's released scripts)."""

    steps: int | None = Field(
        default=None, ge=1, description="optimiser steps; unset: 10 epochs, at least 100, at most 1000"
    )
    batch_size: int = Field(default=32, ge=1, le=65536, description="pictures per step, over all workers together")
    accumulate: int = Field(
        default=1, ge=1, description="parts that each worker's share of a batch is cut into, to save memory"
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="peak learning rate; unset: 1e-5 (LoRA, dmc 1e-3), below 50 M parameters 5e-4 (LoRA 1e-2)",
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="share of the steps with a linearly rising rate, cosine to 0 after"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    label_smoothing: float = Field(default=0.2, ge=0, lt=1, description="share of the target spread over all classes")
    towers: Literal["both", "image"] = Field(default="both", description="which towers learn")
    batch_norm: Literal["frozen", "updated"] = Field(
        default="frozen", description="whether running statistics stay those of the base model"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU that has it, else fp32"
    )
    checkpoint_seconds: float = Field(
        default=60.0, gt=0, description="least time between two checkpoints of a running task"
    )
    loader_processes: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="processes per worker that decode pictures ahead; unset: none on CPUs, up to 8 beside a GPU",
    )


class LoraConfig(_Section):
    """Adapters of the method condu-lora: W + B A / sqrt(rank), A⁰ from the seed (which dmc has too), B⁰ = 0.

    Our reconstruction of the released LoRA.
    """

    rank: int = Field(default=64, ge=1, le=1024, description="inner dimension of the adapters")
    targets: Literal["mlp", "linear"] = Field(
        default="mlp",
        description="mlp: the blocks' MLP layers (1x1 convolutions where a tower has no blocks); linear: all of them",
    )
    mode: Literal["shared_a", "factors", "exact"] = Field(
        default="shared_a", description="shared_a: A frozen, B fused; factors: both fused (published); exact: no fusion"
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="random seed of A (and of prompts) at the start, one for all tasks of a store",
    )


class FusionConfig(_Section):
    """How deltas become one unified delta."""

    granularity: Granularity = Field(default="row", description="over what a rescaler is shared; published: l1")
    triggers: Triggers | None = Field(
        default=None,
        description="what a task's bits say: mask (published) or sign; unset: sign for condu-sign, else mask",
    )
    tune_rescalers: int | None = Field(
        default=None,
        ge=0,
        description="steps that train a new task's rescalers; unset: 8 % of its own with sign triggers, else 0",
    )
    shards: int = Field(
        default=1, ge=1, le=1024, description="actors, over all nodes, that share the fusing of one model"
    )


class AdapterConfig(_Section):
    """The linear adapter of rapf and calfuse, which learns on θ⁰'s features (numbers: RAPF's public code).

    What is unset has the method's default; docs/class_incremental.md says which part is published.
    """

    basis: AdapterBasis | None = Field(
        default=None,
        description="basis in which an adapter is fused with the one before; unset: svd for rapf, qr for calfuse",
    )
    weights: Literal["element", "direction", "constant"] = Field(
        default="element", description="what decides how much of a change is taken over"
    )
    mix_bias: float = Field(default=0.6, ge=0, le=1, description="least share of a change that is taken over")
    calibration: Calibration | None = Field(
        default=None,
        description="how the share of the adapted feature is found; unset: none for rapf (share 1), search for calfuse",
    )
    mix: Literal["normalized", "raw"] = Field(
        default="normalized", description="whether the adapted feature is made unit before it is mixed with θ⁰'s"
    )
    share: float = Field(
        default=0.7, ge=0, le=1, description="share of the adapted feature where it is fixed, or where learning starts"
    )
    share_start: float = Field(default=0.5, ge=0, le=1, description="share in the first session, for a schedule")
    share_end: float = Field(
        default=0.8, ge=0, le=1, description="share from session `share_sessions` on, for a schedule"
    )
    share_sessions: int = Field(default=10, ge=2, le=10_000, description="sessions until the schedule ends")
    share_pull: float = Field(default=0.1, ge=0, description="weight that holds a learned share near `share`")
    init: Literal["identity", "default"] = Field(
        default="default", description="how the first adapter starts; default: the uniform weights of a linear layer"
    )
    epochs: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="passes over a task's features; unset: 15, and more where these make less than 750 steps",
    )
    batch_size: int = Field(default=100, ge=1, le=65536, description="features per step, without those that are drawn")
    lr: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="learning rate of Adam; a tenth after 4/15 of the epochs and again after 10/15",
    )
    hinge: float = Field(
        default=1.0, ge=0, description="weight of the hinge that keeps classes with similar texts apart"
    )
    hinge_distance: float = Field(
        default=0.55, ge=0, le=2, description="distance of two texts below which their classes are similar"
    )
    hinge_margin: float = Field(default=0.1, ge=0, le=2, description="margin of the hinge, in units of cosine")
    hinge_pairs: int = Field(default=64, ge=1, le=65536, description="most pairs of similar classes per step")
    distillation: float | None = Field(
        default=None, ge=0, description="weight of the adapter before as a teacher; unset: 0 for rapf, 1 for calfuse"
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="temperature of the distillation")


class MemoryConfig(_Section):
    """Class Gaussians, from which features of old classes are drawn."""

    covariance: Literal["full", "diagonal"] = Field(
        default="full", description="what is kept per class; full: as many numbers as the square of a feature's width"
    )
    shrinkage: Shrinkage | None = Field(
        default=None,
        description="how covariances are shrunk when features are drawn; unset: none for rapf, else convex",
    )
    gamma: float = Field(default=0.1, ge=0, le=1, description="share of the mean variance, for convex shrinkage")
    per_epoch: int = Field(default=2000, ge=0, description="features drawn per epoch, over all old classes together")
    discriminant: bool | None = Field(
        default=None, description="whether the Gaussians answer too, beside the class vectors; unset: yes, but for rapf"
    )


class DmcConfig(_Section):
    """What dmc and dmc-ot learn and remember; our reconstruction where methods/dmc.py does not say otherwise."""

    rank: int = Field(default=8, ge=1, le=1024, description="inner dimension of the image tower's adapters")
    shared_prompt: int | None = Field(
        default=None, ge=0, le=64, description="prompt vectors that all tasks share; unset: 16 for dmc, 0 for dmc-ot"
    )
    task_prompt: int | None = Field(
        default=None, ge=0, le=64, description="prompt vectors of each task alone; unset: 0 for dmc, 16 for dmc-ot"
    )
    distillation: float = Field(
        default=100.0,
        ge=0,
        description="weight of the image tower before as a teacher, which keeps features from drifting; 0: none",
    )
    prompt_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps of the prompts; unset: as many as those of the image tower"
    )
    prompt_lr: float = Field(default=2e-3, gt=0, lt=1, description="peak learning rate of the prompts")
    replay: float = Field(
        default=1.0, ge=0, le=16, description="draws per old class for each picture of a new class in a batch; 0: none"
    )
    classes_per_step: int = Field(
        default=100, ge=2, le=65536, description="most classes that compete in one step where a prompt is shared"
    )
    memory_calibration: MemoryCalibration | None = Field(
        default=None,
        description="how statistics of old classes follow the image tower; unset: none for dmc, ot for dmc-ot",
    )
    shrinkage: float = Field(
        default=0.01, ge=0, le=1, description="shrinkage of the covariances that ot compares, and ridge of linear"
    )
    strength: float = Field(default=1.0, ge=0, le=1, description="share of the whole way that statistics are moved")
    compared: Literal["within", "pooled"] = Field(
        default="within", description="which covariances ot compares: around class means, or around the common mean"
    )


class VoteConfig(_Section):
    """How experts answer together."""

    k: int = Field(default=4, ge=1, le=64, description="most experts that run for a picture, besides the base model")
    router: Literal["lda", "cosine"] = Field(
        default="lda", description="what chooses experts: lda (domains, docs/voting.md) or cosine (published)"
    )
    combine: Literal["mean_logits", "weighted"] = Field(
        default="weighted", description="how the votes are joined; published: mean_logits"
    )
    average: Literal["logits", "probabilities"] = Field(default="logits", description="what `weighted` averages")
    temperature: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="temperature of the softmax over similarities, for `weighted` with router cosine",
    )
    base_weight: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of the base model; unset: how strange a picture is (cosine: 1 / (experts + 1))",
    )
    adaptive: bool = Field(default=True, description="run fewer experts where the similarities decide")
    coverage: float = Field(
        default=0.99, gt=0, lt=1, description="adaptive, lda: experts until one of them is right with this probability"
    )
    gap: float | None = Field(
        default=None,
        ge=0,
        le=3,
        description="adaptive, cosine: drop of similarity that ends the list; unset: calibrated",
    )
    prototypes: Literal["both", "image", "text"] = Field(
        default="both", description="what a class's prototype is made of, for router cosine; published: both"
    )
    union: Literal["own", "routed", "joint"] = Field(
        default="own",
        description="own: each chosen expert scores its task's classes; routed: all chosen tasks' classes; joint: all",
    )
    within: Literal["both", "expert"] = Field(
        default="both",
        description="router lda: a task's classes are told apart by its expert and the router, or by the expert alone",
    )


def _word_for_false(word: str) -> BeforeValidator:
    """YAML reads a bare `no` or `off` as false; where it is one of a setting's words, it is that word."""
    return BeforeValidator(lambda value: word if value is False else value)


def _as_tasks(value: Any) -> Any:
    """Accepts ['name=path', ...] as it comes from the command line."""
    if not isinstance(value, list | tuple):
        return value
    tasks: dict[str, str] = {}
    for item in value:
        name, equals, source = str(item).partition("=")
        if not (name and equals and source):
            raise ValueError(f"'{item}' is not NAME=PATH")
        if name in tasks:
            raise ValueError(f"task {name} is given twice")
        tasks[name] = source
    return tasks


class SessionConfig(_Section):
    """Everything that one run of `learn` needs; one YAML file holds one of these."""

    store: str = Field(
        default="./condu-store", min_length=1, description="folder or s3://BUCKET/FOLDER that holds the versions"
    )
    tasks: Annotated[dict[str, str], BeforeValidator(_as_tasks)] = Field(
        default_factory=dict, description="task name -> image folder, webdataset folder, CSV or torchvision name"
    )
    method: MethodName = Field(default="condu-sign", description="the system that learns; see `condu-ray methods`")
    model: str = Field(
        default=DEFAULT_MODEL, min_length=1, description="open_clip name, 'local-dir:FOLDER', or 'default'"
    )
    pretrained: str | None = Field(default=None, description="open_clip tag or checkpoint file")
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    fusion: FusionConfig = FusionConfig()
    adapter: AdapterConfig = AdapterConfig()
    memory: MemoryConfig = MemoryConfig()
    dmc: DmcConfig = DmcConfig()
    vote: VoteConfig = VoteConfig()
    workers: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="training processes; unset: one per GPU, or as many as tasks and cores allow",
    )
    cpus_per_worker: int | None = Field(
        default=None, ge=1, le=4096, description="CPU cores per training process; unset: as many as its node has for it"
    )
    gpus_per_worker: float = Field(
        default=1.0, gt=0, le=1, description="share of a GPU per training process; below 1, small tasks share a GPU"
    )
    node_wait_seconds: float = Field(
        default=0, ge=0, le=86400, description="longest wait for nodes that a cluster's autoscaler brings; 0: none"
    )
    parallel: Literal["auto", "tasks", "data"] = Field(
        default="auto",
        description="tasks: one worker per task; data: all share each task (DDP); auto: data for one task on GPUs",
    )
    gpu: Annotated[Literal["auto", "no"], _word_for_false("no")] = Field(
        default="auto", description="auto: GPUs where the cluster has them"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="random seed of splits, order of pictures and augmentation"
    )
    test_share: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share of the pictures that is set aside for testing where the data has no test split",
    )
    eval_pictures: int = Field(
        default=1000, ge=1, description="most test pictures per task in an evaluation (stratified, seeded)"
    )
    tracking: Annotated[str | None, _word_for_false("off")] = Field(
        default=None, description="MLflow tracking server; unset: a file beside the store; 'off': none"
    )

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: dict[str, str]) -> dict[str, str]:
        for name in tasks:
            check_task_name(name)
        return tasks

    @field_validator("model")
    @classmethod
    def _local_model(cls, model: str) -> str:
        """A local folder by its absolute path: the store that remembers it may be opened from anywhere."""
        kind, colon, folder = model.partition("local-dir:")
        return f"{colon}{as_path(folder).resolve()}" if colon and not kind else model

    @field_validator("pretrained")
    @classmethod
    def _local_weights(cls, pretrained: str | None) -> str | None:
        path = as_path(pretrained) if pretrained else None
        return str(path.resolve()) if path and path.is_file() else pretrained

    @model_validator(mode="after")
    def _rescalers(self) -> SessionConfig:
        if self.fusion.tune_rescalers and self.choices.triggers == "mask":
            raise ValueError(
                f"fusion.tune_rescalers = {self.fusion.tune_rescalers} needs sign triggers (--method condu-sign or "
                "--fusion.triggers sign), since the rescalers of masks follow from the norms of deltas"
            )
        return self

    @model_validator(mode="after")
    def _one_model(self) -> SessionConfig:
        if self.system.reads == ("train",) and self.train.batch_norm == "updated":
            raise ValueError(
                f"train.batch_norm = updated keeps statistics of each task, and {self.method} has one model for all"
            )
        return self

    @model_validator(mode="after")
    def _prompted(self) -> SessionConfig:
        if "dmc" in self.system.reads and not any(prompt_lengths(self, most=1)):
            raise ValueError("dmc.shared_prompt and dmc.task_prompt are both 0, so there is no prompt to learn")
        return self

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(name=self.model, pretrained=self.pretrained)

    @property
    def system(self) -> MethodInfo:
        """The catalogue's entry of the method."""
        return info(self.method)

    @property
    def choices(self) -> Choices:
        """The settings that a method has defaults for: as set, or the method's own."""
        asked: dict[str, Any] = {
            "triggers": self.fusion.triggers,
            "basis": self.adapter.basis,
            "calibration": self.adapter.calibration,
            "distillation": self.adapter.distillation,
            "shrinkage": self.memory.shrinkage,
            "discriminant": self.memory.discriminant,
            "shared_prompt": self.dmc.shared_prompt,
            "task_prompt": self.dmc.task_prompt,
            "memory_calibration": self.dmc.memory_calibration,
        }
        return replace(self.system.choices, **{name: value for name, value in asked.items() if value is not None})


class ServeConfig(_Section):
    """How versions are served over HTTP; one object for `condu-ray serve`, `serve run` and a Serve config file."""

    store: str = Field(default="./condu-store", min_length=1, description="folder that holds the versions")
    host: str = Field(default="127.0.0.1", description="address to listen on; another than loopback needs a token")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    token: SecretStr | None = Field(
        default=None, min_length=16, description="bearer token that requests must carry (environment only)"
    )
    version: int | None = Field(default=None, ge=1, description="version that serves; unset: always the newest")
    shadow_version: int | None = Field(
        default=None, ge=1, description="version that scores a share of the traffic too, without answering"
    )
    shadow_share: float = Field(
        default=0.1, ge=0, le=1, description="share of the pictures that `shadow_version` scores too"
    )
    replicas: int = Field(default=1, ge=1, le=1024, description="processes that hold θ⁰ and answer")
    expert_replicas: int = Field(
        default=0, ge=0, le=1024, description="processes that hold experts for them; 0: each holds its own"
    )
    fronts: int = Field(default=1, ge=1, le=256, description="processes that speak HTTP")
    cpus: float = Field(default=1, gt=0, le=256, description="CPU cores of each process that answers")
    gpus: float = Field(default=0, ge=0, le=8, description="GPUs of each process that answers")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: half the memory per expert, and faster where the hardware has it; rounds answers",
    )
    experts: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="experts as large as models that a process keeps of each version it answers by; adapters all stay",
    )
    versions: int = Field(default=1, ge=0, le=16, description="versions that stay loaded besides the one that serves")
    poll_seconds: float = Field(default=2.0, gt=0, le=3600, description="how often a new version is looked for")
    batch: int = Field(default=64, ge=1, le=4096, description="most pictures per pass through the model")
    batch_wait_ms: float = Field(default=5.0, ge=0, le=1000, description="how long a picture waits for others")
    queue: int = Field(default=128, ge=1, le=65536, description="most requests at once per front; others get 429")
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="longest time for a request")
    body_mb: float = Field(default=16.0, gt=0, le=1024, description="largest request, in MiB")
    pictures: int = Field(default=16, ge=1, le=1024, description="most pictures per request")
    megapixels: float = Field(default=64.0, gt=0, le=64, description="largest picture, once decoded")
    labels: int = Field(default=100, ge=1, le=10_000, description="most labels that a request may give")
    origins: tuple[str, ...] = Field(default=(), description="origins whose pages may call (CORS)")

    @field_validator("token", mode="before")
    @classmethod
    def _sendable(cls, token: Any) -> Any:
        if isinstance(token, str):
            token = token.strip()  # a Secret made of a file ends with a new line, which no header can hold
            if not (token.isascii() and token.isprintable()):
                raise ValueError("only letters of English, digits and signs can be sent with a request")
        return token

    @model_validator(mode="after")
    def _guarded(self) -> ServeConfig:
        if self.token is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host {self.host} can be reached from other machines, and no token is set "
                "(CONDU_SERVE__TOKEN, at least 16 characters), so anybody could ask"
            )
        return self


LOOPBACK = ("127.0.0.1", "::1", "localhost")
WATCHED = ("version", "shadow_version", "shadow_share")
"""Settings of `ServeConfig` that running replicas take up when they are changed."""

SECTIONS = tuple(
    name
    for name, info in SessionConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, _Section)
)


def check_task_name(name: str) -> str:
    """Raises ValueError unless the name can stand in a file name, a metric and a URL on every system."""
    if (
        not name
        or len(name) > 64
        or not name[0].isalnum()
        or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    ):
        raise ValueError(
            f"task name {name!r} must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


def fields(section: type[BaseModel] = SessionConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields (dotted name, field) for every setting that is not a section."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def fuses(config: SessionConfig) -> bool:
    """Whether all tasks are fused into one vector; other methods, and exact LoRA, keep each delta apart or none."""
    exact = config.method == "condu-lora" and config.lora.mode == "exact"
    return "fusion" in config.system.reads and not exact


ADAPTER_FIXED = {"basis", "weights", "mix_bias", "calibration", "mix"}
"""Settings of `adapter` that a store fixes: how its one adapter is fused and applied."""


def rescaler_steps(config: SessionConfig, trained: int) -> int:
    """Steps that train the rescalers of a task once it is fused: as set, or a share of the `trained` ones of the task
    itself; 0 where its triggers are masks."""
    if not fuses(config) or config.choices.triggers == "mask":
        return 0
    steps = config.fusion.tune_rescalers
    return math.ceil(RESCALER_SHARE * trained) if steps is None else steps


def rescales(config: SessionConfig) -> bool:
    """Whether a task's rescalers are trained once it is fused."""
    return rescaler_steps(config, 1) > 0


def prompt_lengths(config: SessionConfig, most: int) -> tuple[int, int]:
    """(vectors of the prompt that all tasks share, vectors of each task's own prompt): as set, or the method's default,
    which is cut to `most`."""
    shared, own = config.choices.shared_prompt, config.choices.task_prompt
    return (
        min(shared, most) if config.dmc.shared_prompt is None else shared,
        min(own, most) if config.dmc.task_prompt is None else own,
    )


def fixed_by_store(config: SessionConfig) -> dict[str, Any]:
    """The settings (dotted names) that a store fixes when it is created: those that its method reads."""
    reads = config.system.reads
    return {
        "method": config.method,
        "model": config.model,
        "pretrained": config.pretrained,
        "train.towers": config.train.towers,
        **(_section("lora", config.lora) if "lora" in reads else {}),
        **(_section("fusion", config.fusion, exclude={"shards"}) if "fusion" in reads else {}),
        **(_section("adapter", config.adapter, include=ADAPTER_FIXED) if "adapter" in reads else {}),
        **(_memory_fixed(config) if "memory" in reads else {}),
        **(_section("dmc", config.dmc) | {"lora.seed": config.lora.seed} if "dmc" in reads else {}),
    }


def _section(name: str, section: BaseModel, **chosen: set[str]) -> dict[str, Any]:
    return {f"{name}.{each}": value for each, value in section.model_dump(**chosen).items()}  # type: ignore[arg-type]


def _memory_fixed(config: SessionConfig) -> dict[str, Any]:
    """Settings of `memory` that a store fixes: the Gaussians of all its sessions answer and are drawn from together."""
    return {
        "memory.covariance": config.memory.covariance,
        "memory.shrinkage": config.choices.shrinkage,
        "memory.gamma": config.memory.gamma,
        "memory.discriminant": config.choices.discriminant,
    }
