"""The joint-attention expert of π0 (arXiv:2410.24164) and π0.5 (arXiv:2504.16054).

A tower with weights of its own, as deep as the decoder and with the same heads, whose queries attend in every
layer to the decoder's cached keys and values and to the suffix `[state][k actions]`. The state sees the prefix
and itself; actions see the prefix, the state and one another.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.layers import init
from vla_jax.layers.attention import prefix_lm
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import Dense
from vla_jax.models.config import ExpertConfig, VLAConfig
from vla_jax.models.gemma import Tower, TowerConfig
from vla_jax.types import Cache


class JointExpert(nn.Module):
    """Predicts the field (velocity, or the actions themselves) of a chunk from the cache and the noisy chunk."""

    config: VLAConfig

    def setup(self):
        """Declares projections and tower."""
        text, expert = self.config.text, self.config.expert
        dtype = jnp.dtype(self.config.dtype)
        adaptive = expert.time == "adarms"
        tower = TowerConfig(
            width=expert.width,
            depth=text.depth,
            mlp=expert.mlp,
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            adaptive=adaptive,
        )
        self.tower = Tower(tower, dtype, self.config.remat, self.config.unroll, self.config.attention)
        nn.share_scope(self, self.tower)
        self.action_in_proj = _dense(expert.width, ("action", "embed"), dtype)
        self.action_out_proj = _dense(expert.action_dim, ("embed", "action"), jnp.float32)
        if expert.state_token:
            self.state_proj = _dense(expert.width, ("action", "embed"), dtype)
        if adaptive:
            self.time_mlp_in = _dense(expert.width, ("embed", "mlp"), dtype)
            self.time_mlp_out = _dense(expert.width, ("mlp", "embed"), dtype)
        else:
            self.action_time_mlp_in = _dense(expert.width, ("embed", "mlp"), dtype)
            self.action_time_mlp_out = _dense(expert.width, ("mlp", "embed"), dtype)

    def denoise(
        self,
        cache: Cache,
        state: Float[Array, "bk q"],
        x_t: Float[Array, "bk k a"],
        t: Float[Array, "bk"] | Float[Array, "bk k"],
        action_mask: Bool[Array, "bk k a"] | None = None,
    ) -> Float[Array, "bk k a"]:
        """The prediction for the chunk at time t, float32.

        The rows of `x_t` may be K times those of the cache: K draws per sample, next to each other. `action_mask` is
        False in two kinds of elements. Padded steps (no valid dimension: behind the episode's end) are invisible: not
        read, and attended by nobody. Padded dims of other steps (the robot has fewer than the model) are zeros to the
        network or what `x_t` holds there, as `expert.padding` says.
        """
        expert = self.config.expert
        rows, horizon, _ = x_t.shape
        step_mask = jnp.ones((rows, horizon), bool)
        if action_mask is not None:
            step_mask = action_mask.any(axis=-1)
            x_t = jnp.where(action_mask if expert.padding == "zero" else step_mask[..., None], x_t, 0)
        time = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, (rows, horizon))
        embedded_time = embed_clock(time, expert).astype(jnp.dtype(self.config.dtype))

        actions, condition = self.action_in_proj(x_t), None
        if expert.time == "adarms":
            condition = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded_time))))
        else:
            mixed = jnp.concatenate([actions, embedded_time], axis=-1)
            actions = self.action_time_mlp_out(nn.swish(self.action_time_mlp_in(mixed)))

        # Each True starts a block that the tokens before it cannot see: [state][actions].
        starts = jnp.zeros((rows, horizon), bool).at[:, 0].set(True)
        valid = step_mask
        tokens = actions
        if expert.state_token:
            tokens = jnp.concatenate([self.state_proj(state)[:, None], actions], axis=1)
            starts = jnp.concatenate([jnp.ones((rows, 1), bool), starts], axis=1)
            valid = jnp.concatenate([jnp.ones((rows, 1), bool), step_mask], axis=1)
            if condition is not None:  # the state token is clean data: t = 1
                clean = embed_clock(jnp.ones((rows, 1)), expert).astype(condition.dtype)
                clean = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(clean))))
                condition = jnp.concatenate([clean, condition], axis=1)
        tokens = constrain(tokens, ("batch", "length", "act_embed"))

        seen = jnp.sum(cache.visible, axis=1)  # positions go on after what the expert sees of the prefix
        positions = jnp.repeat(seen, rows // seen.shape[0])[:, None] + jnp.arange(tokens.shape[1])
        hidden, _ = self.tower(
            tokens,
            positions,
            prefix_lm(valid, starts),
            (cache.keys, cache.values),
            cache.visible,
            condition,
        )
        return self.action_out_proj(hidden[:, -horizon:].astype(jnp.float32))


def embed_clock(t: Float[Array, "*b"], expert: ExpertConfig) -> Float[Array, "*b d"]:
    """What the expert is told of time t: its embedding, or that of 1 - t where its clock runs the other way."""
    return embed_time(t if expert.clock == "forward" else 1 - t, expert.width)


def embed_time(
    t: Float[Array, "*b"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*b d"]:
    """Sine and cosine of 2π·t/period for log-spaced periods (π0, appendix B; openpi's constants)."""
    period = min_period * (max_period / min_period) ** jnp.linspace(0.0, 1.0, width // 2)
    angle = 2 * jnp.pi * t[..., None] / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _dense(width: int, names: tuple[str, str], dtype: jnp.dtype) -> Dense:
    return Dense(width, dtype=dtype, kernel_init=init.kernel(names), bias_init=init.zeros((names[1],)))
