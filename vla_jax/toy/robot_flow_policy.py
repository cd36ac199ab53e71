"""The smallest flow-matching policy for a robot: a state in, a chunk of actions out.

    policy = RobotFlowPolicy()                       # state 64, action 7, horizon 16, hidden 256
    params = policy.init(jax.random.key(0))
    loss = policy.compute_loss(params, key, states, chunks)          # states [b 64], chunks [b 16 7], in [-1, 1]
    actions = policy.sample_actions(params, key, states[:1])         # [1 16 7], 20 Euler steps

Everything that the big model has is here in its least form: a condition (one state instead of images and text), a
network that denoises a chunk beside it (an MLP instead of a transformer), the same process, the same solver. Run a
few of the actions, look again, repeat. With the noise given, the same state always answers the same chunk; with fresh
noise a policy of several ways to act takes one of them.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.processes import Process, Regression, make_process
from vla_jax.models.unet import sinusoid
from vla_jax.toy.network import answer_of


class ChunkMLP(nn.Module):
    """The field: velocity of a noisy chunk, given the state and the time."""

    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k a"], t: Float[Array, " b"], state: Float[Array, "b q"]
    ) -> Float[Array, "b k a"]:
        """Three SiLU layers over state, chunk and time, laid side by side."""
        b, k, a = x.shape
        h = jnp.concatenate([state, x.reshape(b, k * a), sinusoid(t, 64)], axis=1)
        for _ in range(3):
            h = nn.silu(nn.Dense(self.hidden)(h))
        return nn.Dense(k * a)(h).reshape(b, k, a)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotFlowPolicy:
    """Sizes and process; parameters are passed in, so that every method can be jitted."""

    state_dim: int = 64
    action_dim: int = 7
    horizon: int = 16
    hidden: int = 256
    process: ProcessConfig = ProcessConfig()

    @functools.cached_property
    def _process(self) -> Process:
        return make_process(self.process)

    @functools.cached_property
    def network(self) -> ChunkMLP:
        """The field."""
        return ChunkMLP(self.hidden)

    def init(self, key: Key[Array, ""]) -> PyTree[Array]:
        """Fresh parameters."""
        chunk, state = jnp.zeros((1, self.horizon, self.action_dim)), jnp.zeros((1, self.state_dim))
        return self.network.init(key, chunk, jnp.zeros(1), state)

    def compute_loss(
        self,
        params: PyTree[Array],
        key: Key[Array, ""],
        state: Float[Array, "b q"],
        actions: Float[Array, "b k a"],
    ) -> Float[Array, ""]:
        """Mean squared error of the velocity (of whatever `process` predicts), at random noise and times."""
        example = self._process.corrupt(key, actions)
        return self._process.loss(
            answer_of(self.network, params, example.x_t, example.t, state), example.target
        ).mean()

    def sample_actions(
        self,
        params: PyTree[Array],
        key: Key[Array, ""],
        state: Float[Array, "b q"],
        num_steps: int = 20,
        *,
        noise: Float[Array, "b k a"] | None = None,
    ) -> Float[Array, "b k a"]:
        """A chunk for each state, by Euler steps (DDIM's for a ddpm process), from noise drawn unless given."""
        solver = SolverConfig(method="ddim" if self.process.kind == "ddpm" else "euler", num_steps=num_steps)
        field = lambda x, t: answer_of(self.network, params, x, t, state)  # noqa: E731
        shape = (state.shape[0], self.horizon, self.action_dim)
        if noise is None:
            return self._process.sample(field, key, shape, solver).x
        if isinstance(self._process, Regression):
            raise ValueError("a regression starts from zeros: leave the noise out")
        return self._process.sample(field, key, shape, solver, noise=noise).x
