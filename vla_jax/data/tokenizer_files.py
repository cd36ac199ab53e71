"""Tokenizers of other libraries: Hugging Face's tokenizer.json, and sentencepiece's .model as Gemma has it.

A .model is turned into tokenizer.json: sentencepiece's BPE joins, again and again, the neighbours whose joint piece
has the best score, leftmost first, which is BPE with one merge for every way to split a piece, best piece first.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from vla_jax.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
_SPACE = "▁"


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory (tokenizer.json, or tokenizer.model), of a .json or of a .model.

    Raises FileNotFoundError, and ValueError where its special tokens are not Gemma's.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not names:
            raise FileNotFoundError(f"{path} has neither tokenizer.json nor tokenizer.model")
        path = path / names[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer {path}")
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        settings = path.with_name("tokenizer_config.json")
        config = settings.read_text(encoding="utf-8") if settings.is_file() else _SETTINGS
    else:
        text, config = sentencepiece_to_json(path.read_bytes(), str(path)), _SETTINGS
    return _checked(Tokenizer({"tokenizer.json": text, "tokenizer_config.json": config}), text, path)


def sentencepiece_to_json(data: bytes, where: str) -> str:
    """A sentencepiece BPE model as the text of a tokenizer.json."""
    from transformers.utils import sentencepiece_model_pb2_new as protos  # slow to import, rarely needed

    proto = getattr(protos, "ModelProto")()  # noqa: B009  # generated when it is imported
    try:
        proto.ParseFromString(data)
    except Exception as error:  # google.protobuf's DecodeError, of a package that is not a dependency of ours
        raise ValueError(f"{where} is not a sentencepiece model: {error}") from None
    if (
        not proto.pieces
        or proto.trainer_spec.model_type != _BPE
        or proto.normalizer_spec.precompiled_charsmap
    ):
        raise ValueError(
            f"{where}: only sentencepiece BPE models without a normalisation table are read, as Gemma's is; "
            "convert it with its own library to tokenizer.json"
        )
    kinds = [piece.type for piece in proto.pieces]
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    unknown = proto.pieces[kinds.index(_UNKNOWN)].piece
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, normal),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=False)
            for piece in proto.pieces
            if piece.type == _USER_DEFINED
        ]
    )
    return tokenizer.to_str(pretty=False)


def _merges(vocab: dict[str, int], normal: dict[str, float]) -> list[tuple[str, str]]:
    """Every split of every piece in two pieces; those of the best piece first."""
    found = []
    for piece in sorted(normal, key=lambda piece: (-normal[piece], vocab[piece])):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
        found += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return found


def _checked(tokenizer: Tokenizer, text: str, path: Path) -> Tokenizer:
    raw = tokenizers.Tokenizer.from_str(text)
    for token, number in {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNK}.items():
        if raw.token_to_id(token) != number:
            raise ValueError(
                f"{path}: {token} has id {raw.token_to_id(token)}, not {number}; only vocabularies with Gemma's "
                "special tokens are read"
            )
    return tokenizer


_SETTINGS = json.dumps(
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
)
