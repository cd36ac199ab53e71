"""The configuration of the λ policy."""

import dataclasses
from typing import Literal

from vla_jax.finite import finite

PolicyName = Literal[
    "fixed", "step", "linear", "cosine", "uncertainty", "loss_ema", "gradnorm", "gradient_ratio", "pcgrad", "mgda",
    "cagrad",
]  # fmt: skip

OPTIONS: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "step": ("start", "begin"),
    "linear": ("start", "begin", "end"),
    "cosine": ("start", "begin", "end"),
    "uncertainty": ("rate",),
    "loss_ema": ("decay",),
    "gradnorm": ("rate", "asymmetry", "trunk"),
    "gradient_ratio": ("trunk",),
    "pcgrad": ("trunk",),
    "mgda": ("trunk",),
    "cagrad": ("radius", "trunk"),
}
"""The options that each policy reads."""
SCHEDULES = ("step", "linear", "cosine")
RELATIVE = (*SCHEDULES, "gradient_ratio")
"""Policies that leave the text's weight at 1 and set the others relative to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("objective.weighting.")
class WeightingConfig:
    """How every λ comes about in each step. In every policy its scale is what the configuration gives:
    `objective.action_weight`, and `objective.weights` of further terms. The text's is 1."""

    policy: PolicyName = "fixed"
    """fixed: λ. step, linear, cosine: from `start` to λ over the run. uncertainty: learned log-variances. loss_ema:
    each loss over its running mean, times its λ. gradnorm: balanced gradient norms and training rates.
    gradient_ratio: a gradient's norm is λ times the text's. pcgrad: conflicting parts are projected out. mgda: the
    shortest combination of all gradients. cagrad: near their sum, the best for the loss that gains least. The last five
    take a backward pass for each loss."""
    start: float = 0.0
    """step, linear, cosine: λ of all but the text at the beginning; while it is 0 only the text is computed."""
    begin: float = 0.5
    """step, linear, cosine: share of the run after which λ leaves `start`."""
    end: float = 1.0
    """linear, cosine: share of the run at which λ is reached."""
    rate: float = 0.025
    """uncertainty, gradnorm: step size of what is learned, in units of log λ."""
    asymmetry: float = 1.5
    """gradnorm: α, how strongly the loss that trains more slowly is favoured; 0 balances norms alone."""
    decay: float = 0.99
    """loss_ema: decay of the running mean, per step."""
    radius: float = 0.5
    """cagrad: c, how far from the plain sum it may go, as a share of the sum; 0 is the plain sum."""
    trunk: tuple[str, ...] = ("backbone",)
    """gradnorm, gradient_ratio, pcgrad, mgda, cagrad: paths of the shared parameters whose gradients are compared."""

    def __post_init__(self):
        if self.policy not in OPTIONS:
            raise ValueError(f"objective.weighting.policy={self.policy!r}: use one of {', '.join(OPTIONS)}")
        for field in dataclasses.fields(self):
            unread = field.name != "policy" and field.name not in OPTIONS[self.policy]
            if unread and getattr(self, field.name) != field.default:
                readers = ", ".join(name for name, options in OPTIONS.items() if field.name in options)
                raise ValueError(
                    f"objective.weighting.{field.name} means nothing to policy {self.policy}; it is read by {readers}"
                )
        if self.start < 0:
            raise ValueError(f"objective.weighting.start={self.start} is negative; λ is at least 0")
        if not (0 <= self.begin <= 1 and 0 <= self.end <= 1):
            raise ValueError(
                f"objective.weighting: begin={self.begin} and end={self.end} are shares of the run"
            )
        if "end" in OPTIONS[self.policy] and self.end <= self.begin:
            raise ValueError(f"objective.weighting.end={self.end} is not after begin={self.begin}")
        if self.rate <= 0:
            raise ValueError(f"objective.weighting.rate={self.rate}: must be above 0")
        if self.asymmetry < 0:
            raise ValueError(f"objective.weighting.asymmetry={self.asymmetry}: must not be negative")
        if not 0 <= self.decay < 1:
            raise ValueError(f"objective.weighting.decay={self.decay}: must be in [0, 1)")
        if not 0 <= self.radius < 1:
            raise ValueError(f"objective.weighting.radius={self.radius}: must be in [0, 1)")
        if not self.trunk:
            raise ValueError("objective.weighting.trunk names no path; backbone is what all losses share")
