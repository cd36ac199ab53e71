"""The cross-entropy in pieces: its value and gradient, and at PaliGemma's vocabulary what it holds at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.objectives import cross_entropy as module
from vla_jax.objectives.cross_entropy import PIECE, cross_entropy

VOCAB = 257_152


def inputs(b, length, d, vocab, seed=0):
    rng = np.random.default_rng(seed)
    hidden, table = (rng.normal(size=shape).astype(np.float32) for shape in ((b, length, d), (vocab, d)))
    labels, valid = rng.integers(0, vocab, (b, length)), rng.random((b, length)) < 0.6
    return hidden, table, jnp.asarray(labels), jnp.asarray(valid)


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_pieces_add_up(monkeypatch, piece):
    hidden, table, labels, valid = inputs(2, 7, 4, 11)
    monkeypatch.setattr(module, "PIECE", piece * 2 * 11)

    @jax.jit
    def ours(hidden, table):
        found = cross_entropy(table, hidden, labels, valid)
        return found.loss, found.correct

    def wanted(hidden, table):
        return jnp.sum(
            optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ table.T, labels) * valid
        )

    (loss, correct), gradient = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, table)
    np.testing.assert_allclose(loss, wanted(hidden, table), rtol=1e-5)
    for found, want in zip(gradient, jax.grad(wanted, argnums=(0, 1))(hidden, table)):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert correct == np.sum(((hidden @ table.T).argmax(-1) == labels) & valid)


def avals(jaxpr):
    """Every array that a program makes, in its inner programs too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from avals(inner)


def test_memory_at_the_full_vocabulary(monkeypatch):
    """1024 targets of 257,152 tokens: 1 GiB of logits that are never there, by what XLA will allocate."""
    b, length, d = 4, 256, 8
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (
        ((b, length, d), jnp.float32), ((VOCAB, d), jnp.float32), ((b, length), jnp.int32), ((b, length), bool),
    )]  # fmt: skip

    def loss(hidden, table, labels, valid):
        return cross_entropy(table, hidden, labels, valid).loss

    def peak():
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes)
    assert max(a.size for a in avals(jaxpr.jaxpr) if VOCAB in a.shape) <= PIECE
    in_pieces = peak()
    monkeypatch.setattr(module, "PIECE", 2**40)
    at_once = peak()
    all_logits = 4 * b * length * VOCAB
    print(
        f"all logits {all_logits / 2**20:.0f} MiB, at once {at_once / 2**20:.0f}, in pieces {in_pieces / 2**20:.0f}"
    )
    assert at_once > all_logits
    assert in_pieces < 3 * 4 * PIECE < all_logits
