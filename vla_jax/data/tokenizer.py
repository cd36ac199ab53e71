"""A small BPE tokenizer with PaliGemma's special-token layout, in Hugging Face's file format.

    0 <pad>   1 <eos>   2 <bos>   3 <unk>   4 <mask>   5 "\\n"   6…261 <0x00>…<0xFF>   characters, merges
    <unused…> up to the size asked for   last: <image>

As in Gemma's tokenizer (Gemma report, arXiv:2403.08295, §2) spaces become "▁", digits stand alone, and what
the vocabulary lacks falls back to UTF-8 bytes, so that any text survives encode → decode (except "▁" itself).
The line feed is a token of its own and never merged: it separates prompt and target (PaliGemma,
arXiv:2407.07726, §3.2.3; other families' prompts stand in `prompt_forms`). Left out of PaliGemma's layout: its 1024
<loc> and 128 <seg> tokens, which are more than the rest of a small vocabulary together and which no data set here uses.

`transformers.AutoTokenizer.from_pretrained(directory)` loads the saved files, bos included. Here only the
`tokenizers` library is used.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vla_jax.data.quote import quoted

PAD, EOS, BOS, UNK = 0, 1, 2, 3
SEPARATOR = "\n"
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_SPACE = "▁"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_CACHED_TEXTS = 16384
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "additional_special_tokens": ["<image>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,
    "padding_side": "right",
}
"""What `transformers.AutoTokenizer` reads beside tokenizer.json."""


class TextTokens(NamedTuple):
    """One row of a batch's text, see `vla_jax.types.Batch`."""

    tokens: Int[np.ndarray, " l"]
    mask: Bool[np.ndarray, " l"]
    causal: Bool[np.ndarray, " l"]
    loss: Bool[np.ndarray, " l"]


