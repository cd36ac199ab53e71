"""What a term of the objective is: one loss, stated as a sum over elements and the number of them.

    drawn = term.draw(key, batch, process, config)      # its randomness, once for the whole batch
    n     = term.count(batch, config, drawn)            # its denominator, over the whole batch
    found = term.sums(reading, drawn)                   # its numerator, of the batch or of a part of it

The mean is sum / count. Because randomness and denominator are those of the whole batch, the shares of microbatches and
devices add up to the loss of the batch, however it is split. A term is a frozen object without parameters or state; its
options are fields of `ObjectiveConfig`, its weight λ is `objective.weights` under its name.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.flow.processes import Process
from vla_jax.objectives.config import ObjectiveConfig, Reduction
from vla_jax.types import Batch, Context, PyTree


@runtime_checkable
class Model(Protocol):
    """What the objective asks of a model: a linen module's `apply`, with the methods that `models.vla.VLA` has."""

    def apply(self, variables: Any, *args: Any, method: Any) -> Any:
        """Calls `method` (``prefill``, ``extend``, ``output_table``, ``denoise``) with the given parameters."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One pass of the backbone over a batch: all that a term may make its loss of."""

    model: Model
    params: PyTree
    process: Process
    config: ObjectiveConfig
    batch: Batch
    context: Context
    """What the backbone leaves behind for experts; its gradient is not insulated yet."""
    hidden: Float[Array, "b l d"] | None
    """Outputs at the text positions; None where the backbone has no language model."""
    insulation: float | Float[Array, ""]
    """κ, by which the action term scales what flows back through the context."""
    target_tokens: int | None = None
    """Most text targets of a sample; None: the length of the row."""
    action_targets: int | None = None
    """Most targets among a sample's action tokens; None: the length of the row."""

    def apply(self, method: str, *args: Any) -> Any:
        """A method of the model with these parameters."""
        return self.model.apply({"params": self.params}, *args, method=method)


class TermSums(NamedTuple):
    """A term's numerator and what is reported beside it. All are sums over samples, so parts of a batch add up."""

    loss: Float[Array, ""]
    reported: dict[str, Float[Array, "..."]]


class LossByTime(NamedTuple):
    """A term's loss cut by flow time: its mean over the elements of each bin, and the bin's share of all elements, so
    that the term's own mean is Σ share · mean. Scalars where a term has no time: its mean, and 1.
    """

    mean: Float[Array, "*bins"]
    share: Float[Array, "*bins"]


class Term:
    """The base of every term: what most of them have in common. `count` and `sums` are each term's own."""

    def draw(self, key: PRNGKeyArray, batch: Batch, process: Process, config: ObjectiveConfig) -> PyTree:
        """What is random in one step, arrays `[b …]`; None where nothing is. `key` is the step's: take children of it
        by `keys.named` under the term's own name."""
        return None

    def count(self, batch: Batch, config: ObjectiveConfig, drawn: PyTree) -> Float[Array, ""]:
        """How many elements of the batch have this loss."""
        raise NotImplementedError

    def sums(self, reading: Reading, drawn: PyTree) -> TermSums:
        """The loss, summed over these elements."""
        raise NotImplementedError

    def metrics(self, found: TermSums, count: Float[Array, ""]) -> dict[str, Float[Array, "..."]]:
        """What the log says of `found.reported`, under the names that the log uses. The mean loss is there already, as
        ``<name>_loss``."""
        return {}

    def scale(self, batch: Batch, config: ObjectiveConfig) -> Float[Array, ""]:
        """What turns the mean into what λ multiplies, where that is another reduction; 1 where it is the mean."""
        return jnp.ones(())

    def by_time(self, reading: Reading, drawn: PyTree, count: Float[Array, ""], bins: int) -> LossByTime:
        """The loss by `bins` of flow time, for the comparison of gradients; `count` is at least 1."""
        return LossByTime(self.sums(reading, drawn).loss / count, jnp.ones(()))


def elements_per_sample(mask: Bool[Array, "b ..."], how: Reduction) -> Float[Array, ""]:
    """1 for a mean over elements; for a sum over each sample the mean number of elements of the samples that have any.

    Like the mean itself it does not depend on the batch's size, padding or partition.
    """
    if how == "mean":
        return jnp.ones(())
    sizes = jnp.sum(mask.reshape(mask.shape[0], -1), axis=1)
    return jnp.sum(sizes) / jnp.maximum(jnp.sum(sizes > 0), 1)


def zeros_like(shapes: PyTree) -> PyTree:
    """Zeros of the shapes that `jax.eval_shape` gives."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
