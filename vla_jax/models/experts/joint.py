"""The joint-attention expert of π0 (arXiv:2410.24164) and π0.5 (arXiv:2504.16054).

A tower with weights of its own, as deep as the decoder and with the same heads, whose queries attend in every
layer to the decoder's keys and values and to the suffix `[state][k actions]`. The state sees the prefix
and itself; actions see the prefix, the state and one another.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.attention import prefix_lm
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import dense
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.compute import Compute
from vla_jax.models.experts.base import Expert, ExpertConfig
from vla_jax.models.experts.time import ActionTimeMix, embed_time
from vla_jax.models.gemma import Modulations, Tower, TowerConfig
from vla_jax.types import Context, Given


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(ExpertConfig):
    """Weights of its own beside the decoder's, in one attention."""

    kind: Literal["joint"] = "joint"
    """Which expert; the others have options of their own."""
    width: int = 96
    """Width of the residual stream."""
    mlp: int = 192
    """Width of the gated feed-forward layer."""
    time: Literal["mlp", "adarms"] = "mlp"
    """How the flow time enters: mixed into the action tokens by an MLP (π0) or through adaptive RMSNorm (π0.5)."""
    clock: Literal["forward", "reversed"] = "forward"
    """Which time the network is told: t, or 1 - t as the public π0's are, so that their weights fit unchanged.
    Everywhere else t = 0 is noise."""
    state_token: bool = True
    """Whether the robot's state is a token before the actions (π0). Without it only the prompt can hold the state
    (data.prompt)."""

    reads: ClassVar[frozenset[str]] = frozenset({"kv"})
    sized_by: ClassVar[tuple[tuple[str, str], ...]] = (
        ("action_in_proj/kernel", "action_dim"),
        ("action_out_proj/*", "action_dim"),
        ("state_proj/*", "state_dim"),
        ("state_proj/*", "state_token"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.width % 2:
            raise ValueError(f"expert.width={self.width} is odd; the time embedding needs an even one")

    @property
    def reads_state(self) -> bool:
        """Whether the state is a token beside the actions; the network reads it nowhere else."""
        return self.state_token

    @property
    def tokens(self) -> int:
        """Tokens of one evaluation: the state's, if it has one, and one per action."""
        return self.horizon + self.state_token

    def make(self, backbone: BackboneConfig, compute: Compute) -> "JointExpert":
        """The module, with as many layers and heads as the backbone whose keys and values it attends to."""
        return JointExpert(self, backbone, compute)


OTHER_TIME = "time was prepared by an expert of another model.expert.time; prepare it with this one"


class TimeBias(NamedTuple):
    """What time adds to the action tokens before the first swish (π0), float32."""

    bias: Float[Array, "#r #k d"]


class AdaptiveTime(NamedTuple):
    """What time does to every norm (π0.5)."""

    norms: Modulations


class JointExpert(Expert):
    """Predicts the field (velocity, or the actions themselves) of a chunk."""

    config: JointConfig
    backbone: BackboneConfig
    compute: Compute

    def setup(self):
        """Declares projections and tower."""
        expert, heads, how = self.config, self.backbone.heads, self.compute
        dtype = jnp.dtype(how.dtype)
        adaptive = expert.time == "adarms"
        if heads is None:
            raise ValueError(
                f"model.expert.kind=joint reads keys and values, and {self.backbone.kind} leaves none"
            )
        tower = TowerConfig(width=expert.width, mlp=expert.mlp, adaptive=adaptive, **heads._asdict())
        self.tower = Tower(tower, how.remat, how.unroll, how.attention)
        nn.share_scope(self, self.tower)
        self.action_in_proj = dense(expert.width, ("action", "embed"), dtype)
        self.action_out_proj = dense(expert.action_dim, ("embed", "action"), jnp.dtype(jnp.float32))
        if expert.state_token:
            self.state_proj = dense(expert.width, ("action", "embed"), dtype)
        if adaptive:
            self.time_mlp_in = dense(expert.width, ("embed", "mlp"), dtype)
            self.time_mlp_out = dense(expert.width, ("mlp", "embed"), dtype)
        else:
            self.action_time_mlp_in = ActionTimeMix(expert.width, dtype)
            self.action_time_mlp_out = dense(expert.width, ("mlp", "embed"), dtype)

    def prepare(self, context: Context, given: Given) -> tuple[Context, Given]:
        """The state's token sees neither actions nor time: its keys and values go into the context."""
        if given.state is None or not self.config.state_token:
            return context, given
        positions = jnp.sum(context.visible, axis=1, keepdims=True)
        tokens, alone = self.state_proj(given.state)[:, None], jnp.ones((given.state.shape[0], 1, 1), bool)
        clean = None if self.config.time == "mlp" else self._clean()
        _, kv = self.tower(tokens, positions, alone, context.kv, context.visible, clean)
        return context.append(kv, positions), given.replace(state=None)

    def condition(self, t: Float[Array, "r"] | Float[Array, "r k"]) -> TimeBias | AdaptiveTime:
        """The time's bias, or its modulation of every norm."""
        if self.config.time == "mlp":
            return TimeBias(self._bias(t))
        return AdaptiveTime(self.tower.modulations(self._embed(self._clock(t))))

    def denoise(
        self,
        context: Context,
        given: Given,
        x_t: Float[Array, "r k a"],
        at: Float[Array, "r"] | Float[Array, "r k"] | TimeBias | AdaptiveTime,
    ) -> Float[Array, "r k a"]:
        """See `Expert.denoise`."""
        expert = self.config
        rows, horizon, _ = x_t.shape
        x_t, step_mask = expert.without_padding(x_t, given.action_mask)
        actions, condition = self.action_in_proj(x_t), None
        if expert.time == "mlp":
            mixed = nn.swish(self.action_time_mlp_in(actions, self._bias(at)))
            actions = self.action_time_mlp_out(mixed)
        else:
            condition = self._conditions(at, horizon, given.state is not None and expert.state_token)

        # Each True starts a block that the tokens before it cannot see: [state][actions].
        starts = jnp.zeros((rows, horizon), bool).at[:, 0].set(True)
        valid, tokens = step_mask, actions
        if expert.state_token and given.state is not None:
            one = jnp.ones((rows, 1), bool)
            tokens = jnp.concatenate([self.state_proj(given.state)[:, None], actions], axis=1)
            starts, valid = jnp.concatenate([one, starts], axis=1), jnp.concatenate([one, step_mask], axis=1)
        tokens = constrain(tokens, ("batch", "length", "act_embed"))

        seen = jnp.sum(context.visible, axis=1)  # positions go on after what the expert sees of the prefix
        positions = jnp.repeat(seen, rows // seen.shape[0])[:, None] + jnp.arange(tokens.shape[1])
        hidden, _ = self.tower(
            tokens, positions, prefix_lm(valid, starts), context.kv, context.visible, condition
        )
        return self.action_out_proj(hidden[:, -horizon:].astype(jnp.float32))

    def _clock(self, t: Float[Array, "r"] | Float[Array, "r k"]) -> Float[Array, "r #k d"]:
        """The embedding of times, per chunk or per step."""
        return embed_clock(t if t.ndim == 2 else t[:, None], self.config)

    def _bias(
        self, at: Float[Array, "r"] | Float[Array, "r k"] | TimeBias | AdaptiveTime
    ) -> Float[Array, "#r #k d"]:
        """What time adds to the action tokens, prepared or not."""
        if isinstance(at, AdaptiveTime):
            raise ValueError(OTHER_TIME)
        return at.bias if isinstance(at, TimeBias) else self.action_time_mlp_in.of_time(self._clock(at))

    def _conditions(
        self,
        at: Float[Array, "r"] | Float[Array, "r k"] | TimeBias | AdaptiveTime,
        horizon: int,
        state: bool,
    ) -> Float[Array, "#r #t d"] | Modulations:
        """What modulates the norms, for `[state][actions]` where there is a state's token: that is clean data."""
        if isinstance(at, AdaptiveTime):
            if state:
                raise ValueError("time that was prepared has no place for a state's token: prepare that too")
            return at.norms
        if isinstance(at, TimeBias):
            raise ValueError(OTHER_TIME)
        actions = self._embed(self._clock(at))
        if not state:
            return actions
        actions = jnp.broadcast_to(actions, (actions.shape[0], horizon, actions.shape[-1]))
        clean = jnp.broadcast_to(self._clean(), (actions.shape[0], 1, actions.shape[-1]))
        return jnp.concatenate([clean, actions], axis=1)

    def _clean(self) -> Float[Array, "1 1 d"]:
        """The condition of adaptive norms at t = 1."""
        return self._embed(embed_clock(jnp.ones((1, 1)), self.config))

    def _embed(self, embedded: Float[Array, "#r #k d"]) -> Float[Array, "#r #k d"]:
        """The condition of adaptive norms, of a time's embedding."""
        embedded = embedded.astype(jnp.dtype(self.compute.dtype))
        return nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded))))


def embed_clock(t: Float[Array, "*b"], expert: JointConfig) -> Float[Array, "*b d"]:
    """What the expert is told of time t: its embedding, or that of 1 - t where its clock runs the other way."""
    return embed_time(t if expert.clock == "forward" else 1 - t, expert.width)
