"""A trained policy: everything a robot needs, from one checkpoint directory.

    policy = Policy.load("runs/tabletop")
    actions = policy.act(observation, jax.random.key(0), solver=SolverConfig())      # [b k a], the robot's units
    texts = policy.plan(observation, jax.random.key(1))

A policy is frozen and has no state: what changes during an episode lives in `serve.executors`.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vla_jax.checkpoint import Saved, open_newest
from vla_jax.config import TrainConfig, config_hash, from_meta
from vla_jax.data.bundle import DataBundle
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.fields import kind
from vla_jax.data.observations import check_texts, take
from vla_jax.flow.config import SolverConfig
from vla_jax.layers import lora
from vla_jax.models.abstract import abstract_params
from vla_jax.models.action_tokens import ActionGrammar, GeneratedTokens
from vla_jax.models.vla import VLA, portable
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.compiled.parameters import placed, served
from vla_jax.serve.compiled.runner import ProgramRunner
from vla_jax.serve.executors.base import Running, check_finite
from vla_jax.serve.noise import Keys, check_keys, draws, robot_keys
from vla_jax.serve.sampling import decode_text, sample_action_tokens
from vla_jax.sharding.rules import path_name
from vla_jax.types import Batch, Observation, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Parameters, and all that was saved beside them: configuration, transforms, statistics, tokenizer."""

    config: TrainConfig
    bundle: DataBundle
    params: PyTree
    """LoRA's factors are leaves of their own, α/rank in B: merged into a matrix they would be rounded away where the
    network multiplies in bfloat16."""
    step: int
    """The training step that the parameters are from."""
    weights: Literal["ema", "params"] = "params"
    """Averaged parameters, or raw ones."""
    batch_size: int = 32
    """Most robots in one call of the network. Other numbers are cut and padded to 1, a quarter of this, or this,
    so that few programs are compiled."""
    serving: CompileConfig | None = None
    """How its programs are compiled; None: without any rewrite, for the sizes above. `compiled` sets it, and brings the
    parameters into the form that it asks for."""
    mesh: Mesh | None = None
    """Where a compiled policy's parameters lie; None: on one device."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        weights: Literal["ema", "params"] | None = None,
        batch_size: int = 32,
        host: bool = False,
    ) -> "Policy":
        """Reads a policy from a run's directory (the newest whole checkpoint) or from one step of it.

        All of it is of that one step, whatever a trainer saves or deletes meanwhile.

        `weights`: the averaged parameters or the raw ones; None: averaged ones where the run has them. `host`: they
        stay in the host's memory, for `compiled` to bring them to their devices.
        Raises FileNotFoundError or ValueError, each in one line.
        """

        def read(saved: Saved) -> "Policy":
            missing = {"config", "data"} - saved.meta.keys()
            if missing:
                raise ValueError(
                    f"{path} has no {' and no '.join(sorted(missing))}: it is not a policy's checkpoint"
                )
            config = saved.built("configuration", lambda: from_meta(saved.meta))
            bundle = saved.built(
                "tokenizer, statistics or transforms", lambda: DataBundle.from_json(saved.meta["data"])
            )
            loaded = saved.params(weights, device=jax.devices("cpu")[0] if host else None)
            params = loaded.params
            if config.lora.rank:
                params = jax.jit(lora.scaled, static_argnums=1)(params, config.lora.scale)
            return cls(
                config=config,
                bundle=bundle,
                params=params,
                step=saved.step,
                weights="ema" if loaded.item == "ema" else "params",
                batch_size=batch_size,
            )

        policy = open_newest(path, read)
        policy.check_params(path)
        return policy

    def compiled(self, serving: CompileConfig | None = None, *, mesh: Mesh | None = None) -> "Policy":
        """The same policy made fast: the same actions up to rounding, from programs compiled ahead of time.

            policy = Policy.load("runs/tabletop", host=True).compiled(CompileConfig(buckets=(1, 8)))
            policy.runner.warm_up(SolverConfig())

        Parameters in the host's memory are rewritten there, for a mesh always, so that no device holds more than its
        own part.
        """
        if self.config.kind == "tokens":
            raise ValueError(
                "a policy that writes its actions as tokens has no compiled form; use it as it is"
            )
        serving = serving or CompileConfig(buckets=self.call_sizes)
        model, params = self.config.model, nn.meta.unbox(self.params)
        on_host = mesh is not None or all(
            leaf.devices() == {jax.devices("cpu")[0]} if isinstance(leaf, jax.Array) else True
            for leaf in jax.tree.leaves(params)
        )
        with jax.default_device(jax.devices("cpu")[0]) if on_host else contextlib.nullcontext():
            params = served(params, model, serving, mesh)
        return dataclasses.replace(self, params=placed(params, model, mesh), serving=serving, mesh=mesh)

    @functools.cached_property
    def runner(self) -> ProgramRunner:
        """Its programs, compiled at their first use or by `ProgramRunner.warm_up`."""
        plain = CompileConfig(rewrites=Rewrites.none(), buckets=self.call_sizes)
        return ProgramRunner(self.config, self.bundle, self.params, self.serving or plain, self.mesh)

    @property
    def model(self) -> VLA:
        """The network, without its parameters; with the training machine's attention kernel where this one has it."""
        dtype = self.serving.dtype if self.serving is not None else None
        model = dataclasses.replace(self.config.model, dtype=dtype or self.config.model.dtype)
        return VLA(portable(model, jax.default_backend()))

    @property
    def config_hash(self) -> str:
        """A short fingerprint of the training configuration."""
        return config_hash(self.config)

    @property
    def horizon(self) -> int:
        """k, the actions of a chunk."""
        return self.config.model.expert.horizon

    @property
    def execute(self) -> int:
        """Actions of a chunk that are run before the next prediction, unless the executor is told otherwise."""
        return self.config.executed

    @property
    def call_sizes(self) -> tuple[int, ...]:
        """Numbers of robots for which programs are compiled."""
        return tuple(sorted({1, max(1, self.batch_size // 4), self.batch_size}))

    @property
    def writes_plans(self) -> bool:
        """Whether it was trained to predict text targets."""
        return self.config.objective.text

    @property
    def sees_plans(self) -> bool:
        """Whether its actions were trained with a visible text target."""
        return self.config.objective.plan_visible > 0

    @property
    def guides(self) -> bool:
        """Whether it was trained with null prompts too, so that the instruction can be given a weight."""
        return self.config.objective.prompt_dropout > 0 and self.config.kind != "tokens"

    @property
    def action_scale(self) -> Float[np.ndarray, " a"]:
        """Standard deviation of each action dimension in the training data (the mean of the tasks' own), 0 for one
        that never changes. For one that hardly does, its least scale: no measure is to consist of its noise. In the
        robot's units; of relative actions, the deviation from the state."""
        statistics = [s.action for s in self.bundle.normalize.statistics.values()]
        scales = [np.where(s.constant, 0.0, np.maximum(s.std, s.least_scale)) for s in statistics]
        units = self.bundle.units
        return np.mean(scales, axis=0) * (1.0 if units is None else units.action_scale)

    def in_scale(self, chunks: Float[np.ndarray, "b k a"]) -> Float[np.ndarray, "b k m"]:
        """Actions in units of `action_scale`, without the dimensions that never change in the training data."""
        moves = self.action_scale > 0
        return chunks[..., moves] / self.action_scale[moves]

    def plan(self, observation: Observation, key: Keys, temperature: float = 0.0) -> list[str]:
        """One text per robot, decoded greedily (temperature 0) or sampled from softmax(logits / temperature).

        `key`: one, or one per robot (`serve.noise`). At most `config.data.max_target_tokens` tokens, the end included.
        A text can be given back to `act`: one that would take more tokens when it is read (an untrained policy writes
        such) loses its end.
        """
        if not self.writes_plans:
            raise ValueError("this policy was trained with objective.text=False, so it cannot write plans")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} is negative; 0 is greedy")
        observation, pieces = self.bundle.check(observation), []
        robots = len(observation.instruction)
        keys = robot_keys(check_keys(key, robots), robots)
        for rows, size in self._slices(robots):
            tokens, _ = decode_text(
                self.params,
                self._piece(observation, rows, size, None),
                keys[_padded(rows, size)],
                temperature,
                model=self.model,
                max_tokens=self.config.data.max_target_tokens,
                eos=self.bundle.tokenizer.eos,
            )
            pieces.append(tokens[: len(rows)])
        decoded = np.concatenate([np.asarray(piece) for piece in pieces])
        return [self._readable(observation, row, tokens) for row, tokens in enumerate(decoded)]

    def act(
        self,
        observation: Observation,
        key: Keys,
        *,
        solver: SolverConfig,
        plan: Sequence[str] | None = None,
        plan_visible: bool = False,
        samples: int = 1,
        guidance: float | None = None,
        running: Running | None = None,
    ) -> Float[np.ndarray, "b *S k a"]:
        """Chunks of actions in the robots' units, [b k a], or [b S k a] with `samples` = S above 1.

        With `plan_visible` the actions are conditioned on a text: `plan`, one per robot, or the greedily decoded
        one. `key`: one, or one per robot, whose noise is then the same whoever is asked beside it (`serve.noise`).
        `guidance` is the instruction's weight: 0 ignores it, 1 is the plain policy, more exaggerates; other
        values than None compile one further program for all of them. With `running` the chunks continue those that
        the robots run now. Raises ValueError where the observation is not what `bundle.check` takes or the policy was
        not trained for what is asked, FloatingPointError where the actions are not finite.
        """
        observation = self.bundle.check(observation)
        plan = self.check_request(observation, plan, plan_visible, samples)
        self.check_steering(guidance, running, len(observation.instruction))
        robots = len(observation.instruction)
        key = check_keys(key, robots)
        if plan_visible and plan is None:
            plan = self.plan(observation, draws(key, robots).plan)
        how: dict[str, Any] = dict(plan=plan, plan_visible=plan_visible, solver=solver, samples=samples)
        if self.config.kind == "tokens":
            chunks = self._act_tokens(observation, key, **how)
        else:
            chunks = self.runner.act(observation, key, guidance=guidance, running=running, **how)
        check_finite(chunks, range(robots))
        return chunks[:, 0] if samples == 1 else chunks

    def _act_tokens(
        self,
        observation: Observation,
        key: Keys,
        *,
        plan: Sequence[str] | None,
        plan_visible: bool,
        solver: SolverConfig,
        samples: int,
    ) -> Float[np.ndarray, "b S k a"]:
        """Chunks that the decoder writes, in the robots' units."""
        robots, pieces = len(observation.instruction), []
        keys = draws(key, robots).actions
        for rows, size in self._slices(robots):
            written = sample_action_tokens(
                self.params,
                self._piece(observation, rows, size, plan),
                keys[_padded(rows, size)],
                self.grammar,
                solver.temperature,
                model=self.model,
                samples=samples,
                plan_visible=plan_visible,
                max_tokens=self.max_chunk_tokens,
            )
            pieces.append(self.read_chunks(written)[: len(rows)])
        return self.bundle.robot_actions(np.concatenate(pieces), observation)

    @functools.cached_property
    def grammar(self) -> ActionGrammar:
        """Which tokens make a chunk, for a policy that writes its chunks as tokens."""
        actions = self._action_tokenizer
        host: dict[str, Any] = dict(
            begin=np.asarray(actions.ids.begin, np.int32),
            end=np.int32(actions.ids.end[0]),
            coefficients=actions.coefficients(self.config.model.backbone.vocab),
            total=np.int32(actions.total),
        )
        return ActionGrammar(**host)

    @property
    def _action_tokenizer(self) -> TokenizeActions:
        """Raises ValueError where the policy does not write its actions as tokens."""
        if self.bundle.tokenize_actions is None:
            raise ValueError("this policy's actions are no tokens; act makes them from noise")
        return self.bundle.tokenize_actions

    @property
    def max_chunk_tokens(self) -> int:
        """Tokens after which a chunk is cut: four times the longest of the data (imported weights: openpi's limit), and
        what always suffices if less."""
        actions = self._action_tokenizer
        limit = actions.limit or 4 * actions.longest
        return min(actions.total or limit, limit)

    def read_chunks(self, written: GeneratedTokens) -> Float[np.ndarray, "b S k a"]:
        """Sampled tokens as normalised chunks; says in the log how many were no chunk and had to be completed."""
        chunks, malformed = self.bundle.decode_actions(np.asarray(written.tokens), np.asarray(written.mask))
        if malformed.any():
            logging.getLogger(__name__).warning(
                "%d of %d chunks were malformed; the nearest valid ones are used",
                malformed.sum(),
                malformed.size,
            )
        return chunks

    def check_params(self, where: str | os.PathLike) -> None:
        """Raises ValueError unless the parameters are those of the configured model."""
        expected = nn.meta.unbox(abstract_params(self.config.model))
        shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        found = {path: leaf.shape for path, leaf in leaves if not lora.is_factor(path_name(path))}
        for path in sorted({*shapes, *found}, key=jax.tree_util.keystr):
            if shapes.get(path) != found.get(path):
                raise ValueError(
                    f"{where}: parameter {jax.tree_util.keystr(path, simple=True, separator='/')} has shape "
                    f"{found.get(path, 'absent')}, this version's model of its configuration wants "
                    f"{shapes.get(path, 'none of that name')}"
                )

    def check_request(
        self, observation: Observation, plan: Sequence[str] | None, plan_visible: bool, samples: int
    ) -> tuple[str, ...] | None:
        """The plan that was given, or ValueError where the policy was not trained for what `act` is asked."""
        robots = len(observation.instruction)
        if self.config.objective.action_weight == 0:
            raise ValueError("this policy was trained with objective.action_weight=0: it has no actions")
        if plan is not None and not plan_visible:
            raise ValueError("a plan was given, but plan_visible is False; set it, or leave the plan out")
        if plan_visible and not self.sees_plans:
            raise ValueError(
                "this policy's actions were trained with objective.plan_visible=0: they see no plan"
            )
        if samples < 1:
            raise ValueError(f"samples={samples}: must be at least 1")
        return None if plan is None else check_texts("plan", plan, robots)

    def check_steering(self, guidance: float | None, running: Running | None, robots: int) -> None:
        """Raises ValueError where the policy was not trained for such guidance or continuation."""
        if guidance is not None:
            if not np.isfinite(guidance):
                raise ValueError(f"guidance={guidance}: a finite weight is expected")
            if guidance != 1 and self.config.kind == "tokens":
                raise ValueError(
                    f"guidance={guidance}: a policy that writes its actions as tokens takes none"
                )
            if guidance != 1 and not self.guides:
                raise ValueError(
                    f"guidance={guidance}: this policy was trained with objective.prompt_dropout=0, so it does not "
                    "know the null prompt; leave guidance out, or train with 0.1"
                )
        if running is None:
            return
        if self.config.kind != "flow" or self.config.process.path != "cond_ot":
            raise ValueError(
                "continuing a running chunk (rtc) needs a policy trained with process.kind=flow, process.path=cond_ot"
            )
        shape = (robots, self.horizon, len(self.bundle.schema.action_names))
        if np.shape(running.actions) != shape or not np.isfinite(running.actions).all():
            raise ValueError(
                f"running.actions is {kind(running.actions)}; finite numbers of shape {list(shape)} are expected"
            )
        trained = self.config.objective.rtc_prefix
        if running.how == "prefix" and running.delay > trained:
            raise ValueError(
                f"rtc_prefix with a delay of {running.delay} steps: the policy was trained with "
                f"objective.rtc_prefix={trained}; use rtc, or train with {running.delay} or more"
            )

    def _readable(self, observation: Observation, row: int, tokens: Int[np.ndarray, " g"]) -> str:
        """The decoded text, without as many tokens at its end as it takes to read it within the limits."""
        tokenizer, limits = self.bundle.tokenizer, self.config.data
        for length in range(len(tokens), 0, -1):
            text = tokenizer.decode(tokens[:length].tolist())
            everything, target = self.bundle.text_lengths(observation, row, text)
            if everything <= limits.max_text_tokens and target <= limits.max_target_tokens:
                return text
        return ""

    def _slices(self, robots: int) -> Iterator[tuple[range, int]]:
        """Rows of one call of the network, and the number they are padded to."""
        sizes = self.call_sizes
        for start in range(0, robots, self.batch_size):
            rows = range(start, min(start + self.batch_size, robots))
            yield rows, next(size for size in sizes if size >= len(rows))

    def batch(
        self,
        observation: Observation,
        plan: Sequence[str] | None = None,
        actions: Float[np.ndarray, "b k a"] | None = None,
    ) -> Batch:
        """What the robots see (with plans to follow, and chunks that run now) as the network's batch, on the host.

        Raises ValueError where a text does not fit or an instruction has no statistics.
        """
        batch = self.bundle.observation_batch(observation, plan, actions)
        expert, robots = self.config.model.expert, len(observation.instruction)
        real = np.arange(expert.action_dim) < len(self.bundle.schema.action_names)
        if real.all():
            return batch
        return batch.replace(action_mask=np.broadcast_to(real, (robots, expert.horizon, expert.action_dim)))

    def _piece(
        self,
        observation: Observation,
        rows: range,
        size: int,
        plan: Sequence[str] | None,
        actions: Float[np.ndarray, "b k a"] | None = None,
    ) -> Batch:
        """The batch of some robots, the last one repeated up to `size`."""
        padded = _padded(rows, size)
        plans = None if plan is None else [plan[int(row)] for row in padded]
        return self.batch(take(observation, padded), plans, None if actions is None else actions[padded])


def _padded(rows: range, size: int) -> Int[np.ndarray, " size"]:
    """The rows, the last one repeated up to `size`."""
    return np.asarray([*rows, *[rows[-1]] * (size - len(rows))])
