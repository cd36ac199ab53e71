"""A new run that starts from the parameters of another one, or from converted weights (`train.init_from`).

Every array is accounted for. It is taken where name and shape are the same; it starts anew where the configuration says
why (another action or state dimension, another vocabulary, a state token, no expert in the checkpoint), where
`train.init_new` names it, or where it belongs to LoRA. All else is refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vla_jax.checkpoint import Saved, open_newest
from vla_jax.checkpoint.read import Loaded
from vla_jax.checkpoint.tree import flatten
from vla_jax.config import TrainConfig, from_meta
from vla_jax.layers import lora
from vla_jax.models.compute import Compute
from vla_jax.models.config import VLAConfig
from vla_jax.train.config import LoopConfig
from vla_jax.train.patterns import choose, fits
from vla_jax.types import PyTree

FREE = ("cameras", "expert.horizon", *(field.name for field in dataclasses.fields(Compute)))
"""Fields of the model that may differ from the checkpoint's, besides those that its `sized_by` names; the others decide
what its arrays mean."""
LISTED = 5


@dataclasses.dataclass(frozen=True)
class Start:
    """What a checkpoint gives to a new run."""

    arrays: dict[str, Array]
    """Path in the new model → array."""
    said: list[str]
    """What was taken and what is new, for people."""


def model_of(path: str | Path) -> VLAConfig:
    """The checkpoint's model for other data: its sizes, action and state dimensions and horizon; cameras are left to
    the data set. Raises FileNotFoundError or ValueError."""
    return dataclasses.replace(_config_of(path).model, cameras=())


def adapted(config: TrainConfig, path: str | Path) -> TrainConfig:
    """The configuration with the checkpoint's model, and what that learned of padded action dims. Where only a prompt
    can tell that model the state, and the configuration's does not, prompt and normalisation are the checkpoint's too.
    Raises as `model_of` does."""
    source = _config_of(path)
    model = dataclasses.replace(source.model, cameras=())
    data = dataclasses.replace(config.data, image_size=model.backbone.image_size)
    if not (model.expert.reads_state or data.prompt_form.uses_state or data.ignore_state):
        data = dataclasses.replace(
            data,
            prompt=source.data.prompt,
            prompt_clip_state=source.data.prompt_clip_state,
            prompt_state_dim=source.data.prompt_state_dim,
            ignore_state=source.data.ignore_state,
            normalization=source.data.normalization,
            max_text_tokens=max(data.max_text_tokens, source.data.max_text_tokens),
        )
    loop = dataclasses.replace(config.train, init_from=str(path))
    objective = dataclasses.replace(config.objective, padding_loss=source.objective.padding_loss)
    return dataclasses.replace(config, model=model, data=data, objective=objective, train=loop)


def read_start(config: TrainConfig, shapes: PyTree) -> Start:
    """Reads what `config.train.init_from` has for the parameters `shapes` (`jax.ShapeDtypeStruct` with shardings).

    Every array goes straight to its place on the devices. Raises FileNotFoundError or ValueError, in one line.
    """
    path = config.train.init_from
    wanted = _wanted(shapes)
    shardings = {name: leaf.sharding for name, leaf in wanted.items()}

    def read(saved: Saved) -> tuple[int, TrainConfig, Loaded]:
        return saved.step, _config(saved), saved.params(shardings=shardings)

    step, source, loaded = open_newest(path, read)
    said = []
    if source.lora.rank:
        merged = jax.jit(lora.merge, static_argnums=1)(loaded.params, source.lora.scale)
        said = _rounding(loaded.params, merged, config)
        loaded.params = merged
    reasons, lines = _plan(config, source, wanted, loaded, step)
    found = flatten(loaded.params)
    return Start({name: found[name] for name in wanted if name not in reasons}, lines + said)


def check_start(config: TrainConfig, shapes: PyTree) -> list[str]:
    """What `read_start` would say, from names and shapes alone. Raises as it does."""

    def read(saved: Saved) -> tuple[int, TrainConfig, Loaded]:
        return saved.step, _config(saved), saved.params_shapes()

    step, source, loaded = open_newest(config.train.init_from, read)
    loaded.params = {name: leaf for name, leaf in flatten(loaded.params).items() if not lora.is_factor(name)}
    return _plan(config, source, _wanted(shapes), loaded, step)[1]


def _wanted(shapes: PyTree) -> dict[str, Any]:
    return {name: leaf for name, leaf in flatten(shapes).items() if not lora.is_factor(name)}


def _plan(
    config: TrainConfig, source: TrainConfig, wanted: Mapping[str, Any], loaded: Loaded, step: int
) -> tuple[dict[str, str], list[str]]:
    """Which arrays start anew and why, and what there is to say."""
    path, found = config.train.init_from, flatten(loaded.params)
    new = choose(list(wanted), config.train.init_new, "train.init_new")
    if not any(name.startswith("expert/") for name in found):
        new |= {name for name in wanted if name.startswith("expert/")}
    changed = _changes(source.model, config.model)
    causes = config.model.sized_by
    free = {*FREE, *(field for _, field in causes)}
    if all(n in new for n in wanted if n.startswith("expert/")):
        free |= {name for name in changed if name.startswith("expert.")}
    _check_meaning(path, {name: pair for name, pair in changed.items() if name not in free})
    explained = [(p, f"{f} {changed[f][0]} → {changed[f][1]}") for p, f in causes if f in changed]
    reasons = _compare(config.train, wanted, found, new, explained)
    head = f"init_from {path} (step {step}, {loaded.item}): {len(wanted) - len(reasons)} arrays taken"
    horizon = changed.get("expert.horizon")
    return reasons, [
        f"{head}, {len(reasons)} new" + (":" if reasons else ""),
        *(f"  new: {name} {tuple(wanted[name].shape)}, {why}" for name, why in sorted(reasons.items())),
        *([f"  expert.horizon {horizon[0]} → {horizon[1]}"] if horizon else []),
    ]


def _rounding(apart: PyTree, merged: PyTree, config: TrainConfig) -> list[str]:
    """What is lost of the checkpoint's LoRA where its merged matrices are rounded to bfloat16."""
    if "bfloat16" not in (config.model.dtype, config.optim.frozen_dtype):
        return []
    base, whole = flatten(apart), flatten(merged)
    names = [name for name in whole if f"{name}{lora.SUFFIX}/a" in base]

    def squares(base: list[Array], whole: list[Array]) -> tuple[Array, Array]:
        lost = size = jnp.zeros(())
        for w, sum_ in zip(base, whole):
            effect = sum_ - w.astype(jnp.float32)
            rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (sum_, w)]
            lost += jnp.sum(jnp.square(rounded[0] - rounded[1] - effect))
            size += jnp.sum(jnp.square(effect))
        return lost, size

    lost, size = jax.jit(squares)([base[name] for name in names], [whole[name] for name in names])
    return [
        f"  LoRA of {len(names)} matrices is merged: rounded to bfloat16, what it adds to them is off by "
        f"{float(jnp.sqrt(lost / jnp.maximum(size, 1e-30))):.0%}; going on in that run, or --model.dtype float32 with "
        "optim.frozen_dtype=float32, loses nothing"
    ]


