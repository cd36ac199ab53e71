"""LoRA in openpi's checkpoints (gemma_2b_lora, gemma_300m_lora), merged while the weights are read.

A matrix has two further arrays beside it. `…/q_einsum/w` has `…/q_einsum/lora_a` and `…/lora_b` (so have kv_einsum and
attn_vec_einsum); `…/mlp/linear` has `…/mlp/linear_lora_a` and `…_lora_b` (so has gating_einsum). A has the matrix's
shape with the rank as its last axis, B the rank as its last but one. What openpi computes with them:

    q, k, v, gate, up, down    W + s · A·B          of the last two axes, batched over all others
    attn_vec_einsum [n h d]    W[n] + s · A[n]·Σₘ B[m]

The output projection's product of x and A is summed over the heads before B is applied, so every head's A meets the
sum of all B. s = α / rank is 1 in both variants, and in no file; the feed-forward layers have no s at all.
"""

from collections.abc import Mapping

import numpy as np

from vla_jax.convert.entry import ArraySource, ArraySpec, Index

EINSUMS = ("q_einsum", "kv_einsum", "attn_vec_einsum")
FACTORS = ("lora_a", "lora_b")


class MergedSource:
    """Arrays of openpi with LoRA merged into them, in float32; `merged` names those that had it.

    A base that was frozen is saved in bfloat16, which a small update rounds away in: so a merged array is float32,
    unless the conversion asks for another type.
    """

    def __init__(self, source: ArraySource, where: object, scale: float):
        self._source, self._scale = source, scale
        self._factors = _factors(source.specs, where)
        self._cached: tuple[str, np.ndarray, np.ndarray] | None = None
        factors = {factor for pair in self._factors.values() for factor in pair}
        self.specs = {
            name: ArraySpec(spec.shape, np.dtype(np.float32)) if name in self._factors else spec
            for name, spec in source.specs.items()
            if name not in factors
        }

    @property
    def merged(self) -> tuple[str, ...]:
        """The matrices with LoRA."""
        return tuple(self._factors)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The part of an array. Both factors of the matrix that is being read are held."""
        piece = self._source.read(name, index)
        if name not in self._factors:
            return piece
        if self._cached is None or self._cached[0] != name:
            a, b = (self._source.read(factor).astype(np.float32) for factor in self._factors[name])
            if "attn_vec_einsum" in name:
                b = np.broadcast_to(b.sum(axis=-3, keepdims=True), b.shape)
            self._cached = name, a, b
        _, a, b = self._cached
        scale = self._scale if any(einsum in name for einsum in EINSUMS) else 1.0
        layers = index[:1]  # the first axis counts layers; what else is asked for is cut from the product
        update = np.matmul(a[layers], b[layers])
        if len(index) > 1:
            update = update[index[1:] if isinstance(index[0], int) else (slice(None), *index[1:])]
        return piece.astype(np.float32) + np.float32(scale) * update


def has_lora(names: Mapping[str, ArraySpec]) -> bool:
    """Whether a checkpoint has such arrays."""
    return any(factor in name for name in names for factor in FACTORS)


def _factors(specs: Mapping[str, ArraySpec], where: object) -> dict[str, tuple[str, str]]:
    """Matrix → its A and B; raises ValueError where one of the three is missing or of another shape."""
    found: dict[str, dict[str, str]] = {}
    for name in specs:
        for factor in FACTORS:
            if factor in name:
                matrix = name.replace(f"/{factor}", "/w").replace(f"_{factor}", "")
                found.setdefault(matrix, {})[factor] = name
    pairs = {}
    for matrix, parts in found.items():
        missing = [factor for factor in FACTORS if factor not in parts] + [matrix] * (matrix not in specs)
        if missing:
            raise ValueError(f"{where} does not fit: the LoRA of {matrix} has no {missing[0]}")
        shape, (a, b) = specs[matrix].shape, (specs[parts[factor]].shape for factor in FACTORS)
        rank = a[-1] if a else 0
        if a != (*shape[:-1], rank) or b != (*shape[:-2], rank, *shape[-1:]):
            raise ValueError(f"{where} does not fit: LoRA of shapes {a} and {b} beside {matrix} {shape}")
        pairs[matrix] = (parts["lora_a"], parts["lora_b"])
    return pairs
