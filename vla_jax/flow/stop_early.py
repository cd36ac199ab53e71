"""diffrax's step sizes, but for one thing: they end at the first value that is NaN or infinite.

diffrax's own takes such a value for too long a step and tries ever shorter ones until its limit of steps. A network
that has answered NaN once answers it for shorter steps too.
"""

from typing import Any

import diffrax
import jax.numpy as jnp
from jax import Array

NOT_FINITE = diffrax.RESULTS.dt_min_reached
"""What a solution says then: no other cause has it, since no least step is set."""


class StopEarly(diffrax.PIDController):
    """A PID controller that ends the solution with `NOT_FINITE`."""

    def adapt_step_size(
        self,
        t0: Array | float,
        t1: Array | float,
        y0: Array,
        y1_candidate: Array,
        args: Any,
        y_error: Array,
        error_order: Array | float,
        controller_state: Any,
    ) -> tuple[Any, ...]:
        """As diffrax's, see there, of one state [b ...] at the times t0 and t1."""
        keep, *rest, result = super().adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        )
        finite = jnp.isfinite(y1_candidate).all() & jnp.isfinite(y_error).all()
        return keep, *rest, diffrax.RESULTS.where(finite, result, NOT_FINITE)