class Tokenizer:
    """Text to token ids and back. It pickles, and travels in a checkpoint as `to_files()`."""

    def __init__(self, files: Mapping[str, str]):
        missing = [name for name in _FILES if name not in files]
        if missing:
            raise ValueError(f"tokenizer files lack {missing}")
        self._files = {name: files[name] for name in _FILES}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # the library has no type of its own
            raise ValueError(f"tokenizer.json is no tokenizer: {str(error)[:200]}") from None
        # An instruction that spells "<eos>" is text, not the end of the sequence.
        self._tokenizer.encode_special_tokens = True
        self._cache: dict[tuple, TextTokens] = {}

    def __getstate__(self) -> dict[str, str]:
        return self._files

    def __setstate__(self, files: dict[str, str]) -> None:
        self.__init__(files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._files == other._files

    def __hash__(self) -> int:
        return hash(self._files["tokenizer.json"])

    @property
    def vocab_size(self) -> int:
        """Number of ids: 0 … vocab_size - 1. PaliGemma's files name some behind them that no text has (<image>)."""
        last = self._tokenizer.token_to_id("<seg127>")
        return self._tokenizer.get_vocab_size() if last is None else last + 1

    @property
    def last_location(self) -> int | None:
        """The id of PaliGemma's last location token; None for a vocabulary without them."""
        segment = self._tokenizer.token_to_id("<seg000>")
        return None if segment is None else segment - 1

    @property
    def eos(self) -> int:
        """The id that ends a target."""
        return EOS

    def encode(self, text: str) -> list[int]:
        """The ids of a text by itself: no bos, no eos."""
        return self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first eos; special tokens are left out.

        An id beyond the vocabulary (a model's embedding may have more rows) shows as "\N{REPLACEMENT CHARACTER}".
        """
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        unknown = self._ids("\N{REPLACEMENT CHARACTER}")
        known = [j for i in ids for j in ([i] if 0 <= i < self.vocab_size else unknown)]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def encode_prompt(
        self, instruction: str, target: str | None, max_len: int, max_target: int | None = None
    ) -> TextTokens:
        """`encode_pieces` of PaliGemma's prompt: the instruction, stripped and in one line, and the separator."""
        return self.encode_pieces(_paligemma(instruction), target, max_len, max_target)

    def encode_pieces(
        self, prompt: tuple[str, ...], target: str | None, max_len: int, max_target: int | None = None
    ) -> TextTokens:
        """[bos prompt][target eos][pad], each [max_len]; [target eos] at most `max_target`.

        The pieces of the prompt are tokenised one by one. `target` None, "" or blank leaves its part out. `causal` is
        True from the first target token on, padding included; `loss` at target and eos. Raises ValueError where it does
        not fit: nothing is ever cut.
        """
        target = target if target and target.strip() else None
        key = (prompt, target, max_len, max_target)
        found = self._cache.get(key)
        if found is None:
            found = self._encode_pieces(*key)
            if len(self._cache) >= _CACHED_TEXTS:
                self._cache.clear()
            self._cache[key] = found
        return found

    def lengths(self, prompt: str | tuple[str, ...], target: str | None) -> tuple[int, int]:
        """How many tokens a prompt (an instruction, or pieces) needs: for all of it, and for [target eos]."""
        pieces = _paligemma(prompt) if isinstance(prompt, str) else prompt
        asked, answer = self._rows(pieces, target if target and target.strip() else None)
        return len(asked) + len(answer), len(answer)

    def to_files(self) -> dict[str, str]:
        """File name → content, to be stored in a checkpoint."""
        return dict(self._files)

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> "Tokenizer":
        """The inverse of `to_files`."""
        return cls(files)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the files; the directory appears only when it is whole. An existing one is kept if equal."""
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        try:
            temporary.chmod(0o755)
            for name, content in self._files.items():
                (temporary / name).write_text(content, encoding="utf-8")
            try:
                os.rename(temporary, directory)
            except OSError:
                if not directory.exists() or Tokenizer.load(directory) != self:
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote."""
        try:
            return cls({name: (Path(directory) / name).read_text(encoding="utf-8") for name in _FILES})
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no tokenizer in {directory} ({error.filename} is missing)") from None

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _rows(self, pieces: tuple[str, ...], target: str | None) -> tuple[list[int], list[int]]:
        prompt = [BOS, *(token for piece in pieces for token in self._ids(piece))]
        return prompt, [*self._ids(target), EOS] if target else []

    def _encode_pieces(
        self, pieces: tuple[str, ...], target: str | None, max_len: int, max_target: int | None
    ) -> TextTokens:
        prompt, answer = self._rows(pieces, target)
        length = len(prompt) + len(answer)
        if length > max_len:
            text = quoted("".join(pieces).removesuffix(SEPARATOR)) + (
                f" with target {quoted(target)}" if target else ""
            )
            raise ValueError(
                f"text of {length} tokens is over the limit of {max_len}: {text}; "
                f"shorten it or train with data.max_text_tokens={length} or more"
            )
        if max_target is not None and len(answer) > max_target:
            raise ValueError(
                f"text target of {len(answer)} tokens is over the limit of {max_target}: {quoted(target)}; "
                f"shorten it or train with data.max_target_tokens={len(answer)} or more"
            )
        tokens = np.full(max_len, PAD, np.int32)
        tokens[:length] = prompt + answer
        position = np.arange(max_len)
        causal = (position >= len(prompt)) & bool(answer)
        row = TextTokens(tokens, position < length, causal, causal & (position < length))
        for array in row:
            array.flags.writeable = False  # rows are shared by the cache
        return row


def _paligemma(instruction: str) -> tuple[str, ...]:
    return instruction.strip().replace(SEPARATOR, " "), SEPARATOR


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids for these texts; the same for the same set of texts.

    Merges stop at word boundaries, so with enough ids each word of the texts becomes one token.
    """
    base = [*_SPECIAL, SEPARATOR, *(f"<0x{byte:02X}>" for byte in range(256))]
    unique = sorted({text for text in texts if text})
    normalizer = normalizers.Replace(" ", _SPACE)
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SEPARATOR, "isolated"),
            pre_tokenizers.Split(_SPACE, "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    alphabet = sorted({*"".join(unique).replace(" ", _SPACE)} - {SEPARATOR})
    # Ids of the learned pieces: what remains beside the fixed ones and <image>.
    room = vocab_size - len(base) - 1
    if room < len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: these texts need {len(base) + 1 + len(alphabet)} or more"
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    learner.train_from_iterator([text.replace(SEPARATOR, " ") for text in unique], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    unused = [f"<unused{i}>" for i in range(room - len(pieces))]
    vocab = {piece: i for i, piece in enumerate([*base, *pieces, *unused, "<image>"])}
    merges = [tuple(pair) for pair in learned["merges"]]

    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([*_SPECIAL, "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return Tokenizer(
        {
            "tokenizer.json": tokenizer.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(_SETTINGS, indent=2),
        }
    )
