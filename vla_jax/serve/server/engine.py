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
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vla_jax.data.observations import owned
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.backends import SERVED, Backend, CallKey, CompiledBackend, TokensBackend
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import Request
from vla_jax.serve.server.spec import Spec
from vla_jax.types import Observation

MAX_PIXELS = 1280 * 720
"""Of images that are resized unless another limit is given: more than robots' cameras usually send."""


class PreparedRequest(NamedTuple):
    """A request whose images and texts are encoded, with what it needs to share a call with others."""

    program: CallKey
    observation: Observation
    """What one robot sees, before tokenising and resizing (axis b is 1)."""
    encoded: Any
    """The same as the back end takes it."""
    seed: int
    guidance: float | None
    """Weight of the instruction, if it was given one."""


class Answer(NamedTuple):
    """The answer to one request."""

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
        compiled: CompileConfig = SERVED,
        max_pixels: int = MAX_PIXELS,
        camera_sets: Collection[Collection[str]] = (),
        mesh: Mesh | None = None,
        default_prompt: str = "",
    ):
        if max_pixels < 0:
            raise ValueError(f"max_pixels={max_pixels} is negative; 0 refuses images of other sizes")
        for name, sizes in {"buckets": buckets, "samples": samples}.items():
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name}={tuple(sizes)}: give at least one, and none below 1")
        if policy.config.objective.action_weight == 0:
            raise ValueError("this policy was trained with objective.action_weight=0: it has no actions")
        tokens, writes = policy.config.kind == "tokens", plans and policy.writes_plans
        self.buckets = tuple(sorted(set(buckets)))
        self.policy = policy
        """What computes: called directly it gives the served actions bit for bit (alone: those of bucket 1)."""
        self._solver = solver
        if tokens:
            if compiled != SERVED or camera_sets or mesh is not None or solver.unroll != 1:
                raise ValueError(
                    "a policy that writes its actions as tokens is served by its plain programs: leave out dtype, "
                    "int8, unroll, prompts, camera_sets and mesh"
                )
            about: dict[str, Any] = {"compiled": None, "camera_sets": None, "mesh": None}
            self._backend: Backend = TokensBackend(policy, solver)
        else:
            # Where any size may come, one program must do for all: nothing is compiled after the start.
            resize = "host" if max_pixels else "device"
            config = dataclasses.replace(compiled, buckets=self.buckets, resize=resize)
            policy = self.policy = policy.compiled(config, mesh=mesh)
            self._backend = CompiledBackend(policy.runner, solver, camera_sets)
            about = {
                "compiled": dataclasses.asdict(config),
                "camera_sets": [list(names) for names in self._backend.camera_sets],
                "mesh": None if mesh is None else dict(mesh.shape),
            }
        self._planners = {
            size: dataclasses.replace(policy, batch_size=size) for size in self.buckets if writes
        }
        self.spec = self._spec(
            policy, tuple(sorted(set(samples))), plans, guidance, default_prompt, max_pixels, about
        )

    def prepare(self, request: Request, seed: int) -> PreparedRequest:
        """The row of a request (its own seed before the given one). Raises Refused; any thread may call it."""
        observation = Observation(
            images={
                camera: self._image(request.images[camera])[None] if camera in request.images else None
                for camera in self.spec.cameras
            },
            state=request.state[None],
            instruction=(request.prompt,),
        )
        observation = owned(observation)  # it waits for its call, whatever becomes of the request
        try:
            encoded, length = self._backend.encode(observation, request.plan, request.guidance)
        except ValueError as error:  # a text that does not fit, an instruction without statistics
            raise Refused("invalid", " ".join(str(error).split())) from None
        plan_visible = request.plan_visible or request.plan is not None
        program = CallKey(
            samples=request.samples,
            plan_visible=plan_visible,
            writes=request.write_plan or request.plan_visible,
            guided=request.guidance not in (None, 0, 1),
            cameras=self._cameras(request.images),
            length=self._backend.lengths[-1] if plan_visible else length,
        )
        seed = seed if request.seed is None else request.seed
        return PreparedRequest(program, observation, encoded, seed, request.guidance)

    def run(self, rows: Sequence[PreparedRequest], bucket: int | None = None) -> list[Answer | Exception]:
        """One call for rows of one program; an exception in place of an answer that a robot must not get."""
        bucket = bucket or next((size for size in self.buckets if size >= len(rows)), 0)
        if not len(rows) <= bucket:
            raise ValueError(f"{len(rows)} rows are more than the largest bucket, {max(self.buckets)}")
        program = rows[0].program
        full = [*rows, *[rows[-1]] * (bucket - len(rows))]
        texts, encoded = [None] * bucket, [row.encoded for row in full]
        if program.writes:
            texts = self._planners[bucket].plan(_stack(full), jax.random.key(0))
            if program.plan_visible:
                encoded = [
                    self._backend.encode(row.observation, text, row.guidance)[0]
                    for row, text in zip(full, texts)
                ]
        guidance = [1.0 if row.guidance is None else row.guidance for row in full] if program.guided else None
        chunks = self._backend.run(encoded, [row.seed for row in full], guidance, program)
        chunks = chunks[:, 0] if program.samples == 1 else chunks
        return [self._answer(chunk, text, bucket) for _, chunk, text in zip(rows, chunks, texts)]

    def programs(self) -> Iterator[CallKey]:
        """Everything that a request can ask for with an image of every camera."""
        cameras = self._cameras(self.spec.cameras)
        for samples in self.spec.samples:
            for plan_visible in (False, True)[: 1 + self.spec.sees_plans]:
                for writes in (False, True)[: 1 + self.spec.writes_plans]:
                    for guided in (False, True)[: 1 + self.spec.guides]:
                        for length in self._backend.lengths[-1:] if plan_visible else self._backend.lengths:
                            yield CallKey(samples, plan_visible, writes, guided, cameras, length)

    def warm_up(self) -> int:
        """Compiles everything that a request can ask for and runs it once; returns how many calls that were."""
        for program in self.programs():
            self._backend.compile(program, self.buckets)
        prompt = self._any_prompt()
        blank = self.policy.bundle.blank(prompt)
        images = {camera: frames[0] for camera, frames in blank.images.items() if frames is not None}
        # Without its instruction a prompt fits every program, however long this policy's prompts usually are.
        request = Request(images=images, state=blank.state[0], prompt=prompt, guidance=0.0)
        row, calls = self.prepare(request, seed=0), 0
        for program in self.programs():
            for bucket in self.buckets:
                self.run([row._replace(program=program, guidance=2.0 if program.guided else None)], bucket)
                calls += 1
        return calls

    def _answer(
        self, actions: Float[np.ndarray, "*S k a"], text: str | None, bucket: int
    ) -> Answer | Exception:
        if not np.isfinite(actions).all():
            return FloatingPointError("the policy's actions are not finite; nothing is sent to the robot")
        return Answer(actions, text, bucket)

    def _cameras(self, given: Collection[str]) -> tuple[str, ...]:
        """The model's cameras that have an image where the robot gives these of its own."""
        bundle = self.policy.bundle
        return tuple(c for c in bundle.shown if c in bundle.select.black or bundle.sources.get(c) in given)

    def _image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        """Small from here on: a row that waits holds no larger image than the model sees."""
        return self.policy.bundle.resize.resize(image) if self.spec.max_pixels else image

    def _any_prompt(self) -> str:
        return next(iter(self.policy.bundle.normalize.task_of), "go")

    def _spec(
        self,
        policy: Policy,
        samples: tuple[int, ...],
        plans: bool,
        guidance: bool,
        default_prompt: str,
        max_pixels: int,
        about: dict[str, Any],
    ) -> Spec:
        schema, robot = policy.bundle.schema, policy.bundle.robot
        solver: dict[str, Any] | None = dataclasses.asdict(self._solver)
        if policy.config.kind in ("regression", "tokens"):
            solver = None if policy.config.kind == "regression" else {"temperature": self._solver.temperature}
        about = {
            "robot": schema.robot,
            "config_hash": policy.config_hash,
            "step": policy.step,
            "weights": policy.weights,
            "execute": policy.execute,
            "buckets": list(self.buckets),
            "solver": solver,
            **about,
        }
        return Spec(
            cameras={camera: schema.cameras[camera] for camera in policy.bundle.sources.values()},
            max_pixels=max_pixels,
            state_names=schema.state_names,
            action_names=schema.action_names,
            horizon=policy.horizon,
            control_hz=schema.control_hz,
            samples=samples,
            writes_plans=plans and policy.writes_plans,
            sees_plans=plans and policy.sees_plans,
            guides=guidance and policy.guides,
            max_rows=max(self.buckets),
            robot=robot,
            default_prompt=default_prompt or (robot.default_prompt if robot else ""),
            about=about,
        )


def _frames(observation: Observation, camera: str) -> UInt8[np.ndarray, "b h w 3"]:
    """A camera's images. Raises ValueError where there are none: rows of one program have the same cameras."""
    images = observation.images[camera]
    if images is None:
        raise ValueError(f"rows of one call differ in camera {camera}: some have no image of it")
    return images


def _stack(rows: Sequence[PreparedRequest]) -> Observation:
    """Observations of single robots as one of them all."""
    observations = [row.observation for row in rows]
    return Observation(
        images={
            camera: None if image is None else np.concatenate([_frames(o, camera) for o in observations])
            for camera, image in observations[0].images.items()
        },
        state=np.concatenate([o.state for o in observations]),
        instruction=tuple(o.instruction[0] for o in observations),
    )
