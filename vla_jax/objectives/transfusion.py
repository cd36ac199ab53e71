"""The Transfusion loss L = CE(text) + λ · L(actions) (Zhou et al. 2024, arXiv:2408.11039, eq. 4).

Everything random is drawn once for the whole batch (`draw`), so that the loss of a batch does not depend on how
it is split into microbatches or over devices; the denominators (`count`) are those of the whole batch, so that
microbatch losses and gradients simply add up.

A batch may hold its chunks as FAST tokens. Beside continuous actions these are text (π0.5 with knowledge insulation,
arXiv:2505.23705: the backbone learns from them, the expert does not see them); in their place they are the actions.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.cross_entropy import cross_entropy
from vla_jax.objectives.diagnostics import TimedLosses
from vla_jax.objectives.weighting.base import Pair
from vla_jax.types import Batch, Context, Given, PyTree

TIME_BINS = 10
"""Bins of flow time in [0, 1] by which times and action losses are reported."""


class Model(Protocol):
    """What the objective asks of a model: a linen module's `apply` with these methods."""

    def apply(self, variables: PyTree, *args, method: str):
        """Methods `prefill`, `extend`, `output_table` and `denoise`, as `models.vla.VLA` has them."""


class Draws(NamedTuple):
    """What is random in one step, drawn for the whole batch; K draws per sample."""

    x_t: Float[Array, "b draws k a"]
    t: Float[Array, "b draws"]
    target: Float[Array, "b draws k a"]
    plan_visible: Bool[Array, " b"]
    prefix: Int[Array, "b draws"] | None = None
    """How many actions of each draw are clean: the beginning of a chunk that is being executed."""


class Counts(NamedTuple):
    """Valid elements of the whole batch: the denominators of the two means."""

    text: Float[Array, ""]
    action: Float[Array, ""]


class Losses(NamedTuple):
    """The loss and its parts; every field is a sum over samples of shares of the whole batch's mean."""

    total: Float[Array, ""]
    text: Float[Array, ""]
    action: Float[Array, ""]
    text_accuracy: Float[Array, ""]
    time_histogram: Float[Array, " bins"] | None
    """This and the two below: None where the actions are tokens, which have no time."""
    action_by_time: Float[Array, " bins"] | None
    """Sum of the squared or absolute error, masked, per bin of t; divide by `elements_by_time`."""
    elements_by_time: Float[Array, " bins"] | None


def draw(key: PRNGKeyArray, batch: Batch, process, config: ObjectiveConfig) -> Draws:
    """Draws times, noise and plan visibility for a batch. Masked action elements are zeros before the noise comes.

    Where the actions are tokens there is no noise to draw.
    """
    key_process, key_plan = jax.random.split(key)
    b = batch.tokens.shape[0]
    if batch.actions is None:
        nothing = jnp.zeros((b, 0))
        visible = jax.random.bernoulli(key_plan, config.plan_visible, (b,))
        return Draws(x_t=nothing, t=nothing, target=nothing, plan_visible=visible)
    draws = config.noise_draws
    clean = jnp.where(batch.action_mask, batch.actions, 0)
    corrupted = process.corrupt(key_process, jnp.repeat(clean, draws, axis=0))

    def group(x: Array) -> Array:
        return x.reshape(b, draws, *x.shape[1:])

    x_t, prefix = group(corrupted.x_t), None
    if config.rtc_prefix:
        key_prefix = jax.random.fold_in(key, 2)  # split's children are 0 and 1
        prefix = jax.random.randint(key_prefix, (b, draws), 0, config.rtc_prefix + 1)
        x_t = jnp.where(in_prefix(prefix, x_t.shape[2])[..., None], clean[:, None], x_t)
    return Draws(
        x_t=x_t,
        t=group(corrupted.t),
        target=group(corrupted.target),
        plan_visible=jax.random.bernoulli(key_plan, config.plan_visible, (b,)),
        prefix=prefix,
    )


def in_prefix(prefix: Int[Array, "*b"], horizon: int) -> Bool[Array, "*b k"]:
    """Which actions of a chunk belong to its clean prefix."""
    return jnp.arange(horizon) < prefix[..., None]


def scored(batch: Batch, config: ObjectiveConfig) -> Bool[Array, "b k a"]:
    """Which elements of a chunk have an action loss: the valid ones, with `padding_loss` all dims of valid steps."""
    if not config.padding_loss:
        return batch.action_mask
    return jnp.broadcast_to(batch.action_mask.any(axis=-1, keepdims=True), batch.action_mask.shape)


def learned(batch: Batch, config: ObjectiveConfig, draws: Draws) -> Bool[Array, "b #draws k a"]:
    """The same for each draw: none in its clean prefix."""
    mask = scored(batch, config)[:, None]
    if draws.prefix is None:
        return mask
    return mask & ~in_prefix(draws.prefix, mask.shape[2])[..., None]


