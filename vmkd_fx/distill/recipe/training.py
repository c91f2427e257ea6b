"""The section `train`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from vmkd_fx.distill.recipe.section import Section

# timm's schedules whose whole course follows from the keys below; timm keeps no list of them.
SCHEDULES = ("constant", "cosine", "rsqrt", "step", "tanh", "wsd")


class TrainConfig(Section):
    """The optimiser, its schedule, how a step is computed, and how often things are written down."""

    manner: ClassVar[frozenset[str]] = frozenset(
        {"device", "spike", "checkpoint_every", "log_every", "loggers", "evaluate_first"}
    )

    epochs: int = Field(default=30, ge=1, description="passes over the training images")
    batch_size: int = Field(
        default=64,
        ge=1,
        description="images a step, of all processes together; an epoch has whole batches only",
    )
    accumulation: int = Field(
        default=1, ge=1, description="parts that a process computes one after the other before a step"
    )
    optimizer: str = Field(default="adamw", description="a name in timm.optim.list_optimizers()")
    optimizer_options: dict[str, JsonValue] = Field(
        default={}, description="keyword arguments for timm's optimiser: betas, eps, momentum"
    )
    lr: float = Field(default=1e-3, gt=0, description="largest learning rate")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the schedule")
    weight_decay: float = Field(
        default=0.05, ge=0, description="for all parameters but the one-dimensional ones"
    )
    schedule: str = Field(default="cosine", description=f"one of {', '.join(SCHEDULES)}; updated every step")
    decay_epochs: int | None = Field(
        default=None,
        ge=1,
        description="epochs from one decay to the next (step, which needs it), or of the decay at the end "
        "(wsd, rsqrt; none: a fifth)",
    )
    decay_rate: float = Field(
        default=0.1, gt=0, lt=1, description="factor on the learning rate at each decay of the schedule step"
    )
    warmup_epochs: int = Field(
        default=0, ge=0, description="epochs of warm-up from warmup_lr, part of `epochs`"
    )
    warmup_lr: float | None = Field(
        default=None, ge=0, description="learning rate at the first step of a warm-up; none: lr / 100"
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="factor on the learning rate for each layer away from the head; none: one rate for all",
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="largest decay of the averaged weights; none: no average"
    )
    clip_grad: float | None = Field(
        default=None, gt=0, description="where the gradient is clipped, see clip_mode; none: not clipped"
    )
    clip_mode: Literal["norm", "value", "agc"] = Field(
        default="norm",
        description="clip_grad is the gradient's largest norm, its largest element, or the largest share of "
        "each weight's norm (adaptive)",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the class loss")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of batches, augmentation and everything random in training"
    )
    amp: Literal["bfloat16", "float16"] | None = Field(
        default=None, description="half precision under autocast, losses in float32; none: float32 throughout"
    )
    compile: bool = Field(default=False, description="compile student and teachers with torch.compile")
    channels_last: bool = Field(default=False, description="keep images and convolutions as NHWC in memory")
    distributed: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="with several processes: each holds the student (ddp), or a share of weights, gradients "
        "and optimiser state (fsdp)",
    )
    sync_batchnorm: bool = Field(
        default=False, description="take BatchNorm's statistics over the batches of all processes (GPUs only)"
    )
    device: str | None = Field(
        default=None, description="where to train, cpu or cuda:1; none: a GPU where there is one"
    )
    spike: float | None = Field(
        default=10.0,
        gt=0,
        description="stop when the loss rises by this many times its size at the start; none: never",
    )
    checkpoint_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    evaluate_every: int = Field(
        default=1, ge=1, description="epochs between evaluations; the last epoch always has one"
    )
    evaluate_first: bool = Field(default=True, description="judge student and teachers before the first step")
    log_every: int = Field(default=1, ge=1, description="steps between lines in the log")
    loggers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        default=(),
        strict=False,
        description="where the log goes too, beside log.jsonl and TensorBoard's files",
    )

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; it must be below epochs, {self.epochs}")
        if self.schedule == "step" and self.decay_epochs is None:
            raise ValueError("the schedule step needs decay_epochs, the epochs from one decay to the next")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of accumulation, {self.accumulation}"
            )
        return self
