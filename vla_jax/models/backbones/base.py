"""What every backbone has: a configuration that says what the network reads and leaves behind, and a module.

A new backbone is one file with both, and one line in `BACKBONES`.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol, Self

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from vla_jax.models.compute import Compute
from vla_jax.types import Batch, Context


class Heads(NamedTuple):
    """Sizes of the keys and values that a backbone leaves behind."""

    depth: int
    """Layers."""
    heads: int
    """Query heads of a layer."""
    kv_heads: int
    head_dim: int


class Backbone(Protocol):
    """The module: reads what a robot sees and is told, once."""

    def prefill(
        self, batch: Batch, plan_visible: Bool[Array, " b"] | None = None
    ) -> tuple[Context, Float[Array, "b l d"] | None]:
        """The context that experts see, and the outputs at the text's positions where there is a language model.

        `plan_visible`: for which samples the context shows the text target too (default: none). A batch may have
        several times as many texts as images (guidance): the first of every sample, then the second.
        """
        ...

    def encode_images(self, batch: Batch) -> Float[Array, "b p d"]:
        """Tokens of all cameras' images: the first part of `prefill`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What the rest of the library asks of a backbone's configuration; `kind` is its name in `BACKBONES`."""

    kind: str = ""

    offers: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Context` that it can leave: kv, features."""
    tables: ClassVar[tuple[str, ...]] = ()
    """Paths under ``backbone/`` of tables that are looked up, and multiplied with, in the network's type."""
    sized_by: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(pattern of parameter paths under ``backbone/``, field): arrays whose shape follows the data set or an option."""
    has_text: ClassVar[bool] = False
    """Whether it has a language model: reads and writes text (`logits`, `decode`, `extend`)."""

    @property
    def reads_images(self) -> bool:
        """Whether it looks at the cameras."""
        return True

    @property
    def reads_state(self) -> bool:
        """Whether it is given the robot's state itself, and not only by the prompt."""
        return False

    @property
    def image_size(self) -> int:
        """Height and width of the images that it takes, in pixels."""
        raise NotImplementedError

    @property
    def image_tokens(self) -> int:
        """Tokens of the prefix that one camera's image becomes."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of its outputs and features."""
        raise NotImplementedError

    @property
    def heads(self) -> Heads | None:
        """Sizes of the keys and values that it leaves; None where it leaves none."""
        return None

    @property
    def vocab(self) -> int:
        """Tokens that it knows; 0 where it reads no text, or where the data set is to decide."""
        return 0

    def with_vocab(self, vocab: int) -> Self:
        """The same for so many tokens."""
        del vocab
        return self

    def unknown(self) -> dict[str, int]:
        """Sizes that may be left to the data set, by option; 0: still unknown."""
        return {}

    def check(self, compute: Compute) -> None:
        """Raises ValueError where it cannot be computed so."""

    def make(self, cameras: tuple[str, ...], compute: Compute, leaves: frozenset[str]) -> nn.Module:
        """The module, whose contexts have the fields `leaves`."""
        raise NotImplementedError
