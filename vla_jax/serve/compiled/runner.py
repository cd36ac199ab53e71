"""Calls of the compiled programs: observations in, actions in the robots' units out.

`Policy.act` is made of it; who serves many robots calls it row by row (`serve.server`).
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from vla_jax.config import TrainConfig
from vla_jax.data.bundle import DataBundle
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.vla import portable
from vla_jax.serve.compiled.compiler import Compiler
from vla_jax.serve.compiled.config import CompileConfig, batch_bucket
from vla_jax.serve.compiled.encode import Encoded, ObservationEncoder
from vla_jax.serve.compiled.preprocess import scaling_of
from vla_jax.serve.compiled.program import Inputs, PolicyProgram, Shape
from vla_jax.serve.compiled.prompts import null, stacked, used
from vla_jax.serve.executors.base import Running
from vla_jax.serve.sampling import Overlap
from vla_jax.types import Context, Observation, PyTree


class _Kept(NamedTuple):
    """The last call of one robot and the context that it left."""

    cameras: tuple[tuple[str, int, int], ...]
    images: tuple[np.ndarray, ...]
    present: tuple[bool, ...]
    text: bytes
    length: int
    context: Context


class ProgramRunner:
    """Programs, parameters on the device, texts; what it remembers between calls never changes an answer."""

    def __init__(
        self,
        config: TrainConfig,
        bundle: DataBundle,
        params: PyTree,
        how: CompileConfig,
        mesh: Mesh | None = None,
    ):
        """`params`: those that are served, where they are to lie (`compiled.parameters`)."""
        self.config, self.bundle = how, bundle
        model = dataclasses.replace(
            portable(config.model, jax.default_backend()), dtype=how.dtype or config.model.dtype
        )
        program = PolicyProgram(model, make_process(config.process), scaling_of(bundle), how.rewrites)
        self.compiler = Compiler(program, params, mesh)
        on_host = how.resize == "host"
        self._encoder = ObservationEncoder(bundle, resize=on_host)
        one_size = (bundle.resize.height, bundle.resize.width)
        self._sizes = {name: one_size if on_host else size for name, size in bundle.select.cameras.items()}
        longest, reads = config.data.max_text_tokens, config.model.backbone
        # A network that reads no text is the same program whatever the prompt.
        self.lengths = how.prompt_lengths(longest) if reads.has_text else (longest,)
        self._state_in_context = reads.reads_state
        self._kept: _Kept | None = None

    def act(
        self,
        observation: Observation,
        keys: Key[Array, "*b"],
        *,
        plan: Sequence[str] | None,
        plan_visible: bool,
        solver: SolverConfig,
        samples: int,
        guidance: float | None,
        running: Running | None,
    ) -> Float[np.ndarray, "b S k a"]:
        """Chunks for checked observations of any number of robots; see `Policy.act`. `keys`: one, or one per robot."""
        rows = self.encode(observation, plan, null_prompt=guidance == 0)
        robots, pieces = len(rows), []
        data = np.asarray(jax.random.key_data(keys))
        data, numbers = (
            (data, np.zeros(robots, np.int32))
            if keys.ndim
            else (np.stack([data] * robots), np.arange(robots))
        )
        for start in range(0, robots, max(self.config.buckets)):
            some = slice(start, start + max(self.config.buckets))
            piece = rows[some]
            weights = None if guidance in (None, 0, 1) else [guidance] * len(piece)
            overlap = None
            if running is not None:
                overlap = Overlap.of(running, np.asarray(running.actions[some], np.float32))
            chunks = self.run(
                piece, data[some], solver=solver, samples=samples, plan_visible=plan_visible,
                guidance=weights, overlap=overlap, numbers=numbers[some],
            )  # fmt: skip
            pieces.append(chunks)
        return np.concatenate(pieces)

    def encode(
        self, observation: Observation, plan: Sequence[str] | None = None, *, null_prompt: bool = False
    ) -> list[Encoded]:
        """Rows of an observation, see `ObservationEncoder`. Raises ValueError."""
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
        plan_visible: bool = False,
        guidance: Sequence[float] | None = None,
        overlap: Overlap | None = None,
        numbers: Int[np.ndarray, " b"] | None = None,
        bucket: int | None = None,
        length: int | None = None,
        cameras: Collection[str] | None = None,
    ) -> Float[np.ndarray, "b S k a"]:
        """One call of the program for rows with images of the same cameras: actions in the robots' units.

        `keys` is key data, one for each row; `numbers` tell rows of the same key apart (default: 0 for all);
        `guidance` weighs each row's instruction; `overlap` holds what each robot runs, in its own units. `bucket`,
        `length` and `cameras` choose a larger program than the rows need; what is then missing is padded and masked.
        """
        units = self.bundle.units
        bucket = bucket or batch_bucket(self.config.buckets, len(rows))
        if len(rows) > bucket or len(keys) != len(rows):
            raise ValueError(f"{len(rows)} rows with {len(keys)} keys do not fit a bucket of {bucket}")
        real, last = len(rows), [len(rows) - 1] * (bucket - len(rows))
        numbers = np.zeros(real, np.int32) if numbers is None else numbers
        rows = [*rows, *[rows[-1]] * len(last)]  # copies of the last row fill the bucket; cut off below
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
            plan_visible=plan_visible,
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
        context, shape = self._remembered(shape, tuple(images.values()), present, text)
        inputs = self.inputs(rows, shape, images, keys, numbers, weights, overlap)
        out = self.compiler(shape, inputs, context)
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
        numbers = np.zeros(shape.rows, np.int32) if numbers is None else numbers
        found = rows[0].images
        again = shape.again
        host: dict[str, Any] = dict(  # NumPy's arrays where a program's are declared
            images=() if again else tuple(images.values()),
            present=np.asarray([name in found for name in images], bool),
            text=None if again else stacked(texts, shape.length, plan_visible=shape.plan_visible),
            state=self.bundle.model_state(np.stack([row.state for row in rows])).astype(np.float32),
            group=np.asarray([row.group for row in rows], np.int32),
            key=keys,
            number=np.asarray(numbers, np.int32),
            guidance=guidance,
            overlap=overlap,
        )
        return Inputs(**host)

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
        plan_visible: Sequence[bool] = (False,),
        guided: Sequence[bool] = (False,),
        lengths: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
    ) -> Iterator[Shape]:
        """Every program for some of the model's cameras (default: all that the robot has), with images of the size
        trained on, or of the model's where the host resizes."""
        sizes, given = self._sizes, self.bundle.shown
        names = tuple((name, *sizes[name]) for name in given if name in (cameras or given))
        choices = itertools.product(
            self.config.buckets, lengths or self.lengths, samples, plan_visible, guided
        )
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
            cameras = found if self.config.rewrites.cameras else self.bundle.cameras
        return {
            name: np.stack([row.images[name] for row in rows])
            if name in found
            else np.zeros((len(rows), *sizes[name], 3), np.uint8)
            for name in self.bundle.cameras
            if name in cameras
        }

    def _reuses(self, shape: Shape) -> bool:
        """Whether calls of a shape leave a context that the next may use: not where it holds the state, which moves."""
        reuse = self.config.rewrites.reuse and not self._state_in_context
        return reuse and shape.rows == 1 and not shape.guided

    def _remembered(
        self, shape: Shape, images: tuple[np.ndarray, ...], present: tuple[bool, ...], text: bytes
    ) -> tuple[Context | None, Shape]:
        """The context of the last call where nothing that made it has changed, and the shape to run then."""
        if not self._reuses(shape):
            return None, shape
        kept = self._kept
        now = (shape.cameras, present, text, shape.length)
        if kept is None or (kept.cameras, kept.present, kept.text, kept.length) != now:
            return None, shape._replace(keep=True)
        if all(np.array_equal(new, old) for new, old in zip(images, kept.images)):
            return kept.context, shape._replace(again=True)
        return None, shape._replace(keep=True)


def keys_of(seeds: Sequence[int]) -> UInt32[np.ndarray, "keys data"]:
    """Key data of `jax.random.key(seed)` for seeds from 0 to 2³¹-1."""
    options: Any = jax.config  # whose declaration has none of its options
    if options.jax_default_prng_impl == "threefry2x32":  # without a dozen small programs
        return np.stack([np.zeros(len(seeds), np.uint32), np.asarray(seeds, np.uint32)], axis=1)
    return np.stack([np.asarray(jax.random.key_data(jax.random.key(seed))) for seed in seeds])
