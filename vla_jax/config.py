"""The whole of an experiment in one frozen dataclass, composed of every package's own."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vla_jax.data.augment import AugmentConfig
from vla_jax.data.config import DataConfig
from vla_jax.data.prompt_forms import PromptForm
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.config import check as check_solver
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.base import ExpertConfig
from vla_jax.models.kinds import TABLES, class_of
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.terms import check_terms
from vla_jax.sharding.config import MeshConfig
from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig

PUBLIC_EXPERTS = ("openpi", "lerobot", "pi0_hf")
"""Formats of `convert` whose weights have an action expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; `configs/*.py` hold values of it, the command line overrides any field."""

    seed: int = 0
    """Seed of parameters, data order and noise."""
    model: VLAConfig = VLAConfig()
    process: ProcessConfig = ProcessConfig()
    solver: SolverConfig = SolverConfig()
    """How policies sample unless told otherwise."""
    execute: int | None = None
    """Actions of a chunk that robots run before the next prediction, unless told otherwise; None: a quarter of the
    chunk. Looking again sooner follows what happens more closely, and predicts more often."""
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_terms(self.objective)
        if not self.model.backbone.has_text:
            self._check_no_text()
        if self.kind == "tokens":
            unused = {
                "process": self.process != ProcessConfig(),
                "objective.insulation": self.objective.insulation != 1,
                "objective.diagnostics.every": self.objective.diagnostics.every != 0,
            }
            for name, given in unused.items():
                if given:
                    raise ValueError(
                        f"model.expert.kind=tokens has no noise and no expert, so {name} would do nothing; leave it out"
                    )
        elif self.data.action_tokens and not self.objective.text:
            raise ValueError(
                "data.action_tokens are learned as text; set objective.text=True, or leave them out"
            )
        elif self.objective.padding_loss and self.model.expert.padding == "zero":
            raise ValueError(
                "objective.padding_loss=True: with model.expert.padding=zero the network does not see the noise that "
                "it would have to predict; use objective.padding_loss=False, or model.expert.padding=noise"
            )
        if self.kind != "tokens":
            check_solver(self.process, self.solver)
        self._check_state()
        prefix, horizon = self.objective.rtc_prefix, self.model.expert.horizon
        if self.execute is not None and not 1 <= self.execute <= horizon:
            raise ValueError(
                f"execute={self.execute}: chunks have {horizon} actions; use 1 to {horizon}, or None"
            )
        if prefix and self.kind != "flow":
            raise ValueError(
                f"objective.rtc_prefix={prefix} needs process.kind=flow, not {self.kind}: "
                "only there is a clean action an input at t = 1"
            )
        if prefix >= horizon:
            raise ValueError(
                f"objective.rtc_prefix={prefix} leaves nothing of chunks of {horizon} actions; use less than that"
            )

    def _check_no_text(self) -> None:
        """Options that would do nothing where nobody reads or writes text."""
        for name, needed in {"text": False, "prompt_dropout": 0.0}.items():
            if (given := getattr(self.objective, name)) != needed:
                raise ValueError(
                    f"model.backbone.kind={self.model.backbone.kind} has no language model, so "
                    f"objective.{name}={given} has no text to learn from; use objective.{name}={needed}"
                )

    def _check_state(self) -> None:
        """A state that reaches the network nowhere is hardly meant, and no loss would show it."""
        has_text = self.model.backbone.has_text
        told = self.model.reads_state or (has_text and self.data.prompt_form.uses_state)
        if told and self.data.ignore_state:
            raise ValueError(
                "data.ignore_state=True would do nothing: the model has a state token, or the prompt holds the state"
            )
        if not told and not self.data.ignore_state:
            if not has_text:
                raise ValueError(
                    "nothing tells the policy the robot's state; use model.expert.state_token=True, "
                    "model.backbone.state_token=True, or data.ignore_state=True for a policy that does not know it"
                )
            part = "kind=tokens" if self.kind == "tokens" else "state_token=False"
            raise ValueError(
                f"with model.expert.{part} only the prompt can hold the robot's state, and data.prompt="
                f"{self.data.prompt} leaves it out; use data.prompt={prompt_form(self.model)} with "
                "data.normalization=quantile, or data.ignore_state=True for a policy that does not know its state"
            )

    @property
    def kind(self) -> str:
        """How actions are predicted: as tokens, or what the process is."""
        return self.process.kind if self.model.expert.is_network else "tokens"

    @property
    def executed(self) -> int:
        """`execute`, or what stands for None."""
        return max(1, self.model.expert.horizon // 4) if self.execute is None else self.execute

    @property
    def chunk_tokens(self) -> Literal["none", "beside", "instead"]:
        """Whether batches hold chunks as FAST tokens, beside the continuous actions or instead of them."""
        if self.kind == "tokens":
            return "instead"
        return "beside" if self.data.action_tokens else "none"

    @property
    def padded_chunk(self) -> int:
        """Tokens of a chunk's row in a batch of a resolved configuration; 0 where chunks do not become tokens."""
        return self.data.fast.max_tokens if self.chunk_tokens != "none" else 0

    def resolve(
        self,
        *,
        cameras: tuple[str, ...],
        state_dim: int,
        action_dim: int,
        vocab: int,
        chunk_tokens: int = 0,
        chunk_targets: int = 0,
    ) -> "TrainConfig":
        """Fills in what was left to the data set or follows from the rest, and refuses sizes that cannot hold it."""
        backbone, expert = self.model.backbone, self.model.expert
        missing = [name for name in self.model.cameras if name not in cameras]
        if missing:
            raise ValueError(
                f"model.cameras names '{missing[0]}', but the data set {self.data.path} has {', '.join(cameras)}"
            )
        sizes = {
            "model.expert.action_dim": (expert.action_dim, action_dim, "the data set's action dimensions"),
            "model.expert.state_dim": (expert.state_dim, state_dim, "the data set's state dimensions"),
        }
        if backbone.has_text:
            what = "the tokenizer's entries (with action tokens)"
            sizes |= {f"model.{name}": (given, vocab, what) for name, given in backbone.unknown().items()}
        for name, (given, needed, what) in sizes.items():
            if given and given < needed:
                raise ValueError(f"{name}={given} is smaller than {what}, {needed}; use {name}=0 or more")
        model = dataclasses.replace(
            self.model,
            cameras=(self.model.cameras or cameras) if backbone.reads_images else (),
            backbone=backbone.with_vocab(backbone.vocab or vocab),
            expert=dataclasses.replace(
                expert, action_dim=expert.action_dim or action_dim, state_dim=expert.state_dim or state_dim
            ),
        )
        data = self.data
        if chunk_tokens:
            given = data.fast.max_targets
            if given and given < chunk_targets:
                raise ValueError(
                    f"data.fast.max_targets={given} is smaller than the data set's rows have targets, "
                    f"{chunk_targets}; use data.fast.max_targets=0 or more"
                )
            fast = dataclasses.replace(data.fast, max_tokens=chunk_tokens, max_targets=given or chunk_targets)
            data = dataclasses.replace(data, fast=fast)
        objective = self.objective
        if self.kind in ("regression", "tokens"):  # without noise all draws would be copies of one
            objective = dataclasses.replace(objective, noise_draws=1)
        if not backbone.has_text:  # there is no plan to see
            objective = dataclasses.replace(objective, plan_visible=0.0)
        return dataclasses.replace(self, model=model, data=data, objective=objective)


