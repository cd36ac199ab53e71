"""No expert: the backbone's decoder writes the chunk as FAST tokens, one by one (π0-FAST, arXiv:2501.09747)."""

import dataclasses
from typing import ClassVar, Literal

from vla_jax.models.experts.base import ExpertConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig(ExpertConfig):
    """Sizes of the chunks; `models.action_tokens` writes them."""

    kind: Literal["tokens"] = "tokens"
    """Which expert; the others have options of their own."""

    reads: ClassVar[frozenset[str]] = frozenset({"kv"})
    is_network: ClassVar[bool] = False

    @property
    def reads_state(self) -> bool:
        """Only the prompt tells it."""
        return False

    @property
    def tokens(self) -> int:
        """None: there is nothing to evaluate."""
        return 0
