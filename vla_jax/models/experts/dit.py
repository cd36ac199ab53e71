"""The diffusion transformer of GR00T N1 (arXiv:2503.14734, §2.1), at any size.

Tokens `[state][k actions]` of its own width, which need not fit the backbone's. Blocks come in pairs: cross-attention
to the backbone's features, then self-attention among the tokens, each followed by a feed-forward layer. The time
enters twice: beside every action, and through the norm before every attention (`AdaLayerNorm`).

Of GR00T's expert N1.5's extra learned tokens and the weights per embodiment are left out.
"""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.layers import init
from vla_jax.layers.attention import Backend, BlockMask, attend, attend_across, prefix_lm
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import dense, from_heads, to_heads
from vla_jax.layers.mlp import MLP
from vla_jax.layers.norm import AdaLayerNorm, ScaleShift, layer_norm, layer_normalize
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.compute import Compute, check_heads
from vla_jax.models.experts.base import Expert, ExpertConfig
from vla_jax.models.experts.time import ActionTimeMix, embed_time
from vla_jax.models.stack import CONTEXT, INPUT, PROJECTED, declare_blocks, named, needed, run_blocks
from vla_jax.types import Context, Given, KeysValues

TIME_WIDTH = 256
"""Width of the time's embedding before the norms' MLP."""
EPS = 1e-5
"""Added to the variance in the blocks' norms; the last norm has 1e-6."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig(ExpertConfig):
    """A diffusion transformer that reads the backbone's features by cross-attention."""

    kind: Literal["dit"] = "dit"
    """Which expert; the others have options of their own."""
    width: int = 96
    """Width of the residual stream."""
    depth: int = 4
    """Blocks, an even number: cross-attention and self-attention by turns. GR00T N1 has 16."""
    heads: int = 4
    """Attention heads."""
    mlp: int = 192
    """Width of the feed-forward layers."""
    state_token: bool = True
    """Whether the robot's state is a token before the actions. Without it only the backbone can tell the state."""

    reads: ClassVar[frozenset[str]] = frozenset({"features"})
    sized_by: ClassVar[tuple[tuple[str, str], ...]] = (
        ("action_in/kernel", "action_dim"),
        ("action_out/*", "action_dim"),
        ("action_positions", "horizon"),
        ("state_in/kernel", "state_dim"),
        ("state_*/*", "state_token"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 2 or self.depth % 2:
            raise ValueError(
                f"expert.depth={self.depth}: blocks come in pairs of cross- and self-attention; "
                f"use an even number, {self.depth + self.depth % 2 or 2}"
            )
        if self.width % self.heads:
            raise ValueError(f"expert.width={self.width} is not divisible by expert.heads={self.heads}")
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

    def check(self, compute: Compute) -> None:
        """cuDNN's flash attention has limits on the width of heads."""
        check_heads(compute, "model.expert.width / model.expert.heads", self.width // self.heads)

    def make(self, backbone: BackboneConfig, compute: Compute) -> "DitExpert":
        """The module, for a backbone that leaves features of any width."""
        del backbone  # its features are projected, whatever their width
        return DitExpert(self, compute)


class BothNorms(NamedTuple):
    """What the time does to the adaptive norms of a pair of blocks."""

    cross: ScaleShift
    own: ScaleShift


class Told(NamedTuple):
    """All that depends on the time alone."""

    actions: Float[Array, "#r #k d"]
    """What it adds to the action tokens before their swish, float32."""
    layers: BothNorms
    """One entry per pair of blocks, stacked or a tuple."""
    final: ScaleShift


class Own(NamedTuple):
    """What a pair of blocks is given for itself, where it was computed before."""

    past: KeysValues | None
    norms: BothNorms | None


class Shared(NamedTuple):
    """What all pairs of blocks are given."""

    features: Float[Array, "b s d"] | None = None
    visible: Bool[Array, "b s"] | None = None
    mask: BlockMask | Bool[Array, "r t t"] | None = None
    condition: Float[Array, "#r #t d"] | None = None


class DitExpert(Expert):
    """Predicts the field (velocity, or the actions themselves) of a chunk."""

    config: DitConfig
    compute: Compute

    def setup(self):
        """Declares encoders, blocks and decoder."""
        cfg, how = self.config, self.compute
        width, dtype = cfg.width, jnp.dtype(how.dtype)
        self.features_norm = layer_norm(dtype, EPS)
        self.features_proj = dense(width, (None, "embed"), dtype)
        if cfg.state_token:
            self.state_in = dense(width, ("action", "embed"), dtype)
            self.state_out = dense(width, ("mlp", "embed"), dtype)
        self.action_in = dense(width, ("action", "embed"), dtype)
        self.action_time = ActionTimeMix(width, dtype)
        self.action_mix = dense(width, ("mlp", "embed"), dtype)
        self.action_positions = self.param(
            "action_positions", init.normal((None, "embed"), 0.02), (cfg.horizon, width)
        )
        self.time_in = dense(width, (None, "embed"), dtype)
        self.time_out = dense(width, ("mlp", "embed"), dtype)
        self.layers = declare_blocks(
            self, "layers", Pair, (cfg, dtype, how.attention), depth=cfg.depth // 2, remat=how.remat,
            unroll=how.unroll, methods=("__call__", "keys_values", "norms"),
        )  # fmt: skip
        self.final_norm = AdaLayerNorm(width, 1e-6)
        self.out_proj = dense(width, ("embed", "mlp"), dtype)
        self.action_mid = dense(width, ("mlp", "embed"), dtype)
        self.action_out = dense(cfg.action_dim, ("embed", "action"), jnp.dtype(jnp.float32))

    def prepare(self, context: Context, given: Given) -> tuple[Context, Given]:
        """Keys and values of every cross-attention take the place of the features, its token that of the state."""
        if context.features is None:  # prepared already
            return context, given
        shared = Shared(features=self._features(context))
        _, kv = run_blocks(self.layers, None, None, shared, method="keys_values")
        return context.replace(kv=kv, features=None), given.replace(state=self._token_of(given.state))

    def condition(self, t: Float[Array, "r"] | Float[Array, "r k"]) -> Told:
        """What the time adds to the actions, and its modulation of every norm."""
        actions, condition = self._told(t)
        _, layers = run_blocks(self.layers, None, None, Shared(condition=condition), method="norms")
        return Told(actions, layers, self.final_norm.modulation(condition))

    def denoise(
        self,
        context: Context,
        given: Given,
        x_t: Float[Array, "r k a"],
        at: Float[Array, "r"] | Float[Array, "r k"] | Told,
    ) -> Float[Array, "r k a"]:
        """See `Expert.denoise`."""
        prepared, horizon = context.features is None, x_t.shape[1]
        if isinstance(at, Told):
            time, norms, final, condition = at.actions, at.layers, at.final, None
        else:
            time, condition = self._told(at)
            norms, final = None, condition
        x_t, valid = self.config.without_padding(x_t, given.action_mask)
        mixed = nn.swish(self.action_time(self.action_in(x_t), time))
        tokens = self.action_mix(mixed)
        tokens = tokens + self.action_positions[:horizon].astype(tokens.dtype)
        state = given.state if prepared else self._token_of(given.state)
        if self.config.state_token:
            if state is None:
                raise ValueError(
                    "model.expert.state_token=True, but no state is given; give it, or use False"
                )
            tokens = jnp.concatenate([state[:, None].astype(tokens.dtype), tokens], axis=1)
            valid = jnp.concatenate([jnp.ones((valid.shape[0], 1), bool), valid], axis=1)
        tokens = constrain(tokens, ("batch", "length", "act_embed"))

        mask = prefix_lm(valid, jnp.zeros_like(valid))
        shared = Shared(
            features=None if prepared else self._features(context),
            visible=context.visible,
            mask=mask.dense() if self.compute.attention == "xla" else mask,  # once, not in every layer
            condition=condition,
        )
        own = Own(context.kv if prepared else None, norms)
        tokens, _ = run_blocks(self.layers, tokens, own, shared)
        hidden = self.out_proj(self.final_norm(tokens, final)[:, -horizon:])
        return self.action_out(nn.relu(self.action_mid(hidden)).astype(jnp.float32))

    def _features(self, context: Context) -> Float[Array, "b s d"]:
        """The backbone's features in the width of the blocks."""
        return self.features_proj(self.features_norm(context.features))

    def _token_of(self, state: Float[Array, "r q"] | None) -> Float[Array, "r d"] | None:
        """The state's token, of two layers; None without one."""
        if state is None or not self.config.state_token:
            return None
        return self.state_out(nn.relu(self.state_in(state)))

    def _told(
        self, t: Float[Array, "r"] | Float[Array, "r k"]
    ) -> tuple[Float[Array, "r #k d"], Float[Array, "r #t d"]]:
        """What the time adds to the actions, and what the norms' projections read, per token where steps differ.

        GR00T's embeddings are of 1000·t, with periods of 2π up to 2π·10⁴. The state is told the time of the noisiest
        step: as in GR00T the chunk's, also where a clean beginning continues a chunk that runs.
        """
        t = t if t.ndim == 2 else t[:, None]
        shortest, width, half = 2 * math.pi / 1000, self.config.width, self.config.width // 2
        actions = embed_time(t, width, shortest, shortest * 1e4 ** ((half - 1) / half))
        if self.config.state_token and t.shape[1] > 1:
            t = jnp.concatenate([t.min(axis=1, keepdims=True), t], axis=1)
        embedded = embed_time(t, TIME_WIDTH, shortest, shortest * 1e4).astype(jnp.dtype(self.compute.dtype))
        return self.action_time.of_time(actions), nn.swish(self.time_out(nn.swish(self.time_in(embedded))))


class Pair(nn.Module):
    """Cross-attention to the features, then self-attention among the tokens."""

    config: DitConfig
    dtype: jnp.dtype
    attention: Backend

    def setup(self):
        """Declares both blocks."""
        self.cross, self.own = (Block(self.config, self.dtype, self.attention) for _ in range(2))

    def __call__(
        self, x: Float[Array, "r t d"], own: Own, shared: Shared
    ) -> tuple[Float[Array, "r t d"], None]:
        """One pair; what was not computed before is computed here."""
        past = own.past or self.keys_values(None, None, shared)[1]
        norms = own.norms or self.norms(None, None, shared)[1]
        return self.own(self.cross(x, norms.cross, shared, past), norms.own, shared), None

    def keys_values(self, nothing: None, own: None, shared: Shared) -> tuple[None, KeysValues]:
        """Keys and values of the cross-attention, from the backbone's features."""
        del own
        return nothing, self.cross.keys_values(needed(shared.features, "features"))

    def norms(self, nothing: None, own: None, shared: Shared) -> tuple[None, BothNorms]:
        """What the time does to both blocks."""
        del own
        condition = needed(shared.condition, "a condition")
        return nothing, BothNorms(*(b.norm.modulation(condition) for b in (self.cross, self.own)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first norm is adaptive, the second has no parameters."""

    config: DitConfig
    dtype: jnp.dtype
    attention: Backend

    def setup(self):
        """Declares norm, projections and feed-forward layer."""
        width, heads = self.config.width, self.config.heads
        self.norm = AdaLayerNorm(width, EPS)
        self.query, self.key, self.value = (to_heads(width, heads) for _ in range(3))
        self.out = from_heads(width, heads)
        self.mlp = MLP(width, self.config.mlp, self.dtype)

    def keys_values(self, x: Float[Array, "b s d"]) -> KeysValues:
        """[b s n e] each."""
        return KeysValues(named(self.key(x), PROJECTED), named(self.value(x), PROJECTED))

    def __call__(
        self, x: Float[Array, "r t d"], norm: ScaleShift, shared: Shared, past: KeysValues | None = None
    ) -> Float[Array, "r t d"]:
        """Attention to a past, or of the tokens to one another."""
        normed = self.norm(named(x, INPUT), norm)
        q = named(constrain(self.query(normed), ("batch", "length", "act_heads", None)), PROJECTED)
        if past is None:
            out = attend(q, *self.keys_values(normed).of_layer(), shared.mask, backend=self.attention)
        else:
            out = attend_across(
                q, *past.of_layer(), needed(shared.visible, "what is visible"), backend=self.attention
            )
        x = x + self.out(named(out, CONTEXT))
        x = x + self.mlp(layer_normalize(x, EPS).astype(x.dtype))
        return constrain(x, ("batch", "length", "act_embed"))
