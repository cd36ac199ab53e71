"""The configuration of the training objective."""

import dataclasses
from typing import Literal

from vla_jax.finite import finite
from vla_jax.objectives.weighting.config import OPTIONS, RELATIVE, WeightingConfig

Reduction = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Comparing the losses' gradients on the shared trunk; see `objectives/diagnostics.py`."""

    every: int = 0
    """Steps between comparisons, a multiple of train.log_every; 0: never, at no cost. Other steps log null."""
    trunk: tuple[str, ...] = ("backbone",)
    """Paths of the parameters that are compared, e.g. backbone/llm/layers."""
    time_bins: int = 4
    """Bins of the flow time, of each loss that has one; each costs a backward pass of the samples compared."""
    stride: int = 8
    """Compare on every n-th sample of the batch: divides cost and memory; 1: on all of them. Fewer samples make
    noisier, and so longer, gradients: norms, λ_eff and cosine are then the subsample's."""

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"objective.diagnostics.every={self.every}: must not be negative")
        for name in ("time_bins", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.diagnostics.{name}={getattr(self, name)}: at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("objective.")
class ObjectiveConfig:
    """L = Σ λ_i · L_i, each the mean over its own valid elements of the global batch: with the text alone beside the
    actions it is Transfusion, CE(text) + λ · L(actions)."""

    action_weight: float = 1.0
    """λ, the weight of the action loss against a text weight of 1; 0 leaves the expert out altogether."""
    weights: tuple[tuple[str, float], ...] = ()
    """Further terms of the objective (`objectives/terms`) with their λ, as NAME λ NAME λ …; a term that is not named
    has 0, and what has 0 is not computed. In a sweep's grid: objective.weights.NAME=…"""
    weighting: WeightingConfig = WeightingConfig()
    text_reduction: Reduction = "mean"
    """What λ is relative to: the text loss per target token (mean), or per sample, summed over its tokens (sum)."""
    action_reduction: Reduction = "mean"
    """What λ multiplies: the action loss per element (mean), or per chunk, summed over steps and dimensions (sum)."""
    text: bool = True
    """Whether the text targets are learned; False leaves the text term out altogether."""
    insulation: float = 1.0
    """κ in [0, 1]: scale of the action loss's gradient into the backbone; 1 as in π0, 0 is knowledge insulation."""
    noise_draws: int = 1
    """K: how many (time, noise) draws share one pass of the backbone. Regression and tokens have none to draw: 1."""
    plan_visible: float = 0.5
    """Probability that a sample's expert sees its text target, so that one network acts with and without a plan."""
    prompt_dropout: float = 0.0
    """Probability that a sample has the null prompt (no instruction, no text target), so that sampling can be guided
    by language; 0.1 is usual, 0: no guidance."""
    rtc_prefix: int = 0
    """D: each draw's first d ~ U{0..D} actions are clean and not learned, so that a chunk can continue the one that
    runs while it is computed (training-time real-time chunking); 0: none."""
    padding_loss: bool = False
    """Whether action dims that the model has and the robot has not are learned too, as zeros (openpi: yes, LeRobot:
    no). The network reads there, when it samples, what it predicted there: without this, what it was not trained on.
    For model.expert.padding=noise only (action tokens have no padding); --init-from takes it over with the model.
    Steps behind an episode's end are another thing: data.after_end."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()

    def __post_init__(self):
        if self.action_weight < 0:
            raise ValueError(f"objective.action_weight={self.action_weight} is negative; λ is at least 0")
        self._check_weights()
        if not self.asked:
            raise ValueError("objective.action_weight=0 and objective.text=False leave nothing to learn")
        self._check_several()
        if not 0 <= self.insulation <= 1:
            raise ValueError(f"objective.insulation={self.insulation} lies outside [0, 1]")
        if self.noise_draws < 1:
            raise ValueError(f"objective.noise_draws={self.noise_draws}: at least 1")
        if not 0 <= self.plan_visible <= 1:
            raise ValueError(f"objective.plan_visible={self.plan_visible} is not a probability")
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"objective.prompt_dropout={self.prompt_dropout} lies outside [0, 1)")
        if self.rtc_prefix < 0:
            raise ValueError(f"objective.rtc_prefix={self.rtc_prefix}: must not be negative")

    def weight(self, name: str) -> float:
        """λ of a term, by its name; 0: it is not computed."""
        return self._weights.get(name, 0.0)

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the terms that are computed."""
        return tuple(name for name, weight in self._weights.items() if weight > 0)

    @property
    def _weights(self) -> dict[str, float]:
        """λ of every term that is named. The text's is 1, because the others are relative to it."""
        return {"text": float(self.text), "action": self.action_weight, **dict(self.weights)}

    def _check_weights(self) -> None:
        own = {"text": "objective.text", "action": "objective.action_weight"}
        names = [name for name, _ in self.weights]
        for name, weight in self.weights:
            if name in own:
                raise ValueError(f"objective.weights names '{name}', whose option is {own[name]}")
            if names.count(name) > 1:
                raise ValueError(f"objective.weights names '{name}' twice")
            if weight < 0:
                raise ValueError(f"objective.weights: {name} {weight} is negative; λ is at least 0")

    def _check_several(self) -> None:
        """Weighing and comparing losses needs two at least, and their gradients a trunk that they share."""
        policy = self.weighting.policy
        wants = None if policy == "fixed" else f"objective.weighting.policy={policy}"
        if self.diagnostics.every:
            wants = wants or f"objective.diagnostics.every={self.diagnostics.every}"
        if wants and len(self.asked) < 2:
            missing = "action_weight=0" if self.action_weight == 0 else "text=False"
            raise ValueError(f"{wants} needs two losses, but objective.{missing} leaves one")
        if policy in RELATIVE and not self.text:
            raise ValueError(
                f"objective.weighting.policy={policy} weighs the other losses against the text's, but objective.text="
                "False leaves it out; use another policy"
            )
        if self.insulation == 0 and self.action_weight > 0 and "trunk" in OPTIONS[policy]:
            raise ValueError(
                f"objective.weighting.policy={policy} compares gradients on the trunk, but objective.insulation=0 "
                "keeps the action loss's from it; use a fixed or scheduled policy"
            )
