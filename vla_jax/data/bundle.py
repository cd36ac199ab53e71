"""Everything a model needs to know of its data, in one object that a checkpoint stores and a policy replays."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vla_jax.data import transforms as tf
from vla_jax.data.config import DataConfig
from vla_jax.data.derived import cached
from vla_jax.data.fast.dataset import Prepared, prepare_fast
from vla_jax.data.fast.ids import action_ids
from vla_jax.data.fast.transform import DecodedChunks, TokenizeActions
from vla_jax.data.index import DatasetIndex, index_dataset, split_episodes
from vla_jax.data.normalize import Normalize, narrow_dims
from vla_jax.data.observations import Expected, check_observation
from vla_jax.data.prompt_forms import Prompt
from vla_jax.data.quote import quoted
from vla_jax.data.robot_data import robot_statistics, select_of, units_of, unscaled_of
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.sample import Sample, Transform
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources.source import EpisodeSource
from vla_jax.data.statistics import DatasetStatistics, constant_dims
from vla_jax.data.tokenizer import Tokenizer, train_tokenizer
from vla_jax.data.tokenizer_files import read_tokenizer
from vla_jax.types import Batch, Observation

T = TypeVar("T", bound=Transform)
_TOKENIZER_VERSION = 1
FARTHEST = 1e12
"""Largest normalised state that is taken. Not less, because a dimension that never changed has a spread of 1e-8 in
converted statistics (openpi, LeRobot), by which an ordinary reading becomes 1e10. Not more, because the network squares
it in float32, which ends at 3e38."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataBundle:
    """Schema, and the transforms with their tokenizer and statistics."""

    schema: DatasetSchema
    transforms: tuple[Transform, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the Tokenize transform."""
        return self._only(tf.Tokenize).tokenizer

    @property
    def tokenize_actions(self) -> TokenizeActions | None:
        """The transform that makes FAST tokens of chunks, if there is one."""
        found = [transform for transform in self.transforms if isinstance(transform, TokenizeActions)]
        return found[0] if found else None

    @property
    def vocab_size(self) -> int:
        """Entries of the model's vocabulary: those of the tokenizer, and what action tokens add."""
        actions = self.tokenize_actions
        return self.tokenizer.vocab_size if actions is None else action_ids(self.tokenizer, actions.fast)[1]

    @property
    def normalize(self) -> Normalize:
        """The normalisation, with its statistics."""
        return self._only(Normalize)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras."""
        return tuple(self.select.cameras)

    @property
    def select(self) -> tf.SelectCameras:
        """The transform that says which camera of the robot is which of the model's."""
        return self._only(tf.SelectCameras)

    @property
    def sources(self) -> dict[str, str]:
        """The model's camera → the robot's (its name in observations and data), of those that the robot has."""
        return {name: of for name, of in self.select.sources.items() if of in self.schema.cameras}

    @property
    def shown(self) -> tuple[str, ...]:
        """The model's cameras that get an image from this robot, or a black one that counts."""
        return tuple(name for name in self.cameras if name in self.sources or name in self.select.black)

    @property
    def units(self) -> RobotUnits | None:
        """What is done to state and actions before they are normalised, where the robot is described."""
        found = [transform for transform in self.transforms if isinstance(transform, RobotUnits)]
        return found[0] if found else None

    @property
    def robot(self) -> RobotDescription | None:
        """The robot's description, where training or conversion was given one."""
        return None if self.units is None else self.units.robot

    def model_state(self, state: Float[np.ndarray, "*n q"]) -> Float[np.ndarray, "*n q"]:
        """A state in the model's units, not yet normalised."""
        return state if self.units is None else self.units.state(state)

    @property
    def resize(self) -> tf.ResizeImages:
        """What scales images to the model's size."""
        return self._only(tf.ResizeImages)

    @property
    def constant_dims(self) -> tuple[str, ...]:
        """A line for each dimension that never or hardly changes in what the normalisation was computed from."""
        constant = constant_dims(self.normalize.statistics, self.schema)
        return constant + narrow_dims(self.normalize, self.schema)

    @property
    def expected(self) -> Expected:
        """What observations are checked against."""
        seen = tuple(self.sources.values())
        unseen = tuple(camera for camera in self.schema.cameras if camera not in seen)
        return Expected(cameras=seen, unseen=unseen, state_names=self.schema.state_names)

    def check(self, observation: Observation) -> Observation:
        """The observation as the model takes it: cameras that it sees (None: absent), uint8 images, a float32 state.

        Raises one ValueError, in one line: the field, what came, what is expected, how to mend it.
        """
        observation = check_observation(observation, self.expected)
        for row, state in enumerate(self.model_state(observation.state)):
            offset, _, inverse = self.normalize.affine(
                self.normalize.key(_observed(observation, row, None)), "state"
            )
            far = np.abs((state - offset) * inverse)
            if (far > FARTHEST).any():
                dim = int(far.argmax())
                raise ValueError(
                    f"state[{row}, {dim}] ({self.schema.state_names[dim]}) is {state[dim]:g}, {far[dim]:.1g} times the "
                    f"training data's spread from its centre, {offset[dim]:g}; a reading in the data's units is "
                    "expected: check the sensor and the unit"
                )
        return observation

    def blank(self, instruction: str | None = None) -> Observation:
        """One robot that sees black in the middle of the training data's states: to trace and to warm up with.

        `instruction` None: one of the data set's, where it is needed to choose statistics.
        """
        if instruction is None:
            instruction = next(iter(self.normalize.task_of), "")
        sample = Sample(images={}, state=np.zeros(0, np.float32), instruction=instruction)
        middle, _, _ = self.normalize.affine(self.normalize.key(sample), "state")
        images: dict[str, UInt8[np.ndarray, "b h w 3"] | None] = {
            camera: np.zeros((1, *self.schema.cameras[camera], 3), np.uint8)
            for camera in self.sources.values()
        }
        middle = middle if self.units is None else self.units.robot_state(middle)
        state = np.asarray(middle, np.float32)[None]
        return Observation(images=images, state=state, instruction=(instruction,))

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Samples in the robot's units as the model's batch; leaves are numpy arrays."""
        return collate([tf.apply_inputs(self.transforms, sample) for sample in samples])

    def observation_batch(
        self,
        observation: Observation,
        targets: Sequence[str] | None = None,
        actions: Float[np.ndarray, "b k robot_a"] | None = None,
    ) -> Batch:
        """What the robots see as the model's batch; `targets` are plans to follow, one per robot.

        `actions` are chunks in the robots' units, e.g. those that run now; the batch has them in the model's.
        Raises ValueError where the observation is not what `check` takes.
        """
        observation = self.check(observation)
        samples = [
            _observed(observation, row, targets[row] if targets is not None else None)
            for row in range(len(observation.instruction))
        ]
        if actions is not None:
            samples = [
                sample.replace(actions=chunk, action_mask=np.ones(chunk.shape, bool))
                for sample, chunk in zip(samples, actions)
            ]
        return self.batch(samples)

    def text_lengths(self, observation: Observation, row: int, target: str) -> tuple[int, int]:
        """Tokens of a robot's prompt with a plan, and of the plan with its end."""
        sample = _observed(observation, row, target)
        sample = self.normalize.inputs(sample.replace(state=self.model_state(sample.state)))
        return self._only(tf.Tokenize).lengths(sample)

    def decode_actions(self, ids: Int[np.ndarray, "*n g"], mask: Bool[np.ndarray, "*n g"]) -> DecodedChunks:
        """Sampled action tokens as chunks of the model's dimensions; see `TokenizeActions.decode`."""
        chunks = self._only(TokenizeActions).decode(ids, mask)
        padding = self._only(tf.PadDims).action_dim - chunks.actions.shape[-1]
        widths = [(0, 0)] * (chunks.actions.ndim - 1) + [(0, padding)]
        return chunks._replace(actions=np.pad(chunks.actions, widths))

    def robot_actions(
        self, actions: Float[np.ndarray, "b *draws k a"], observation: Observation
    ) -> Float[np.ndarray, "b *draws k robot_a"]:
        """The model's actions in the robots' units. Any axes may lie between batch and chunk."""
        rows = [
            tf.apply_outputs(self.transforms, _observed(observation, row, None).replace(actions=chunk)).chunk
            for row, chunk in enumerate(np.asarray(actions))
        ]
        return np.stack(rows)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"schema": self.schema.to_json(), "transforms": tf.to_json(self.transforms)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataBundle":
        """The inverse of `to_json`."""
        schema = DatasetSchema.from_json(values["schema"])
        return cls(schema=schema, transforms=tf.from_json(values["transforms"]))

    def _only(self, kind: type[T]) -> T:
        found = [transform for transform in self.transforms if isinstance(transform, kind)]
        if len(found) != 1:
            raise ValueError(f"the stored transforms hold {len(found)} {kind.__name__}, not one")
        return found[0]


def prepare(
    config: DataConfig,
    *,
    cameras: Sequence[str] | None = (),
    state_dim: int = 0,
    action_dim: int = 0,
    horizon: int = 0,
    action_tokens: Literal["none", "beside", "instead"] = "none",
    floor: bool = True,
    text: bool = False,
) -> DataBundle:
    """Tokenizer, statistics and transforms for a data set; the slow parts are kept beside it.

    `cameras`, `state_dim` and `action_dim` are the model's: more dims than the data set's are padded and masked; 0 or
    empty takes the data set's own, and `cameras` None says that the model looks at none. `action_tokens`: whether
    chunks of `horizon` steps become FAST tokens beside the actions or instead of them. `floor` False: for a run that
    was begun when scales had no least value (`Normalize.floor`). `text`: whether text targets are to be learned; where
    there are none, that is said.
    """
    source = EpisodeSource(config.path, cache_mb=config.cache_mb)
    schema, index = source.schema, index_dataset(source)
    train, _ = split_episodes(index, config)
    units = units_of(config, schema)
    statistics = robot_statistics(source, train, index.fingerprint, units, horizon, config.after_end)
    select = tf.SelectCameras({}) if cameras is None else _select(tuple(cameras), config, schema, units)
    robot_state_dim, robot_action_dim = len(schema.state_names), len(schema.action_names)
    if 0 < state_dim < robot_state_dim:
        raise ValueError(
            f"{config.path} has {robot_state_dim} state dims, the model {state_dim}; use "
            f"model.expert.state_dim={robot_state_dim} or more, or 0 for as many as the data have"
        )
    prompt = config.prompt_form
    tokenizer = (
        read_tokenizer(config.tokenizer) if config.tokenizer else _tokenizer(source, index, config, prompt)
    )
    tokenize = tf.Tokenize(tokenizer, config.max_text_tokens, config.max_target_tokens, prompt)
    _note_missing_texts(index, config.path, text)
    _check_texts(tokenize, index, robot_state_dim)
    normalize = _normalize(config, statistics, index, units, floor)
    as_tokens = ()
    if action_tokens != "none":
        prepared = prepare_fast(config.fast, source, train, normalize, horizon, index.fingerprint, units)
        as_tokens = (_as_tokens(prepared, tokenizer, config, schema, horizon, action_tokens == "beside"),)
    transforms = (
        *(() if units is None else (units,)),
        select,
        tf.ResizeImages(config.image_size, config.image_size),
        normalize,
        *as_tokens,
        tokenize,
        tf.PadDims(
            state_dim=state_dim or robot_state_dim,
            action_dim=action_dim or robot_action_dim,
            robot_action_dim=robot_action_dim,
        ),
    )
    return DataBundle(schema=schema, transforms=transforms)


def _normalize(
    config: DataConfig,
    statistics: DatasetStatistics,
    index: DatasetIndex,
    units: RobotUnits | None,
    floor: bool,
) -> Normalize:
    """The configured normalisation, by the statistics of the data set or of each task."""
    by_task = config.normalization_group == "task"
    return Normalize(
        method=config.normalization,
        group=config.normalization_group,
        statistics=statistics.per_task if by_task else {"": statistics.dataset},
        task_of=_task_of(index) if by_task else {},
        floor=floor,
        unscaled={} if units is None else unscaled_of(units.robot),
    )


def _as_tokens(
    prepared: Prepared,
    tokenizer: Tokenizer,
    config: DataConfig,
    schema: DatasetSchema,
    horizon: int,
    beside: bool,
) -> TokenizeActions:
    """FAST tokens of chunks, beside the actions or instead of them; rows as long as the longest chunk needs."""
    ids, _ = action_ids(tokenizer, prepared.fast)
    row = prepared.longest + len(ids.begin) + len(ids.end)
    return TokenizeActions(
        fast=prepared.fast,
        ids=ids,
        horizon=horizon,
        action_dim=len(schema.action_names),
        max_tokens=config.fast.max_tokens or row,
        keep_actions=beside,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Transformed samples as one batch of numpy arrays."""
    first = samples[0]
    texts = [row for row in (sample.text for sample in samples) if row is not None]
    if len(texts) != len(samples):
        raise ValueError("a sample has no text: Tokenize must be one of the transforms")
    arrays: dict[str, Any] = {
        "images": {camera: np.stack([s.images[camera] for s in samples]) for camera in first.images},
        "image_mask": {
            camera: np.asarray([s.image_mask[camera] for s in samples]) for camera in first.images
        },
        "state": np.stack([s.state for s in samples]),
        "tokens": np.stack([row.tokens for row in texts]),
        "token_mask": np.stack([row.mask for row in texts]),
        "token_causal": np.stack([row.causal for row in texts]),
        "token_loss": np.stack([row.loss for row in texts]),
    }
    if first.actions is not None:
        arrays["actions"] = np.stack([s.chunk for s in samples])
        arrays["action_mask"] = np.stack([s.chunk_mask for s in samples])
    if first.action_tokens is not None:
        rows = [s.action_tokens for s in samples if s.action_tokens is not None]
        tokens, mask, loss = (np.stack(parts) for parts in zip(*rows, strict=True))
        arrays |= {"action_tokens": tokens, "action_token_mask": mask, "action_token_loss": loss}
    return Batch(**arrays)


def _observed(observation: Observation, row: int, target: str | None) -> Sample:
    return Sample(
        images={camera: frames[row] for camera, frames in observation.images.items() if frames is not None},
        state=observation.state[row],
        instruction=observation.instruction[row],
        text_target=target,
    )


def _select(
    model_cameras: tuple[str, ...], config: DataConfig, schema: DatasetSchema, units: RobotUnits | None
) -> tf.SelectCameras:
    """Which camera of the data set is which of the model's; without a robot they have the same names."""
    if units is not None:
        return select_of(units.robot, model_cameras, schema, config.image_size)
    if model_cameras and config.cameras and model_cameras != config.cameras:
        raise ValueError(
            f"model.cameras={list(model_cameras)} and data.cameras={list(config.cameras)} differ; both say which "
            "of the data set's cameras the model sees, in order: give one of them"
        )
    cameras = model_cameras or config.cameras or tuple(schema.cameras)
    unknown = [camera for camera in cameras if camera not in schema.cameras]
    if unknown:
        raise ValueError(f"camera {unknown[0]!r} is not in {config.path}, which has {list(schema.cameras)}")
    return tf.SelectCameras({camera: schema.cameras[camera] for camera in cameras})


def _tokenizer(source: EpisodeSource, index: DatasetIndex, config: DataConfig, prompt: Prompt) -> Tokenizer:
    vocab_size = config.vocab_size
    texts = sorted({text for _, instruction, target in index.texts for text in (instruction, target)})
    texts = prompt.training_texts(texts, len(source.schema.state_names))
    key = {"texts": texts, "vocab_size": vocab_size, "version": _TOKENIZER_VERSION}
    files = cached(source.path, "tokenizer", key, lambda: train_tokenizer(texts, vocab_size).to_files())
    return Tokenizer.from_files(files)


def _task_of(index: DatasetIndex) -> dict[str, str]:
    tasks = index.tasks_of_instruction()
    for instruction, names in tasks.items():
        if len(names) > 1:
            raise ValueError(
                f"instruction {quoted(instruction)} belongs to the tasks {quoted(list(names))}, so per-task statistics "
                "cannot be chosen by it; use data.normalization_group=dataset"
            )
    return {instruction: names[0] for instruction, names in tasks.items()}


def _note_missing_texts(index: DatasetIndex, path: str, text: bool) -> None:
    """Says in the log what a policy of these data will not learn, for want of texts."""
    log = logging.getLogger(__name__)
    if text and not any(target.strip() for _, _, target in index.texts):
        log.warning(
            "objective.text=True, but no step of %s has a text target: the text loss will be 0 and plans mean nothing; "
            "use objective.text=False",
            path,
        )
    silent = sorted({task for task, instruction, _ in index.texts if not instruction.strip()})
    if silent:
        log.warning(
            "%s has episodes without an instruction (of the tasks %s): the policy is not told there what to do",
            path,
            quoted(silent),
        )


def _check_texts(tokenize: tf.Tokenize, index: DatasetIndex, state_dim: int) -> None:
    """Refuse limits that some text of the data set does not fit, before training starts."""
    samples = [
        # A state of ones is the longest to write: 255 in every dimension.
        Sample(images={}, state=np.ones(state_dim, np.float32), instruction=instruction, text_target=target)
        for instruction, target in sorted({(instruction, target) for _, instruction, target in index.texts})
    ]
    for part in (0, 1):  # the longest text, the longest target
        tokenize.inputs(max(samples, key=lambda sample: tokenize.lengths(sample)[part]))
