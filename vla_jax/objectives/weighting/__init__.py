"""λ policies: how the action loss is weighed against the text loss. See `base` for what one is."""

from vla_jax.objectives.weighting import trunk
from vla_jax.objectives.weighting.base import Pair, Products, Weighting, Weights, combine
from vla_jax.objectives.weighting.cagrad import CAGrad
from vla_jax.objectives.weighting.config import SCHEDULES, WeightingConfig
from vla_jax.objectives.weighting.fixed import Fixed
from vla_jax.objectives.weighting.gradient_ratio import GradientRatio
from vla_jax.objectives.weighting.gradnorm import GradNorm
from vla_jax.objectives.weighting.loss_ema import LossEma
from vla_jax.objectives.weighting.mgda import MGDA
from vla_jax.objectives.weighting.pcgrad import PCGrad
from vla_jax.objectives.weighting.per_loss import per_loss
from vla_jax.objectives.weighting.schedule import Scheduled
from vla_jax.objectives.weighting.uncertainty import Uncertainty

__all__ = [
    "MGDA",
    "CAGrad",
    "Fixed",
    "GradNorm",
    "GradientRatio",
    "LossEma",
    "PCGrad",
    "Pair",
    "Products",
    "Scheduled",
    "Uncertainty",
    "Weighting",
    "WeightingConfig",
    "Weights",
    "combine",
    "make_weighting",
    "per_loss",
    "trunk",
]


def make_weighting(config: WeightingConfig, action_weight: float, steps: int) -> Weighting:
    """The policy of a run of `steps` steps."""
    if config.policy in SCHEDULES:
        begin, end = (round(share * steps) for share in (config.begin, config.end))
        return Scheduled(action_weight, config.start, config.policy, begin, end)
    make = {
        "fixed": lambda: Fixed(action_weight),
        "uncertainty": lambda: Uncertainty(action_weight, config.rate),
        "loss_ema": lambda: LossEma(action_weight, config.decay),
        "gradnorm": lambda: GradNorm(action_weight, config.rate, config.asymmetry),
        "gradient_ratio": lambda: GradientRatio(action_weight),
        "pcgrad": lambda: PCGrad(action_weight),
        "mgda": lambda: MGDA(action_weight),
        "cagrad": lambda: CAGrad(action_weight, config.radius),
    }
    return make[config.policy]()