def count(batch: Batch, config: ObjectiveConfig, draws: Draws | None = None) -> Counts:
    """The denominators; at least 1, so that a batch without a modality has loss 0 there.

    `draws` are needed where `rtc_prefix` makes the number of learned elements depend on them.
    """
    text = jnp.sum(text_targets(batch)).astype(jnp.float32)
    if batch.actions is None:
        action = jnp.sum(batch.action_token_loss).astype(jnp.float32)
    elif config.rtc_prefix:
        action = jnp.sum(learned(batch, config, draws)).astype(jnp.float32)
    else:
        action = jnp.sum(scored(batch, config)).astype(jnp.float32) * config.noise_draws
    return Counts(jnp.maximum(text, 1), jnp.maximum(action, 1))


def text_targets(batch: Batch) -> Bool[Array, "b l"]:
    """Which tokens are learned as text: targets, and action tokens beside continuous actions."""
    if batch.actions is None or batch.action_tokens is None:
        return batch.token_loss
    return jnp.concatenate([batch.token_loss, batch.action_token_loss], axis=1)


def reduction(batch: Batch, config: ObjectiveConfig) -> Pair:
    """What turns the means into the configured reductions: 1, or the mean number of elements of the samples
    that have any (of the whole chunk, clean prefix included). Like the means it does not depend on the batch's
    size, padding or partition."""

    def per_sample(mask: Bool[Array, "b ..."], how: str) -> Float[Array, ""]:
        if how == "mean":
            return jnp.ones(())
        sizes = jnp.sum(mask.reshape(mask.shape[0], -1), axis=1)
        return jnp.sum(sizes) / jnp.maximum(jnp.sum(sizes > 0), 1)

    return Pair(
        per_sample(text_targets(batch), config.text_reduction),
        per_sample(
            batch.action_token_loss if batch.actions is None else scored(batch, config),
            config.action_reduction,
        ),
    )


def transfusion_loss(
    model: Model,
    process,
    config: ObjectiveConfig,
    params: PyTree,
    batch: Batch,
    draws: Draws,
    counts: Counts,
    *,
    target_tokens: int | None = None,
    action_targets: int | None = None,
    weights: Pair | None = None,
    insulation: Float[Array, ""] | None = None,
) -> Losses:
    """The loss of a batch, or a microbatch's share of it.

    `target_tokens` bounds the text targets of one sample, `action_targets` those among its action tokens, so that
    logits exist for so many positions only (default: the length of the row). `weights` multiply the two means (default:
    1 and λ). A term whose weight in the configuration is zero is not computed at all. `insulation` is κ where it is
    traced (default: the configuration's).
    """
    variables = {"params": params}
    context, hidden = model.apply(variables, batch, draws.plan_visible, method="prefill")

    text = accuracy = jnp.zeros(())
    if config.text:
        text_sum, correct = all_text_loss(
            model, params, context, hidden, batch, target_tokens, action_targets
        )
        text, accuracy = text_sum / counts.text, correct / counts.text

    action = jnp.zeros(())
    histogram = by_time = elements = None if batch.actions is None else jnp.zeros((TIME_BINS,))
    if config.action_weight > 0 and batch.actions is None:
        action = action_token_loss(model, params, context, batch, action_targets)[0] / counts.action
    elif config.action_weight > 0:
        error = action_error(model, process, config, params, context, batch, draws, insulation)
        action = jnp.sum(error) / counts.action
        histogram, by_time, elements = _by_time(draws.t, error, learned(batch, config, draws))

    total = text + config.action_weight * action
    if weights is not None:
        total = weights.text * text + weights.action * action
    return Losses(total, text, action, accuracy, histogram, by_time, elements)


def timed_losses(
    model: Model,
    process,
    config: ObjectiveConfig,
    params: PyTree,
    batch: Batch,
    draws: Draws,
    *,
    bins: int,
    target_tokens: int | None = None,
    action_targets: int | None = None,
    insulation: Float[Array, ""] | None = None,
) -> TimedLosses:
    """The two means of a batch, that of the actions by bin of t: what `diagnostics.diagnose` differentiates."""
    context, hidden = model.apply({"params": params}, batch, draws.plan_visible, method="prefill")
    counts = count(batch, config, draws)
    text, _ = all_text_loss(model, params, context, hidden, batch, target_tokens, action_targets)
    error = action_error(model, process, config, params, context, batch, draws, insulation)
    member = _members(draws.t, bins)
    sums = jnp.einsum("brka,brn->n", error, member)
    valid = jnp.broadcast_to(learned(batch, config, draws), error.shape).astype(jnp.float32)
    elements = jnp.einsum("brka,brn->n", valid, member)
    return TimedLosses(text / counts.text, sums / jnp.maximum(elements, 1), elements / counts.action)


