"""Another schedule for a trained field, without training (Lipman et al. 2412.06264, section 4.6.2).

Two schedules with the same signal-to-noise ratio hold the same information: ``x_new(r) = s x_old(t)`` with t where
the ratios agree. So the trained field is asked there for the data and the noise it sees, and these are put together
again with the new schedule's weights. Nothing is divided by the derivative of the time change, whose 0/0 and inf/inf
at the ends are where the usual form breaks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.flow.paths import align
from vla_jax.flow.predictions import data_and_noise
from vla_jax.flow.schedules import Schedule
from vla_jax.flow.solvers import Field


def change_schedule(field: Field, old: Schedule, new: Schedule) -> Field:
    """The velocity field on `new` of a velocity `field` trained on `old`.

    At t = 1 of a schedule whose sigma' is infinite there (VP, LinearVP) the velocity of an imperfect field is
    infinite: use a solver that does not ask for it (euler, midpoint). Where `new` begins with more noise than `old`
    knows (alpha(0) of VP is 0.0066), the field is asked at its own noisiest time.
    """

    def moved(x: Float[Array, "b ..."], r: Float[Array, "b *k"]) -> Float[Array, "b ..."]:
        t = old.inverse_log_snr(new.log_snr(r))
        scale = jnp.hypot(new.alpha(r), new.sigma(r)) / jnp.hypot(old.alpha(t), old.sigma(t))
        x_old = x / align(scale, x)
        x1, eps = data_and_noise(old, "velocity", field(x_old, t), x_old, t)
        r = align(r, x)
        return new.d_alpha(r) * x1 + new.d_sigma(r) * eps

    return moved