def _config_of(path: str | Path) -> TrainConfig:
    return open_newest(path, _config)


def _config(saved: Saved) -> TrainConfig:
    return saved.built("configuration", lambda: from_meta(saved.meta))


def _changes(source: VLAConfig, target: VLAConfig) -> dict[str, tuple[Any, Any]]:
    old, new = (flatten(dataclasses.asdict(model)) for model in (source, target))
    pairs = {name.replace("/", "."): (old.get(name), value) for name, value in new.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _check_meaning(path: str, changed: Mapping[str, tuple[Any, Any]]) -> None:
    other = [f"model.{name}={new!r} (there: {old!r})" for name, (old, new) in changed.items()]
    if other:
        raise ValueError(
            f"train.init_from={path} is of another model: {', '.join(other[:LISTED])}; --init-from {path} takes "
            "the model from there, train.init_new names what is to start anew"
        )


def _compare(
    loop: LoopConfig,
    wanted: Mapping[str, Any],
    found: Mapping[str, Array],
    new: frozenset[str],
    explained: Sequence[tuple[str, str]],
) -> dict[str, str]:
    """Why which array is new. Raises ValueError where one does not fit and no pattern of `explained` says why."""

    def reason(name: str) -> str | None:
        return next((why for pattern, why in explained if fits(name, pattern)), None)

    reasons, problems = {}, []
    for name, leaf in wanted.items():
        there = found.get(name)
        if name in new:
            named = there is not None
            reasons[name] = "named by train.init_new" if named else "not in the checkpoint"
        elif there is None or there.shape != leaf.shape:
            why = reason(name)
            has = "missing" if there is None else f"of shape {there.shape}"
            if why is None:
                problems.append(f"{name} is {has}, {tuple(leaf.shape)} is wanted")
            else:
                reasons[name] = why
    no_expert = not any(name.startswith("expert/") for name in wanted)
    for name in found.keys() - wanted.keys():
        if no_expert and name.startswith("expert/"):  # the decoder writes the actions
            continue
        if reason(name) is None and not any(fits(name, pattern) for pattern in loop.init_new):
            problems.append(f"{name} has no place in this model")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(
            f"train.init_from={loop.init_from} does not fit: {'; '.join(sorted(problems)[:LISTED])}{more}; "
            "train.init_new names what is to start anew"
        )
    return reasons
