"""A policy as a server needs it: a request becomes a row, rows of one program become one call of the network.

    engine = Engine(policy, solver=SolverConfig(), buckets=(1, 4, 16))
    engine.warm_up()
    answer, = engine.run([engine.prepare(request, seed=3)])

A call has as many rows as the smallest bucket that holds them; empty places repeat the last row. After `warm_up`
nothing is compiled any more, because a request cannot ask for anything but the programs of `programs()`.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vla_jax.data.prompts import null_prompt
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import make_process
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import Request
from vla_jax.serve.server.request import parse as parse_request
from vla_jax.serve.server.rows import act_rows, act_token_rows
from vla_jax.serve.server.spec import Spec
from vla_jax.types import Batch, Observation


class Program(NamedTuple):
    """What rows must have in common to share a call."""

    samples: int
    sees: bool
    """The actions see a plan."""
    writes: bool
    """A plan is decoded."""
    guided: bool
    """The instruction has a weight other than 0 and 1."""
    cameras: tuple[str, ...]
    """Those that have an image; it changes no shape, but images are stacked camera by camera."""


class Row(NamedTuple):
    """One prepared request."""

    program: Program
    observation: Observation
    """Of one robot."""
    batch: Batch
    """The same in the model's form, with one row."""
    seed: int
    guidance: float | None
    """Weight of the instruction, if it was given one."""


class Answer(NamedTuple):
    """What a row gets."""

    actions: Float[np.ndarray, "*S k a"]
    """In the robot's units; with samples above 1, one chunk per sample."""
    plan: str | None
    """The decoded plan, if one was asked for."""
    bucket: int
    """Rows of the call: with the request and its seed it determines the actions bit for bit."""


