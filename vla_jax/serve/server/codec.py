"""Messages: msgpack with numpy arrays, as openpi's client and server write them (`msgpack_numpy` of openpi-client).

    array   {b"__ndarray__": True, b"data": C-order bytes, b"dtype": "<f4", b"shape": [2, 3]}
    scalar  {b"__npgeneric__": True, b"data": 3.0, b"dtype": "<f4"}

The keys of these maps are bytes, all others are strings. Tuples arrive as lists, decoded arrays are read-only.

Decoding is bounded, because anybody may send: containers are entered one by one and every value costs one of
`items`, so that no message takes much more memory or time than its own length. Types are looked up in a table, never
built from what was sent; nothing is unpickled or evaluated.

Needs numpy and msgpack only: robots use this file too.
"""

import math
from typing import Any

import msgpack
import numpy as np

DTYPES = {
    np.dtype(kind).str: np.dtype(kind)
    for kind in ("?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
}
"""The element types that a message may hold, by their names in it."""

MAX_DEPTH = 6
MAX_RANK = 8


def encode(message: Any) -> bytes:
    """A message as bytes. Raises TypeError, ValueError for what has no form on the wire."""
    packed: Any = msgpack.packb(message, default=_plain)
    return packed


def decode(data: bytes, *, items: int = 1024) -> Any:
    """What `encode` was given. Raises ValueError, in one line, for anything else, however it was made.

    `items` is the number of values (containers, elements and keys) that the message may hold; an array counts
    for about ten, whatever its size.
    """
    reader = msgpack.Unpacker(
        max_buffer_size=max(1, len(data)), strict_map_key=True, raw=False, ext_hook=_no_extension
    )
    try:
        reader.feed(data)
        message = _Decoder(reader, data, items).value(0)
    except msgpack.OutOfData:
        raise ValueError("the message ends too early") from None
    except ValueError as error:
        raise ValueError(str(error) or "the message is not msgpack") from None
    except (TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"the message cannot be read: {error}") from None
    if reader.tell() != len(data):
        raise ValueError(f"{len(data) - reader.tell()} bytes follow the message")
    return message


class _Decoder:
    """One message, read value by value."""

    def __init__(self, reader: msgpack.Unpacker, data: bytes, items: int):
        self._reader, self._data, self._left = reader, data, items

    def value(self, depth: int) -> Any:
        """The next value, with all that is in it."""
        self._spend(1)
        position = self._reader.tell()
        if position >= len(self._data):
            raise msgpack.OutOfData
        first = self._data[position]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            self._enter(depth)
            return self._map(self._reader.read_map_header(), depth + 1)
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            self._enter(depth)
            count = self._reader.read_array_header()
            self._spend(count)
            return [self.value(depth + 1) for _ in range(count)]
        return self._reader.unpack()

    def _map(self, count: int, depth: int) -> Any:
        self._spend(count)
        result: dict[str | bytes, Any] = {}
        for _ in range(count):
            key = self.value(depth)
            if not isinstance(key, str | bytes):
                raise ValueError(f"a key is of type {type(key).__name__}; use strings")
            if key in result:
                raise ValueError(f"the key {key[:40]!r} is there twice")
            result[key] = self.value(depth)
        if b"__ndarray__" in result:
            return _array(result)
        if b"__npgeneric__" in result:
            return _scalar(result)
        return result

    def _enter(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise ValueError(f"the message is nested more than {MAX_DEPTH} deep")

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError("the message holds too many values")


def _plain(value: Any) -> Any:
    """An array or numpy scalar as plain msgpack."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(
            f"{type(value).__name__} cannot be sent; use numpy arrays, numbers, strings, lists, dicts"
        )
    if value.dtype.str not in DTYPES:
        raise ValueError(f"arrays of type {value.dtype} cannot be sent; cast them, e.g. to float32")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _array(fields: dict) -> np.ndarray:
    dtype, data, shape = _dtype(fields), fields.get(b"data"), fields.get(b"shape")
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise ValueError("an array has no bytes or no shape")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError("an array's shape is not a list of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of {dtype}{shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(fields: dict) -> np.generic:
    dtype, data = _dtype(fields), fields.get(b"data")
    if not isinstance(data, bool | int | float):
        raise ValueError(f"a number of type {dtype} is given as {type(data).__name__}")
    return dtype.type(data)


def _dtype(fields: dict) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"arrays of type {str(name)[:20]!r} are not taken; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"msgpack extension type {code} is not taken")
