"""The configuration of the training objective."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Transfusion: L = CE(text) + λ · L(actions), each the mean over its own valid elements of the global batch."""

    action_weight: float = 1.0
    """λ, the weight of the action loss against a text weight of 1; 0 leaves the expert out altogether."""
    text: bool = True
    """Whether the text targets are learned; False leaves the text term out altogether."""
    insulation: float = 1.0
    """κ in [0, 1]: scale of the action loss's gradient into the backbone; 1 as in π0, 0 is knowledge insulation."""
    noise_draws: int = 1
    """K: how many (time, noise) draws share one pass of the backbone."""
    plan_visible: float = 0.5
    """Probability that a sample's expert sees its text target, so that one network acts with and without a plan."""

    def __post_init__(self):
        if self.action_weight < 0:
            raise ValueError(f"objective.action_weight={self.action_weight} is negative; λ is at least 0")
        if self.action_weight == 0 and not self.text:
            raise ValueError("objective.action_weight=0 and objective.text=False leave nothing to learn")
        if not 0 <= self.insulation <= 1:
            raise ValueError(f"objective.insulation={self.insulation} lies outside [0, 1]")
        if self.noise_draws < 1:
            raise ValueError(f"objective.noise_draws={self.noise_draws}: at least 1")
        if not 0 <= self.plan_visible <= 1:
            raise ValueError(f"objective.plan_visible={self.plan_visible} is not a probability")