class Engine:
    """Policy, solver and the batch sizes that are compiled."""

    def __init__(
        self,
        policy: Policy,
        *,
        solver: SolverConfig,
        buckets: Collection[int] = (1, 4, 16),
        samples: Collection[int] = (1,),
        plans: bool = True,
        guidance: bool = True,
    ):
        for name, sizes in {"buckets": buckets, "samples": samples}.items():
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name}={tuple(sizes)}: give at least one, and none below 1")
        if policy.config.objective.action_weight == 0:
            raise ValueError("this policy was trained with objective.action_weight=0: it has no actions")
        self.buckets = tuple(sorted(set(buckets)))
        self._policy, self._solver = policy, solver
        self._process = make_process(policy.config.process)
        self._planners = {size: dataclasses.replace(policy, batch_size=size) for size in self.buckets}
        self.spec = self._spec(tuple(sorted(set(samples))), plans, guidance)

    def prepare(self, request: Request, seed: int) -> Row:
        """The row of a request (its own seed before the given one). Raises Refused; any thread may call it."""
        observation = Observation(
            images={camera: image[None] for camera, image in request.images.items()},
            state=request.state[None],
            instruction=(request.prompt,),
        )
        sees = request.see_plan or request.plan is not None
        program = Program(
            samples=request.samples,
            sees=sees,
            writes=request.write_plan or request.see_plan,
            guided=request.guidance not in (None, 0, 1),
            cameras=tuple(request.images),
        )
        try:
            batch = self._model_batch(observation, request.plan, request.guidance)
        except ValueError as error:  # a text that does not fit, an instruction without statistics
            raise Refused("invalid", " ".join(str(error).split())) from None
        seed = seed if request.seed is None else request.seed
        return Row(program, observation, batch, seed, request.guidance)

    def run(self, rows: Sequence[Row], bucket: int | None = None) -> list[Answer | Exception]:
        """One call for rows of one program; an exception in place of an answer that a robot must not get."""
        bucket = bucket or next((size for size in self.buckets if size >= len(rows)), 0)
        if not len(rows) <= bucket:
            raise ValueError(f"{len(rows)} rows are more than the largest bucket, {max(self.buckets)}")
        program = rows[0].program
        full = [*rows, *[rows[-1]] * (bucket - len(rows))]
        texts, batches = [None] * bucket, [row.batch for row in full]
        if program.writes:
            texts = self._planners[bucket].plan(_stack(full), jax.random.key(0))
            if program.sees:
                batches = [
                    self._model_batch(row.observation, text, row.guidance) for row, text in zip(full, texts)
                ]
        chunks = self._sample(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches),
            np.asarray([row.seed for row in full], np.int32),
            program,
            np.asarray([row.guidance for row in full], np.float32) if program.guided else None,
        )
        chunks = np.asarray(chunks[:, 0] if program.samples == 1 else chunks)
        return [self._answer(row, chunk, text, bucket) for row, chunk, text in zip(rows, chunks, texts)]

    def programs(self) -> Iterator[Program]:
        """Everything that a request can ask for."""
        cameras = tuple(self.spec.cameras)
        for samples in self.spec.samples:
            for sees in (False, True)[: 1 + self.spec.sees_plans]:
                for writes in (False, True)[: 1 + self.spec.writes_plans]:
                    for guided in (False, True)[: 1 + self.spec.guides]:
                        yield Program(samples, sees, writes, guided, cameras)

    def warm_up(self) -> int:
        """Runs every program at every bucket once; returns how many that were."""
        observation = self.spec.zeros(self._any_prompt())
        (request,), _ = parse_request(observation, self.spec, {})
        row, calls = self.prepare(request, seed=0), 0
        for program in self.programs():
            for bucket in self.buckets:
                self.run([row._replace(program=program, guidance=2.0 if program.guided else None)], bucket)
                calls += 1
        return calls

    def _sample(
        self,
        batch: Batch,
        seeds: Int[np.ndarray, " b"],
        program: Program,
        guidance: Float[np.ndarray, " b"] | None,
    ) -> Float[Any, "b S k a"]:
        policy = self._policy
        asked = {"model": policy.model, "samples": program.samples, "see_target": program.sees}
        if policy.config.kind == "tokens":
            limit, temperature = policy.max_chunk_tokens, self._solver.temperature
            written = act_token_rows(
                policy.params, batch, seeds, policy.grammar, temperature, max_tokens=limit, **asked
            )
            return policy.read_chunks(written)
        process, solver = self._process, self._solver
        return act_rows(
            policy.params, batch, seeds, process=process, solver=solver, guidance=guidance, **asked
        )

    def _answer(self, row: Row, chunk: np.ndarray, text: str | None, bucket: int) -> Answer | Exception:
        actions = self._policy.bundle.robot_actions(chunk[None], row.observation)[0]
        if not np.isfinite(actions).all():
            return FloatingPointError("the policy's actions are not finite; nothing is sent to the robot")
        return Answer(actions, text, bucket)

    def _model_batch(self, observation: Observation, plan: str | None, guidance: float | None) -> Batch:
        """In the model's form; an instruction of weight 0 is the null prompt."""
        batch = self._policy._batch(observation, range(1), 1, None if plan is None else [plan])
        return null_prompt(batch) if guidance == 0 else batch

    def _any_prompt(self) -> str:
        return next(iter(self._policy.bundle.normalize.task_of), "go")

    def _spec(self, samples: tuple[int, ...], plans: bool, guidance: bool) -> Spec:
        policy, schema = self._policy, self._policy.bundle.schema
        solver: dict[str, Any] | None = dataclasses.asdict(self._solver)
        if policy.config.kind in ("regression", "tokens"):
            solver = None if policy.config.kind == "regression" else {"temperature": self._solver.temperature}
        about: dict[str, Any] = {
            "robot": schema.robot,
            "config_hash": policy.config_hash,
            "step": policy.step,
            "buckets": list(self.buckets),
            "solver": solver,
        }
        return Spec(
            cameras={camera: schema.cameras[camera] for camera in policy.bundle.cameras},
            state_names=schema.state_names,
            action_names=schema.action_names,
            horizon=policy.horizon,
            control_hz=schema.control_hz,
            samples=samples,
            writes_plans=plans and policy.writes_plans,
            sees_plans=plans and policy.sees_plans,
            guides=guidance and policy.guides,
            max_rows=max(self.buckets),
            about=about,
        )


def _stack(rows: Sequence[Row]) -> Observation:
    """Observations of single robots as one of them all."""
    observations = [row.observation for row in rows]
    return Observation(
        images={
            camera: np.concatenate([o.images[camera] for o in observations])
            for camera in observations[0].images
        },
        state=np.concatenate([o.state for o in observations]),
        instruction=tuple(o.instruction[0] for o in observations),
    )
