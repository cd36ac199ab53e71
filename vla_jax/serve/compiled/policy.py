"""A policy made fast: the same actions as `Policy.act` up to rounding, from programs compiled ahead of time.

    compiled = CompiledPolicy(Policy.load("runs/tabletop"), CompileConfig())
    compiled.warm_up(SolverConfig())
    actions = compiled.act(observation, jax.random.key(0), solver=SolverConfig())

It stands in for a `Policy` wherever chunks are asked for: the server, executors, `sim.evaluate.Runner` (so
benchmarks/solver_front.py). `Policy` itself stays the plain path that it is compared with, and the one that
launch.evaluate runs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, PRNGKeyArray, UInt8, UInt32

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import make_process
from vla_jax.serve.compiled.compiler import Compiler
from vla_jax.serve.compiled.config import CompileConfig, batch_bucket
from vla_jax.serve.compiled.encode import Encoded, Encoder
from vla_jax.serve.compiled.network import Network, Prefix
from vla_jax.serve.compiled.placement import shard_weights
from vla_jax.serve.compiled.preprocess import scaling_of
from vla_jax.serve.compiled.program import Inputs, Program, Shape, Text
from vla_jax.serve.compiled.prompts import Prompts, null, used
from vla_jax.serve.compiled.weights import rewrite
from vla_jax.serve.executors.base import Running, check_finite
from vla_jax.serve.noise import check_keys, draws
from vla_jax.serve.policy import Policy
from vla_jax.serve.sampling import Overlap
from vla_jax.types import Observation


class _Kept(NamedTuple):
    """The last call of one robot and the prefix that it left."""

    cameras: tuple[tuple[str, int, int], ...]
    images: tuple[np.ndarray, ...]
    present: tuple[bool, ...]
    text: bytes
    length: int
    prefix: Prefix


class CompiledPolicy:
    """Programs, weights on the device, prompts; what it remembers between calls never changes an answer.

    The policy stays beside it for plans. Where none is asked for, give it `on_host`: its parameters then take no memory
    of the device, not even while they are rewritten. For a mesh they are always rewritten on the host, so that no
    device holds more than its own part.
    """

    def __init__(self, policy: Policy, config: CompileConfig | None = None, *, mesh: Mesh | None = None):
        if policy.config.kind == "tokens":
            raise ValueError(
                "a policy that writes its actions as tokens has no compiled form; use it as it is"
            )
        self.policy = policy
        self.config = config or CompileConfig(buckets=policy.call_sizes)
        model, bundle, rewrites = policy.config.model, policy.bundle, self.config.rewrites
        params = nn.meta.unbox(policy.params)
        split = mesh is not None and mesh.shape["tensor"] > 1
        make = functools.partial(
            rewrite,
            model=model,
            config=self.config,
            state_dims=len(bundle.schema.state_names),
            action_dims=len(bundle.schema.action_names),
            split_qkv=split,
        )
        if mesh is None and not all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
            weights = make(params)
        else:
            with jax.default_device(jax.devices("cpu")[0]):
                weights = make(jax.tree.map(np.asarray, params))
            weights = (
                jax.device_put(weights, jax.devices()[0]) if mesh is None else shard_weights(weights, mesh)
            )
        network = Network(model, rewrites, self.config.dtype or model.dtype)
        program = Program(network, make_process(policy.config.process), scaling_of(bundle))
        self.compiler = Compiler(program, weights, mesh)
        table = params["backbone"]["llm"]["embedder"]["input_embedding"] if rewrites.embeddings else None
        on_host = self.config.resize == "host"
        self._encoder = Encoder(bundle, resize=on_host)
        one_size = (bundle.resize.height, bundle.resize.width)
        self._sizes = {name: one_size if on_host else size for name, size in bundle.select.cameras.items()}
        self.prompts = Prompts(
            None if table is None else np.asarray(table),
            network.dtype,
            lambda text: jax.device_put(text, None if mesh is None else self._places(text)),
        )
        self.lengths = self.config.prompt_lengths(policy.config.data.max_text_tokens)
        self._kept: _Kept | None = None

    @property
    def horizon(self) -> int:
        """k, the actions of a chunk."""
        return self.policy.horizon

    @property
    def execute(self) -> int:
        """Actions of a chunk that are run before the next prediction, unless the executor is told otherwise."""
        return self.policy.execute

    @property
    def writes_plans(self) -> bool:
        """Whether it was trained to predict text targets."""
        return self.policy.writes_plans

    @property
    def sees_plans(self) -> bool:
        """Whether its actions were trained with a visible text target."""
        return self.policy.sees_plans

    @property
    def guides(self) -> bool:
        """Whether the instruction can be given a weight."""
        return self.policy.guides

    @property
    def action_scale(self) -> Float[np.ndarray, " a"]:
        """Standard deviation of each action dimension in the training data."""
        return self.policy.action_scale

    def plan(self, observation: Observation, key: PRNGKeyArray, temperature: float = 0.0) -> list[str]:
        """One text per robot; see `Policy.plan`."""
        return self.policy.plan(observation, key, temperature)

    def act(
        self,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        solver: SolverConfig,
        plan: Sequence[str] | None = None,
        see_plan: bool = False,
        samples: int = 1,
        guidance: float | None = None,
        running: Running | None = None,
    ) -> Float[np.ndarray, "b *S k a"]:
        """`Policy.act`, with the same noise for the same key."""
        observation = self.policy.bundle.check(observation)
        plan = self.policy.check_request(observation, plan, see_plan, samples)
        self.policy.check_steering(guidance, running, len(observation.instruction))
        robots = len(observation.instruction)
        key = check_keys(key, robots)
        if see_plan and plan is None:
            plan = self.plan(observation, draws(key, robots).plan)
        rows = self.encode(observation, plan, null_prompt=guidance == 0)
        data, pieces = np.asarray(jax.random.key_data(key)), []
        data, numbers = (
            (data, np.zeros(robots)) if key.ndim else (np.stack([data] * robots), np.arange(robots))
        )
        for start in range(0, robots, max(self.config.buckets)):
            some = slice(start, start + max(self.config.buckets))
            piece = rows[some]
            weights = None if guidance in (None, 0, 1) else [guidance] * len(piece)
            how = {"solver": solver, "samples": samples, "sees": see_plan, "guidance": weights}
            if running is not None:
                known = np.asarray(running.actions[some], np.float32)
                how["overlap"] = Overlap.of(running, known)
            pieces.append(self.run(piece, data[some], numbers=numbers[some], **how))
        chunks = np.concatenate(pieces)
        check_finite(chunks, range(robots))
        return chunks[:, 0] if samples == 1 else chunks

    def encode(
        self, observation: Observation, plan: Sequence[str] | None = None, *, null_prompt: bool = False
    ) -> list[Encoded]:
        """Rows of an observation, see `Encoder`. Raises ValueError."""
        return self._encoder(observation, plan, null_prompt=null_prompt)

    def length_of(self, rows: Sequence[Encoded]) -> int:
        """The text length of the program that takes these rows."""
        most = max(used(row.text) for row in rows)
        return next(length for length in self.lengths if length >= most)

    def run(
        self,
        rows: Sequence[Encoded],
        keys: UInt32[np.ndarray, "b data"],
        *,
        solver: SolverConfig,
        samples: int = 1,
        sees: bool = False,
        guidance: Sequence[float] | None = None,
        overlap: Overlap | None = None,
        numbers: Sequence[int] | None = None,
        bucket: int | None = None,
        length: int | None = None,
        cameras: Collection[str] | None = None,
    ) -> Float[np.ndarray, "b S k a"]:
        """One call of the program for rows with images of the same cameras: actions in the robots' units.

        `keys` is key data, one for each row; `numbers` tell rows of the same key apart (default: 0 for all);
        `guidance` weighs each row's instruction; `overlap` holds what each robot runs, in its own units. `bucket`,
        `length` and `cameras` choose a larger program than the rows need; what is then missing is padded and masked.
        """
        units = self.policy.bundle.units
        bucket = bucket or batch_bucket(self.config.buckets, len(rows))
        if len(rows) > bucket or len(keys) != len(rows):
            raise ValueError(f"{len(rows)} rows with {len(keys)} keys do not fit a bucket of {bucket}")
        real, last = len(rows), [len(rows) - 1] * (bucket - len(rows))
        numbers = np.zeros(real) if numbers is None else np.asarray(numbers)
        rows = [*rows, *[rows[-1]] * len(last)]
        keys, numbers = (np.concatenate([x, x[last]]) for x in (keys, numbers))
        states = np.stack([row.state for row in rows])
        weights = None
        if guidance is not None:
            weights = np.asarray([*guidance, *[guidance[-1]] * len(last)], np.float32)
        images = self._images(rows, cameras)
        shape = Shape(
            rows=bucket,
            cameras=tuple((name, *image.shape[1:3]) for name, image in images.items()),
            length=length or self.length_of(rows),
            samples=samples,
            sees=sees,
            solver=solver,
            guided=weights is not None,
            continues=None if overlap is None else overlap.how,
        )
        if overlap is not None:
            known, weight = (np.concatenate([x, x[last]]) for x in (overlap.known, overlap.weight))
            if units is not None:
                known = units.actions(known, states).astype(np.float32)
            overlap = dataclasses.replace(overlap, known=known, weight=weight)
        present = tuple(name in rows[0].images for name in images)
        text = b"".join(part.tobytes() for part in rows[0].text)
        prefix, shape = self._remembered(shape, tuple(images.values()), present, text)
        inputs = self.inputs(rows, shape, images, keys, numbers, weights, overlap)
        out = self.compiler(shape, inputs, prefix)
        if shape.keep:
            out, left = out
            copies = tuple(image.copy() for image in images.values())
            self._kept = _Kept(shape.cameras, copies, present, text, shape.length, left)
        chunks = np.array(out)[:real]  # not a read-only view of the device's buffer
        return chunks if units is None else units.robot_actions(chunks, states[:real, None])

    def inputs(
        self,
        rows: Sequence[Encoded],
        shape: Shape,
        images: dict[str, UInt8[np.ndarray, "b h w 3"]] | None = None,
        keys: UInt32[np.ndarray, "b data"] | None = None,
        numbers: Int[np.ndarray, " b"] | None = None,
        guidance: Float[np.ndarray, " b"] | None = None,
        overlap: Overlap | None = None,
    ) -> Inputs:
        """The program's arguments for a full bucket of rows; key 0 for all of them unless keys are given."""
        texts = [row.text for row in rows]
        texts += [null(text) for text in texts] if shape.guided else []
        images = self._images(rows, [name for name, _, _ in shape.cameras]) if images is None else images
        keys = keys_of([0] * shape.rows) if keys is None else keys
        numbers = np.zeros(shape.rows) if numbers is None else numbers
        found = rows[0].images
        again = shape.again
        return Inputs(
            images=() if again else tuple(images.values()),
            present=np.asarray([name in found for name in images]),
            text=None if again else self.prompts.batch(texts, shape.length, shape.sees),
            state=self.policy.bundle.model_state(np.stack([row.state for row in rows])).astype(np.float32),
            group=np.asarray([row.group for row in rows], np.int32),
            key=keys,
            number=np.asarray(numbers, np.int32),
            guidance=guidance,
            overlap=overlap,
        )

    def warm_up(self, solver: SolverConfig, **what: Any) -> int:
        """Compiles all of `shapes`; returns how many."""
        shapes = list(self.shapes(solver, **what))
        for shape in shapes:
            self.compiler.executable(shape)
        return len(shapes)

    def shapes(
        self,
        solver: SolverConfig,
        *,
        samples: Sequence[int] = (1,),
        sees: Sequence[bool] = (False,),
        guided: Sequence[bool] = (False,),
        lengths: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
    ) -> Iterator[Shape]:
        """Every program for some of the model's cameras (default: all that the robot has), with images of the size
        trained on, or of the model's where the host resizes."""
        sizes, given = self._sizes, self.policy.bundle.shown
        names = tuple((name, *sizes[name]) for name in given if name in (cameras or given))
        choices = itertools.product(self.config.buckets, lengths or self.lengths, samples, sees, guided)
        for bucket, length, count, plan, weighed in choices:
            shape = Shape(bucket, names, length, count, plan, solver, weighed)
            if self._reuses(shape):
                yield from (shape._replace(keep=True), shape._replace(again=True))
            else:
                yield shape

    def _images(
        self, rows: Sequence[Encoded], cameras: Collection[str] | None
    ) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
        """Stacked by camera; black where a camera is asked for that the rows do not have."""
        found, sizes = rows[0].images, self._sizes
        if cameras is None:
            cameras = found if self.config.rewrites.cameras else self.policy.bundle.cameras
        return {
            name: np.stack([row.images[name] for row in rows])
            if name in found
            else np.zeros((len(rows), *sizes[name], 3), np.uint8)
            for name in self.policy.bundle.cameras
            if name in cameras
        }

    def _reuses(self, shape: Shape) -> bool:
        return self.config.rewrites.reuse and shape.rows == 1 and not shape.guided

    def _remembered(
        self, shape: Shape, images: tuple[np.ndarray, ...], present: tuple[bool, ...], text: bytes
    ) -> tuple[Prefix | None, Shape]:
        """The prefix of the last call where nothing that made it has changed, and the shape to run then."""
        if not self._reuses(shape):
            return None, shape
        kept = self._kept
        now = (shape.cameras, present, text, shape.length)
        if kept is None or (kept.cameras, kept.present, kept.text, kept.length) != now:
            return None, shape._replace(keep=True)
        if all(np.array_equal(new, old) for new, old in zip(images, kept.images)):
            return kept.prefix, shape._replace(again=True)
        return None, shape._replace(keep=True)

    def _places(self, text: Text) -> Any:
        shape = text.mask.shape
        place = self.compiler.array(shape, bool).sharding
        return jax.tree.map(lambda _: place, text)


def keys_of(seeds: Sequence[int]) -> UInt32[np.ndarray, "keys data"]:
    """Key data of `jax.random.key(seed)` for seeds from 0 to 2³¹-1."""
    if jax.config.jax_default_prng_impl == "threefry2x32":  # without a dozen small programs
        return np.stack([np.zeros(len(seeds), np.uint32), np.asarray(seeds, np.uint32)], axis=1)
    return np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
