"""λ policies: how the losses are weighed against one another. See `base` for what one is."""

from collections.abc import Mapping

from vla_jax.objectives.weighting import trunk
from vla_jax.objectives.weighting.base import Gram, Named, Scalar, Weighting, Weights, combine
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
    "Gram",
    "LossEma",
    "Named",
    "PCGrad",
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


def make_weighting(config: WeightingConfig, lambdas: Mapping[str, float | Scalar], steps: int) -> Weighting:
    """The policy of a run of `steps` steps; `lambdas` are the weights that the configuration gives, by term."""
    if config.policy in SCHEDULES:
        begin, end = (round(share * steps) for share in (config.begin, config.end))
        return Scheduled(lambdas, config.start, config.policy, begin, end)
    make = {
        "fixed": lambda: Fixed(lambdas),
        "uncertainty": lambda: Uncertainty(lambdas, config.rate),
        "loss_ema": lambda: LossEma(lambdas, config.decay),
        "gradnorm": lambda: GradNorm(lambdas, config.rate, config.asymmetry),
        "gradient_ratio": lambda: GradientRatio(lambdas),
        "pcgrad": lambda: PCGrad(lambdas),
        "mgda": lambda: MGDA(lambdas),
        "cagrad": lambda: CAGrad(lambdas, config.radius),
    }
    return make[config.policy]()
