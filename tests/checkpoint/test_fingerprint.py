"""Arrays' checksums: against a slow form of the formula, on hosts and devices, whole and in pieces; what they see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.checkpoint import fingerprint as module
from vla_jax.checkpoint.fingerprint import fingerprint, piece_sum
from vla_jax.checkpoint.plain_sum import plain_sum


def slow(words) -> int:
    """The formula with Python's integers."""
    total = 0
    for place, word in enumerate(int(w) for w in words.reshape(-1)):
        x = (word + place * 0x9E3779B9) % 2**32
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        total += x ^ (x >> 16)
    return total % 2**32


def arrays():
    rng = np.random.default_rng(0)
    return {
        "half": rng.normal(size=(3, 5, 2)).astype(jnp.bfloat16),
        "float": rng.normal(size=(4, 6)).astype(np.float32),
        "int": np.asarray([-3, 2**31 - 1], np.int32),
        "bool": np.asarray([True, False, True]),
        "byte": np.asarray([-3, 7], np.int8),
        "scalar": np.float32(-0.0),
        "none": np.zeros((0, 3), np.float32),
    }


def words(x):
    x = np.ascontiguousarray(x)
    return x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def test_against_the_slow_form_on_hosts_and_devices(monkeypatch):
    tree = arrays()
    expected = {
        name: f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}] {slow(words(x)):08x}"
        for name, x in tree.items()
    }
    assert fingerprint(tree) == fingerprint(jax.tree.map(jnp.asarray, tree)) == expected
    monkeypatch.setattr(module, "lies_on_the_host", lambda leaf: False)  # as on accelerators
    assert fingerprint(jax.tree.map(jnp.asarray, tree)) == expected


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 5, 2), (2, 3, 1, 4)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
def test_pieces_add_up_however_an_array_is_cut(shape, dtype):
    x = np.random.default_rng(1).normal(size=shape).astype(dtype)
    whole = piece_sum(shape, (), x)
    for cuts in itertools.product((1, 2, 3), repeat=len(shape)):
        edges = [np.linspace(0, size, n + 1).astype(int) for size, n in zip(shape, cuts)]
        total = 0
        for place in itertools.product(*(range(n) for n in cuts)):
            index = tuple(slice(int(e[i]), int(e[i + 1])) for e, i in zip(edges, place))
            total += piece_sum(shape, index, x[index])
        assert total % 2**32 == whole, cuts
    layers = sum(piece_sum(shape, (i,), x[i]) for i in range(shape[0]))  # an integer takes its axis away
    assert layers % 2**32 == whole


def test_large_arrays_are_cut_into_the_same_blocks(monkeypatch):
    x = np.random.default_rng(2).normal(size=(37, 41)).astype(np.float32)
    whole = piece_sum(x.shape, (), x)
    for block, task in ((8, 16), (64, 100), (50, 1000)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "THREAD_WORDS", task)
        assert piece_sum(x.shape, (), x) == whole == slow(words(x))


def test_exchanges_and_pairs_of_signs_are_seen():
    """A plain sum sees neither; one weighted by odd numbers would not see two flipped signs."""
    x = np.random.default_rng(3).normal(size=4096).astype(np.float32)
    exchanged = x.copy()
    exchanged[:1024], exchanged[2048:3072] = x[2048:3072], x[:1024]  # 4 KiB
    signs = x.copy()
    signs[[5, 1700]] *= -1
    for changed in (exchanged, signs):
        assert plain_sum({"x": changed}) == plain_sum({"x": x})
        assert fingerprint({"x": changed}) != fingerprint({"x": x})
    rng = np.random.default_rng(4)
    seen = {piece_sum(x.shape, (), x)}
    for i in range(300):
        pair = x.copy()
        pair[rng.choice(4096, 2, replace=False)] *= -1
        seen.add(piece_sum(x.shape, (), pair))
        assert len(seen) == i + 2


def test_names_types_and_shapes_count():
    x = np.arange(6, dtype=np.float32)
    found = [
        fingerprint({"a": x}),
        fingerprint({"b": x}),
        fingerprint({"a": x.reshape(2, 3)}),
        fingerprint({"a": x.view(np.int32)}),
    ]
    assert all(one != other for one, other in itertools.combinations(found, 2))


def test_plain_sums_of_older_checkpoints():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    h = np.asarray([1.5, -2], jnp.bfloat16)
    total = 0
    for leaf in (x.view(np.uint32), h.view(np.uint16), np.asarray([3, 4], np.uint32)):
        total = (total * 31 + int(leaf.astype(np.uint64).sum())) % 2**32
    assert plain_sum({"a": jnp.asarray(x), "b": jnp.asarray(h), "c": jnp.asarray([3, 4])}) == total
