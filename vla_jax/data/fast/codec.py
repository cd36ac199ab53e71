"""Chunks to FAST tokens and back (arXiv:2501.09747, §V, algorithm 1).

    coefficients = round(scale · DCT(actions))      over the horizon, orthonormal, each action dimension by itself
    text         = chr(coefficient - min_token)     lowest frequency of all dimensions first, then the next one
    tokens       = BPE(text)

The transform is orthonormal, so the squared error of a chunk is that of its coefficients: at most k·a·(½/scale)²,
unless a coefficient lies beyond the alphabet and is clipped.

Files are those of physical-intelligence/fast: `processor_config.json` (scale, min_token, vocab_size, time_horizon,
action_dim) and `tokenizer.json`. Its BPE works on bytes, two of which make most coefficients, so that a sequence may
hold half a coefficient; a BPE trained here works on whole ones.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float, Int
from scipy import fft

_FILES = ("tokenizer.json", "processor_config.json")
MOST_CHARACTERS = 0xD800
"""Coefficients are written as the characters from 0 on; from U+D800 on lie the surrogates, which no text may hold."""
_LARGEST = 2.0**62
"""Largest coefficient: beyond it an int64 overflows."""


class Decoded(NamedTuple):
    """A chunk, and whether its tokens were not exactly one."""

    actions: Float[np.ndarray, "k a"]
    malformed: bool


class FastTokenizer:
    """Normalised action chunks to token ids and back. It pickles, and travels in a checkpoint as `to_files()`."""

    def __init__(self, files: Mapping[str, str]):
        missing = [name for name in _FILES if name not in files]
        if missing:
            raise ValueError(f"FAST tokenizer files lack {missing}")
        self._files = {name: files[name] for name in _FILES}
        settings = json.loads(files["processor_config.json"])
        try:
            self.scale, self.min_token = float(settings["scale"]), int(settings["min_token"])
            sizes = [settings.get(name) for name in ("time_horizon", "action_dim")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"processor_config.json of a FAST tokenizer lacks {error}") from None
        if not (
            math.isfinite(self.scale) and all(x is None or (isinstance(x, int) and x > 0) for x in sizes)
        ):
            raise ValueError(f"processor_config.json of a FAST tokenizer: scale {self.scale}, sizes {sizes}")
        self.horizon: int | None = sizes[0]
        self.action_dim: int | None = sizes[1]
        try:
            self._bpe = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # the library has no type of its own
            raise ValueError(f"tokenizer.json is no tokenizer: {str(error)[:200]}") from None
        pre_tokenizer = json.loads(files["tokenizer.json"]).get("pre_tokenizer") or {}
        self._pieces = _pieces(self._bpe, by_bytes=pre_tokenizer.get("type") == "ByteLevel")
        texts = [_text(piece) for piece in self._pieces]
        whole = not any(broken for _, broken in texts)
        self.lengths: Int[np.ndarray, " vocab"] | None = None
        """How many coefficients each token stands for; None where tokens hold pieces of coefficients."""
        if whole:
            self.lengths = np.asarray([len(text) for text, _ in texts], np.int32)
        largest = max((ord(text) for text, _ in texts if len(text) == 1), default=0) if whole else 0x7FF
        self.max_token = self.min_token + largest
        """The largest coefficient that can be written: of the alphabet, or what two bytes hold."""

    def __getstate__(self) -> dict[str, str]:
        return self._files

    def __setstate__(self, files: dict[str, str]) -> None:
        self.__init__(files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FastTokenizer) and self._files == other._files

    def __hash__(self) -> int:
        return hash(self._files["tokenizer.json"])

    @property
    def vocab_size(self) -> int:
        """Number of ids: 0 … vocab_size - 1."""
        return len(self._pieces)

    def quantize(self, actions: Float[np.ndarray, "*n k a"]) -> Int[np.ndarray, "*n k a"]:
        """Rounded coefficients, lowest frequency first; not clipped."""
        coefficients = np.asarray(fft.dct(np.asarray(actions, np.float64), axis=-2, norm="ortho"))
        coefficients = np.around(coefficients * self.scale)
        if not (np.abs(coefficients) < _LARGEST).all():  # NaN too
            raise ValueError(
                f"FAST tokens: normalised actions of up to {np.abs(actions).max():g} times the scale {self.scale:g} "
                "are no whole numbers that a computer holds; look for faulty values in the actions, or for a spread in "
                "their statistics that is almost 0"
            )
        return coefficients.astype(np.int64)

    def dequantize(self, coefficients: Int[np.ndarray, "*n k a"]) -> Float[np.ndarray, "*n k a"]:
        """The inverse of `quantize` but for the rounding."""
        return np.asarray(fft.idct(coefficients / self.scale, axis=-2, norm="ortho"), np.float32)

    def encode(self, actions: Float[np.ndarray, "n k a"]) -> list[list[int]]:
        """The ids of each chunk. Raises ValueError at a shape that the tokenizer is not for."""
        self._check(*actions.shape[-2:])
        texts = self._bpe.encode_batch(
            [*map(self._to_text, self.quantize(actions))], add_special_tokens=False
        )
        return [text.ids for text in texts]

    def clipped(self, actions: Float[np.ndarray, "n k a"]) -> float:
        """Share of the coefficients that lie beyond the alphabet: `encode` takes the nearest in it."""
        values = self.quantize(actions)
        return float(np.mean((values < self.min_token) | (values > self.max_token)))

    def decode(
        self, tokens: Sequence[int], horizon: int | None = None, action_dim: int | None = None
    ) -> Decoded:
        """The chunk of any sequence of integers; `horizon` and `action_dim` where the files name none.

        A sequence that is no chunk gives the one that shares the beginning that can be read: an id that does not
        exist is left out, missing coefficients (the highest frequencies) are 0, further ones are cut, and one beyond
        the alphabet, which bytes can spell, is the nearest in it.
        """
        k, a = self.horizon or horizon, self.action_dim or action_dim
        if not k or not a:
            raise ValueError("this FAST tokenizer names no horizon and action_dim; give them to decode")
        self._check(k, a)
        known = [int(token) for token in tokens if 0 <= token < len(self._pieces)]
        text, malformed = _text(b"".join(self._pieces[token] for token in known))
        values = np.fromiter(map(ord, text), np.int64, len(text)) + self.min_token
        malformed |= (
            len(known) != len(tokens) or len(values) != k * a or bool((values > self.max_token).any())
        )
        values = np.minimum(values, self.max_token)
        coefficients = np.zeros(k * a, np.int64)
        read = min(k * a, len(values))
        coefficients[:read] = values[:read]
        return Decoded(self.dequantize(coefficients.reshape(k, a)), bool(malformed))

    def to_files(self) -> dict[str, str]:
        """File name → content, to be stored in a checkpoint."""
        return dict(self._files)

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> "FastTokenizer":
        """The inverse of `to_files`."""
        return cls(files)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files into a directory, which may exist."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            part = directory / f".{name}.part"
            part.write_text(content, encoding="utf-8")
            os.replace(part, directory / name)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "FastTokenizer":
        """Reads what `save` wrote, or a copy of physical-intelligence/fast."""
        try:
            return cls({name: (Path(directory) / name).read_text(encoding="utf-8") for name in _FILES})
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no FAST tokenizer in {directory} ({error.filename} is missing)"
            ) from None

    def _to_text(self, coefficients: Int[np.ndarray, "k a"]) -> str:
        values = np.clip(coefficients, self.min_token, self.max_token).ravel() - self.min_token
        return "".join(map(chr, values))

    def _check(self, horizon: int, action_dim: int) -> None:
        for name, mine, theirs in (
            ("horizon", self.horizon, horizon),
            ("action_dim", self.action_dim, action_dim),
        ):
            if mine is not None and mine != theirs:
                raise ValueError(
                    f"this FAST tokenizer is for chunks of {name} {mine}, not {theirs}; train another one"
                )


def _text(piece: bytes) -> tuple[str, bool]:
    """What can be read of UTF-8 bytes, and whether something could not."""
    text = piece.decode("utf-8", errors="ignore")
    return text, text.encode("utf-8") != piece


def _pieces(bpe: tokenizers.Tokenizer, by_bytes: bool) -> list[bytes]:
    """The UTF-8 bytes of every id; empty for an id that is not in the vocabulary."""
    vocab = bpe.get_vocab(with_added_tokens=False)
    pieces = [b""] * (max(vocab.values()) + 1)
    byte_of = {char: byte for byte, char in enumerate(_byte_characters())} if by_bytes else {}
    for token, number in vocab.items():
        # The public vocabulary also holds plain characters, which no byte stands for and no text ever becomes.
        of_bytes = by_bytes and all(char in byte_of for char in token)
        pieces[number] = bytes(byte_of[char] for char in token) if of_bytes else token.encode("utf-8")
    return pieces


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it prints, the next free one else."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
