"""What computes an engine's calls: the compiled policy, or the plain programs of one that writes chunks as tokens."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.compiled.encode import Encoded
from vla_jax.serve.compiled.runner import ProgramRunner, keys_of
from vla_jax.serve.noise import draws
from vla_jax.serve.policy import Policy
from vla_jax.serve.sampling import sample_action_tokens
from vla_jax.types import Batch, Observation

SERVED = CompileConfig(rewrites=Rewrites(reuse=False))
"""Without `reuse`: what is left of one client's call must not decide how another's is rounded."""


class CallKey(NamedTuple):
    """What rows must have in common to share a call."""

    samples: int
    plan_visible: bool
    """The actions see a plan."""
    writes: bool
    """A plan is decoded."""
    guided: bool
    """The instruction has a weight other than 0 and 1."""
    cameras: tuple[str, ...]
    """Those that have an image."""
    length: int
    """Text tokens with padding."""


class Backend(Protocol):
    """Computes a call of the server: prepared rows to actions."""

    lengths: tuple[int, ...]
    """Text lengths of its programs."""

    def encode(self, observation: Observation, plan: str | None, guidance: float | None) -> tuple[Any, int]:
        """One robot's row, and the text length that it needs. Raises ValueError."""
        ...

    def run(
        self, rows: Sequence[Any], seeds: Sequence[int], guidance: Sequence[float] | None, program: CallKey
    ) -> Float[np.ndarray, "b S k a"]:
        """Actions in the robots' units for a full bucket."""
        ...

    def compile(self, program: CallKey, buckets: Collection[int]) -> int:
        """Makes a program for all buckets before it is asked for; returns how many that are."""
        ...


class CompiledBackend:
    """Calls of compiled programs; those for some sets of cameras, others go through that of all of them."""

    def __init__(
        self, runner: ProgramRunner, solver: SolverConfig, camera_sets: Collection[Collection[str]] = ()
    ):
        self.runner, self._solver, self.lengths = runner, solver, runner.lengths
        everything = runner.bundle.shown
        for names in camera_sets:
            if not names or set(names) - set(everything):
                raise ValueError(f"camera set {','.join(names)!r}: this policy has {', '.join(everything)}")
        chosen = [everything, *(tuple(n for n in everything if n in names) for names in camera_sets)]
        self.camera_sets = tuple(dict.fromkeys(chosen))

    def encode(
        self, observation: Observation, plan: str | None, guidance: float | None
    ) -> tuple[Encoded, int]:
        """See `Backend.encode`."""
        (row,) = self.runner.encode(observation, None if plan is None else [plan], null_prompt=guidance == 0)
        return row, self.runner.length_of([row])

    def run(
        self,
        rows: Sequence[Encoded],
        seeds: Sequence[int],
        guidance: Sequence[float] | None,
        program: CallKey,
    ) -> Float[np.ndarray, "b S k a"]:
        """See `Backend.run`."""
        known = program.cameras in self.camera_sets
        return self.runner.run(
            rows,
            keys_of(seeds),
            solver=self._solver,
            samples=program.samples,
            plan_visible=program.plan_visible,
            guidance=guidance,
            bucket=len(rows),
            length=program.length,
            cameras=program.cameras if known else self.camera_sets[0],
        )

    def compile(self, program: CallKey, buckets: Collection[int]) -> int:
        """For every set of cameras; a program that writes a plan is that of its actions."""
        count = 0
        for cameras in self.camera_sets:
            for shape in self.runner.shapes(
                self._solver,
                samples=(program.samples,),
                plan_visible=(program.plan_visible,),
                guided=(program.guided,),
                lengths=(program.length,),
                cameras=cameras,
            ):
                if shape.rows in buckets and shape not in self.runner.compiler.shapes:
                    self.runner.compiler.executable(shape)
                    count += 1
        return count


class TokensBackend:
    """The plain programs of a policy whose decoder writes chunks as tokens."""

    def __init__(self, policy: Policy, solver: SolverConfig):
        self._policy, self._temperature = policy, solver.temperature
        self.lengths = (policy.config.data.max_text_tokens,)

    def encode(
        self, observation: Observation, plan: str | None, guidance: float | None
    ) -> tuple[tuple[Batch, Observation], int]:
        """See `Backend.encode`; such a policy takes no guidance."""
        batch = self._policy.batch(observation, None if plan is None else [plan])
        return (batch, observation), self.lengths[0]

    def run(
        self,
        rows: Sequence[tuple[Batch, Observation]],
        seeds: Sequence[int],
        guidance: Sequence[float] | None,
        program: CallKey,
    ) -> Float[np.ndarray, "b S k a"]:
        """See `Backend.run`."""
        policy = self._policy
        keys = _keys(np.asarray(seeds, np.int32))
        written = sample_action_tokens(
            policy.params,
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *(batch for batch, _ in rows)),
            draws(keys, len(rows)).actions,
            policy.grammar,
            self._temperature,
            model=policy.model,
            samples=program.samples,
            plan_visible=program.plan_visible,
            max_tokens=policy.max_chunk_tokens,
        )
        chunks = policy.read_chunks(written)
        return np.concatenate(
            [policy.bundle.robot_actions(chunk[None], seen) for chunk, (_, seen) in zip(chunks, rows)]
        )

    def compile(self, program: CallKey, buckets: Collection[int]) -> int:
        """Nothing ahead of time: the engine runs every program once."""
        return 0


@jax.jit
def _keys(seeds: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key per seed, [b]: a row's noise does not depend on the rows that share its call."""
    return jax.vmap(jax.random.key)(seeds)