def prompt_form(model: VLAConfig) -> PromptForm:
    """The prompt of the public model that is built like this one: π0-FAST, π0.5 or π0."""
    if not model.expert.is_network:
        return "fast"
    return "pi0" if model.reads_state else "pi05"


def to_json(config: TrainConfig) -> str:
    """The configuration as JSON, the form that is saved."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> TrainConfig:
    """The inverse of `to_json`. Raises ValueError on a field that this version does not have."""
    return _build(TrainConfig, upgraded(json.loads(text)), "")


def from_meta(meta: Mapping[str, Any]) -> TrainConfig:
    """The configuration in a checkpoint's metadata. Raises ValueError as `from_json` does.

    A public π0 that was converted before `model.expert.padding` was saved has no such field: it is `noise` like every
    other (`PUBLIC_EXPERTS`), whereas runs of that age were trained with the default.
    """
    config = from_json(json.dumps(meta["config"]))
    saved = meta["config"].get("model", {}).get("expert", {})
    converted = meta.get("converted", {}).get("from") in PUBLIC_EXPERTS
    if converted and "padding" not in saved and config.model.expert.is_network:
        expert = dataclasses.replace(config.model.expert, padding="noise")
        objective = dataclasses.replace(config.objective, padding_loss=True)
        model = dataclasses.replace(config.model, expert=expert)
        config = dataclasses.replace(config, model=model, objective=objective)
    return config


def config_hash(config: TrainConfig) -> str:
    """A short fingerprint of everything in a configuration."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:12]


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before backbones had kinds: its model was a PaliGemma, and its one kind of expert's
    configuration had fields that an expert without a network did not use."""
    model = config.get("model", {})
    if not {"vision", "text"} & model.keys():
        return config
    model = dict(model)
    backbone = {"kind": "paligemma"} | {part: model.pop(part) for part in ("vision", "text") if part in model}
    expert = dict(model.get("expert", {}))
    expert.setdefault("kind", "joint")
    known = {
        field.name for field in dataclasses.fields(class_of(ExpertConfig, expert["kind"], "model.expert"))
    }
    if expert["kind"] == "tokens":
        expert = {name: value for name, value in expert.items() if name in known}
    return {**config, "model": {**model, "backbone": backbone, "expert": expert}}


def _build(kind: Any, value: Any, where: str) -> Any:
    """Rebuilds frozen dataclasses and tuples from what JSON keeps of them."""
    if kind in TABLES and isinstance(value, dict):
        kind = class_of(kind, value.get("kind", ""), where.removesuffix("."))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next((k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)), kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(
                f"the configuration has a field '{where}{unknown[0]}' that this version does not know"
            )
        return kind(**{name: _build(hints[name], v, f"{where}{name}.") for name, v in value.items()})
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
