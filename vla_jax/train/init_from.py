"""A new run that starts from the parameters of another one, or from converted weights (`train.init_from`).

Every array is accounted for. It is taken where name and shape are the same; it starts anew where the configuration says
why (another action or state dimension, another vocabulary, a state token, no expert in the checkpoint), where
`train.init_new` names it, or where it belongs to LoRA. All else is refused.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from vla_jax.checkpoint import load_params, read_meta
from vla_jax.checkpoint.tree import flatten
from vla_jax.config import TrainConfig, from_meta
from vla_jax.layers import lora
from vla_jax.models.config import VLAConfig
from vla_jax.train.config import LoopConfig
from vla_jax.train.patterns import choose, fits
from vla_jax.types import PyTree

CAUSES: tuple[tuple[str, str], ...] = (
    ("expert/action_in_proj/kernel", "expert.action_dim"),
    ("expert/action_out_proj/*", "expert.action_dim"),
    ("expert/state_proj/*", "expert.state_dim"),
    ("expert/state_proj/*", "expert.state_token"),
    ("backbone/llm/embedder/input_embedding", "text.vocab"),
)
"""(pattern, field of the model): arrays that may be of another shape, or missing, where the field is another."""
FREE = ("cameras", "dtype", "attention", "remat", "unroll", "expert.horizon", *(field for _, field in CAUSES))
"""Fields of the model that may differ from the checkpoint's; the others decide what its arrays mean."""
LISTED = 5


@dataclasses.dataclass(frozen=True)
class Start:
    """What a checkpoint gives to a new run."""

    arrays: dict[str, Array]
    """By path of ours."""
    said: list[str]
    """What was taken and what is new, for people."""


def model_of(path: str | Path) -> VLAConfig:
    """The checkpoint's model for other data: its sizes, action and state dimensions and horizon; cameras are left to
    the data set. Raises FileNotFoundError or ValueError."""
    source = from_meta(read_meta(path)).model
    return dataclasses.replace(source, cameras=())


def adapted(config: TrainConfig, path: str | Path) -> TrainConfig:
    """The configuration with the checkpoint's model, and what that learned of padded action dims. Where only a prompt
    can tell that model the state, and the configuration's does not, prompt and normalisation are the checkpoint's too.
    Raises as `model_of` does."""
    source, model = from_meta(read_meta(path)), model_of(path)
    data = dataclasses.replace(config.data, image_size=model.vision.image_size)
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
    meta = read_meta(path)
    source = from_meta(meta)
    wanted = {name: leaf for name, leaf in flatten(shapes).items() if not lora.is_factor(name)}
    loaded = load_params(path, shardings={name: leaf.sharding for name, leaf in wanted.items()})
    if source.lora.rank:
        loaded.params = jax.jit(lora.merge, static_argnums=1)(loaded.params, source.lora.scale)
    found = flatten(loaded.params)
    new = choose(list(wanted), config.train.init_new, "train.init_new")
    if not any(name.startswith("expert/") for name in found):
        new |= {name for name in wanted if name.startswith("expert/")}
    changed = _changes(source.model, config.model)
    _check_meaning(path, changed, without_expert=all(n in new for n in wanted if n.startswith("expert/")))
    reasons = _compare(config.train, wanted, found, new, changed)
    taken = {name: found[name] for name in wanted if name not in reasons}
    head = f"init_from {path} (step {meta['step']}, {loaded.item}): {len(taken)} arrays taken"
    horizon = changed.get("expert.horizon")
    return Start(
        taken,
        [
            f"{head}, {len(reasons)} new" + (":" if reasons else ""),
            *(f"  new: {name} {tuple(wanted[name].shape)}, {why}" for name, why in sorted(reasons.items())),
            *([f"  expert.horizon {horizon[0]} → {horizon[1]}"] if horizon else []),
        ],
    )


def _changes(source: VLAConfig, target: VLAConfig) -> dict[str, tuple[Any, Any]]:
    old, new = (flatten(dataclasses.asdict(model)) for model in (source, target))
    pairs = {name.replace("/", "."): (old.get(name), value) for name, value in new.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _check_meaning(path: str, changed: Mapping[str, tuple[Any, Any]], *, without_expert: bool) -> None:
    other = [
        f"model.{name}={new!r} (there: {old!r})"
        for name, (old, new) in changed.items()
        if name not in FREE and not (without_expert and name.startswith("expert."))
    ]
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
    changed: Mapping[str, tuple[Any, Any]],
) -> dict[str, str]:
    """Why which array is new. Raises ValueError where one does not fit for no known reason."""

    def reason(name: str) -> str | None:
        for pattern, field in CAUSES:
            if fits(name, pattern) and field in changed:
                old, value = changed[field]
                return f"{field} {old} → {value}"
        return None

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
