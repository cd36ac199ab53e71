"""The wire format, byte by byte against openpi-client's, and what hostile bytes may not do."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from vla_jax.serve.server.codec import DTYPES, decode, encode

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=9),
    hnp.arrays(st.sampled_from([*DTYPES.values()]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
)  # fmt: skip
MESSAGES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return (
            type(other) is type(one)
            and one.dtype == other.dtype
            and np.array_equal(one, other, equal_nan=True)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@hypothesis.given(MESSAGES.filter(lambda message: depth(message) < 4))
@hypothesis.settings(deadline=None, max_examples=150)
def test_messages_survive(message):
    assert same(decode(encode({"m": message})), {"m": message})


def test_bytes_are_those_of_openpi_client():
    array = encode(np.array(3, np.float32))
    assert array.hex(" ") == (
        "84 c4 0b 5f 5f 6e 64 61 72 72 61 79 5f 5f c3 c4 04 64 61 74 61 c4 04 00 00 40 40 "
        "c4 05 64 74 79 70 65 a3 3c 66 34 c4 05 73 68 61 70 65 90"
    )
    scalar = encode(np.float32(3))
    assert scalar.hex(" ") == (
        "83 c4 0d 5f 5f 6e 70 67 65 6e 65 72 69 63 5f 5f c3 c4 04 64 61 74 61 cb 40 08 00 00 00 00 00 00 "
        "c4 05 64 74 79 70 65 a3 3c 66 34"
    )
    assert encode({}) == b"\x80"


def test_scalars_keep_their_type_and_tuples_become_lists():
    found = decode(encode({"a": np.float16(1.5), "b": np.int64(-3), "c": (1, 2), "d": np.bool_(True)}))
    assert [type(v) for v in found.values()] == [np.float16, np.int64, list, np.bool_]
    assert not decode(encode(np.zeros(3))).flags.writeable


@pytest.mark.parametrize(
    "bad",
    [np.array([object()]), np.zeros(2, np.complex64), np.zeros(2, ">f4"), np.array(["a"]), object(), {1}],
)
def test_what_has_no_form_is_not_sent(bad):
    with pytest.raises((TypeError, ValueError), match="cannot be sent"):
        encode({"x": bad})


def array(**changes) -> dict:
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return {key.encode(): value for key, value in fields.items()}


HOSTILE = {
    "nothing": b"",
    "never used": b"\xc1",
    "truncated": encode({"a": np.zeros(9)})[:-5],
    "trailing": encode({"a": 1}) + b"\x00",
    "a list of 4 G": b"\xdd\xff\xff\xff\xff",
    "a map of 4 G": b"\xdf\xff\xff\xff\xff",
    "bytes of 4 G": b"\xc6\xff\xff\xff\xff",
    "deep lists": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 100_000,
    "lists of lists of 4 G": b"\xdd\x00\x0f\xff\xff" * 1000,
    "many empty maps": b"\xdd\x00\x00\xff\xff" + b"\x80" * 65_535,
    "many empty maps in small lists": b"\x9f" + (b"\x9f" + (b"\x9f" + b"\x80" * 15) * 15) * 15,
    "an extension": msgpack.packb(msgpack.ExtType(5, b"boo")),
    "keys that are numbers": msgpack.packb({1: 2}),
    "keys that are lists": b"\x81\x90\x01",
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "not utf-8": b"\xa2\xff\xff",
    "objects": msgpack.packb(array(dtype="|O")),
    "records": msgpack.packb(array(dtype="f4,f4")),
    "long strings": msgpack.packb(array(dtype="<U1000000000")),
    "a dtype that is none": msgpack.packb(array(dtype=3)),
    "too few bytes": msgpack.packb(array(shape=[3])),
    "a huge shape": msgpack.packb(array(shape=[2**31 - 1] * 8)),
    "a shape that overflows": msgpack.packb(array(shape=[2**32, 2**32], data=b"")),
    "a negative shape": msgpack.packb(array(shape=[-2, -1])),
    "a shape of floats": msgpack.packb(array(shape=[2.0])),
    "a shape of booleans": msgpack.packb(array(shape=[True, 2])),
    "a shape of many dims": msgpack.packb(array(shape=[1] * 40 + [2])),
    "text for bytes": msgpack.packb(array(data="12345678")),
    "no bytes": msgpack.packb({b"__ndarray__": True}),
    "a scalar that overflows": msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
    "a scalar of text": msgpack.packb({b"__npgeneric__": True, b"data": "3", b"dtype": "<f4"}),
    "pickle": b"\x80\x04\x95",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_in_one_line_and_little_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            decode(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@hypothesis.given(
    st.binary(max_size=60) | st.builds(lambda m, n: encode(m)[: n % 50], MESSAGES, st.integers(0, 99))
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_any_bytes_are_a_message_or_a_value_error(data):
    try:
        message = decode(data)
    except ValueError:
        return
    assert encode(decode(encode(message))) == encode(message)


def test_client_needs_no_jax():
    code = "import vla_jax.serve.client, sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    root = Path(__file__).parents[3]
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    found = set(json.loads(loaded.stdout))
    assert {"numpy", "msgpack", "websockets"} <= found
    assert not {"jax", "flax", "transformers", "tokenizers", "prometheus_client", "orbax"} & found
