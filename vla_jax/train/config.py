"""The optimiser's and the training loop's configuration."""

import dataclasses
from typing import Literal, NamedTuple

from vla_jax.finite import finite


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("optim.")
class OptimConfig:
    """AdamW with clipping and a warm-up → hold → cosine learning rate."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for matrices and AdamW for all else; both take the same learning rate."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment (mean of the gradient); Muon's own is 0.95."""
    beta2: float = 0.95
    """Decay of the second moment (mean of the squared gradient)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay: each step takes learning_rate · weight_decay · w away."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay: matrices (not biases, norms, embeddings or position embeddings) or all."""
    clip: Literal["global", "per_group"] = "global"
    """Clip the norm of the whole gradient, or that of each top-level group (backbone, expert) by itself."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    warmup_fraction: float = 0.05
    """Share of all steps in which the learning rate rises linearly from 0."""
    hold_fraction: float = 0.0
    """Share of all steps after the warm-up at the peak; the cosine takes the rest."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the first moment is stored (the second is always float32): bfloat16 saves 2 bytes per parameter."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by glob patterns of their paths: backbone/img/** is the image encoder. They
    have no gradient, no optimiser state and no average, and stay bit for bit as they are."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How frozen parameters (LoRA's too) are stored; bfloat16 halves them, and rounds them once at the start."""
    groups: tuple[str, ...] = ()
    """Learning rates and clips of their own: "pattern:factor" or "pattern:factor:clip", e.g. backbone/**:0.1 or
    expert/**:1:5. The factor multiplies the learning rate (and with it the decay), clip is the largest norm of the
    group's own gradient. The first pattern that fits a parameter counts; others are as without."""

    def __post_init__(self):
        _check(self.learning_rate > 0, f"optim.learning_rate={self.learning_rate}: must be above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optim.{name}={value}: must be in [0, 1)")
        _check(self.eps > 0, f"optim.eps={self.eps}: must be above 0")
        _check(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: must not be negative")
        _check(
            self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: must be above 0; a very large value turns clipping off",
        )
        for name in ("warmup_fraction", "hold_fraction", "final_fraction"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"optim.{name}={value}: must be in [0, 1]")
        self.parsed_groups()
        total = self.warmup_fraction + self.hold_fraction
        _check(total <= 1, f"optim: warmup_fraction + hold_fraction = {total:g} is more than 1; lower one")

    def parsed_groups(self) -> tuple["ParameterGroup", ...]:
        """The entries of `groups`, parsed. Raises ValueError for one that is malformed."""
        return tuple(_group(text) for text in self.groups)


class ParameterGroup(NamedTuple):
    """Parameters whose learning rate has a factor, and maybe a clipping norm of their own."""

    pattern: str
    factor: float
    clip: float | None


def _group(text: str) -> ParameterGroup:
    pattern, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    good = pattern and len(values) in (1, 2) and all(0 < value < float("inf") for value in values)
    _check(
        bool(good),
        f"optim.groups: {text!r} is not pattern:factor or pattern:factor:clip with numbers above 0, e.g. "
        "backbone/**:0.1; to leave a group out use optim.freeze",
    )
    return ParameterGroup(pattern, values[0], values[1] if len(values) > 1 else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("lora.")
class LoraConfig:
    """LoRA (arXiv:2106.09685): frozen matrices W, of which W + α/rank · A·B is used and A, B are trained."""

    rank: int = 0
    """Columns of A and rows of B; 0: no LoRA."""
    alpha: float = 16.0
    """α; the update is multiplied by α/rank."""
    modules: tuple[str, ...] = ()
    """Glob patterns of parameter paths. What they name is frozen, and the matrices among it get an A and a B; what
    they do not name is trained as a whole, unless optim.freeze names it. Empty: backbone/** and, where there is an
    expert, expert/layers/**."""

    def __post_init__(self):
        _check(self.rank >= 0, f"lora.rank={self.rank}: must not be negative; 0 is no LoRA")
        _check(self.alpha > 0, f"lora.alpha={self.alpha}: must be above 0")

    @property
    def scale(self) -> float:
        """What multiplies A·B: alpha / rank; 0 without LoRA."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("train.")
class LoopConfig:
    """How long to train, on how much at a time, and what to write down on the way."""

    batch_size: int = 64
    """Examples per step, over all devices and hosts."""
    steps: int = 10_000
    """Optimiser steps of the whole run, those that are skipped included."""
    accumulate: int = 1
    """Microbatches per step: divides the activation memory, changes nothing else."""
    ema_decay: float | None = 0.999
    """Decay of the averaged parameters, which validation and policies use; None: no average is kept. It is warmed up,
    min(ema_decay, (1 + n) / (10 + n)) after n updates, so that short runs do not average over their random start."""
    max_skipped: int = 20
    """Stop after so many steps in a row were skipped because loss or gradient was not finite."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    val_every: int = 1000
    """Steps between validations on held-out episodes; 0: never."""
    val_batches: int = 8
    """Batches per validation, the same ones each time."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints to keep; the others are deleted."""
    spike_sigma: float = 0.0
    """Skip a step whose loss or gradient norm is so many standard deviations above the mean of the last
    `spike_window` steps (6 is usual); 0: never."""
    spike_window: int = 128
    """Steps whose loss and gradient norm are remembered to recognise a spike; none is found before half are there."""
    host_timeout: float = 30.0
    """Seconds without a sign of life after which a process counts as dead and the run ends, naming it."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which the run prints where every thread is, names who is behind and ends;
    longer than the slowest compilation, validation or save. 0: never."""
    xla: tuple[str, ...] = ()
    """Compiler options for the training step, name=value; those of other platforms (xla_tpu_…, xla_gpu_…) are left out.
    xla_tpu_scoped_vmem_limit_kib=65536 makes π0's products faster on chips with 128 MiB of vector memory."""
    init_from: str = ""
    """A run's directory (or one step of it, or converted weights) whose parameters a new run starts from, the averaged
    ones where it has them. The log says which arrays are new because actions, states or vocabulary are others;
    everything else that does not fit is refused. To take the model's sizes from it too, use --init-from."""
    init_new: tuple[str, ...] = ()
    """Glob patterns of parameters that start anew whatever init_from holds, e.g. expert/** for another expert."""
    tensorboard: bool = True
    """Also write the metrics as TensorBoard events to RUN_DIR/tensorboard."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases (needs the wandb extra)."""

    def __post_init__(self):
        for name in ("batch_size", "steps", "accumulate", "max_skipped", "log_every", "save_every", "keep"):
            value = getattr(self, name)
            _check(value >= 1, f"train.{name}={value}: must be at least 1")
        for option in self.xla:
            _check(
                bool(option.partition("=")[2]),
                f"train.xla: '{option}' is not name=value, e.g. xla_tpu_…=65536",
            )
        for name in ("val_every", "val_batches", "spike_sigma", "hang_timeout"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name}={value}: must not be negative")
        _check(
            self.val_every == 0 or self.val_batches > 0,
            "train.val_batches=0 leaves nothing to validate on; use train.val_every=0 to turn validation off",
        )
        _check(
            not self.init_new or bool(self.init_from),
            "train.init_new says what is not taken from train.init_from, but that is not set",
        )
        _check(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"train.ema_decay={self.ema_decay}: must be between 0 and 1, or None",
        )
        _check(
            self.spike_window >= 2 and self.host_timeout > 0,
            f"train.spike_window={self.spike_window}, train.host_timeout={self.host_timeout}: "
            "must be at least 2 steps and above 0 seconds",
        )
        _check(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not divisible by train.accumulate={self.accumulate}; "
            f"use {-(-self.batch_size // self.accumulate) * self.accumulate}",
        )