def all_text_loss(
    model: Model,
    params: PyTree,
    context: Context,
    hidden: Float[Array, "b l d"],
    batch: Batch,
    target_tokens: int | None,
    action_targets: int | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`text_loss`, and that of the action tokens where they are text: sum and how many are right."""
    total, correct = text_loss(model, params, hidden, batch, target_tokens)
    if batch.actions is None or batch.action_tokens is None:
        return total, correct
    more, more_correct = action_token_loss(model, params, context, batch, action_targets)
    return total + more, correct + more_correct


def action_token_loss(
    model: Model, params: PyTree, context: Context, batch: Batch, action_targets: int | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the cross-entropy over the action tokens, and how many are predicted right.

    They see of the prefix what an expert sees, and one another causally.
    """
    tokens, mask = batch.action_tokens[:, :-1], batch.action_token_mask[:, :-1]
    hidden = model.apply({"params": params}, context, tokens, mask, method="extend")
    return _loss_at_targets(
        model, params, hidden, batch.action_tokens, batch.action_token_loss, action_targets
    )


def text_loss(
    model: Model, params: PyTree, hidden: Float[Array, "b l d"], batch: Batch, target_tokens: int | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the cross-entropy over the target tokens, and how many are predicted right."""
    return _loss_at_targets(model, params, hidden, batch.tokens, batch.token_loss, target_tokens)


def _loss_at_targets(
    model: Model,
    params: PyTree,
    hidden: Float[Array, "b _ d"],
    tokens: Int[Array, "b l"],
    is_target: Bool[Array, "b l"],
    most: int | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The token at position i is predicted from the output at i-1. Logits are computed only there: the target
    positions of each sample, at most `most`, are gathered first; see `objectives/cross_entropy.py`."""
    length = tokens.shape[1]
    size = min(most or length, length - 1)
    positions = _first_true(is_target[:, 1:], size) + 1  # b g
    valid = jnp.take_along_axis(is_target, positions, axis=1)
    labels = jnp.take_along_axis(tokens, positions, axis=1)
    inputs = jnp.take_along_axis(hidden, positions[..., None] - 1, axis=1)
    return _cross_entropy(model, params, inputs, labels, valid)


def _cross_entropy(
    model: Model,
    params: PyTree,
    hidden: Float[Array, "b g d"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over the valid labels, and how many of them are the likeliest."""
    table = model.apply({"params": params}, method="output_table")
    return cross_entropy(table, hidden, labels, valid)


def action_error(
    model: Model,
    process,
    config: ObjectiveConfig,
    params: PyTree,
    context: Context,
    batch: Batch,
    draws: Draws,
    insulation: Float[Array, ""] | None = None,
) -> Float[Array, "b draws k a"]:
    """Elementwise loss of the expert's prediction, zero where nothing is learned. A clean prefix has t = 1."""
    if insulation is not None or config.insulation < 1:
        context = context.insulated(config.insulation if insulation is None else insulation)
    b, repeats = draws.t.shape

    def rows(x: Array) -> Array:
        return x.reshape(b * repeats, *x.shape[2:])

    t = rows(draws.t)
    if draws.prefix is not None:
        t = jnp.where(in_prefix(rows(draws.prefix), draws.x_t.shape[2]), 1.0, t[:, None])
    prediction = model.apply(
        {"params": params},
        context,
        Given.of(batch).repeat(repeats),
        rows(draws.x_t),
        t,
        method="denoise",
    )
    error = process.loss(prediction, rows(draws.target)).reshape(draws.x_t.shape)
    return jnp.where(learned(batch, config, draws), error, 0)


def _by_time(
    t: Float[Array, "b draws"], error: Float[Array, "b draws k a"], mask: Bool[Array, "b #draws k a"]
) -> tuple[Float[Array, " bins"], Float[Array, " bins"], Float[Array, " bins"]]:
    """How many draws, how much error and how many elements fall into each bin of t."""
    member = _members(t, TIME_BINS)
    elements = jnp.broadcast_to(jnp.sum(mask, axis=(2, 3)), t.shape)
    sums = jax.lax.stop_gradient(jnp.sum(error, axis=(2, 3)))
    return (
        jnp.sum(member, axis=(0, 1)),
        jnp.einsum("br,brn->n", sums, member),
        jnp.einsum("br,brn->n", elements.astype(jnp.float32), member),
    )


def _members(t: Float[Array, "b draws"], bins: int) -> Float[Array, "b draws bins"]:
    """One-hot: the bin that each t falls into, of `bins` equal ones over [0, 1]."""
    return jax.nn.one_hot(jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1), bins)


def _first_true(mask: Bool[Array, "b l"], size: int) -> Int[Array, "b g"]:
    """Positions of the first `size` True entries of each row; False entries fill what is left."""
    return jnp.argsort(~mask, axis=1, stable=True)[:, :size]
