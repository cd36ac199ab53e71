"""The tokenizer: lossless, PaliGemma's layout, Hugging Face's files, never a cut text."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer, train_tokenizer

TEXTS = [
    f"{verb} the {colour} {thing}"
    for verb in ("pick up", "go to", "grab")
    for colour in ("red", "blue", "green")
    for thing in ("cup", "block", "ball")
] + ["pass left of the obstacle, then grasp the red cup", "pass right of the obstacle; three steps."]
TOKENIZER = train_tokenizer(TEXTS, 700)
(SEPARATOR,) = TOKENIZER.encode("\n")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="▁", exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*" ,;.!?0123456789", "cup", "Zucchini", "\n", "<eos>", "<0x41>"]), max_size=20)
)
def test_texts_of_its_alphabet_survive(parts):
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert ids.count(SEPARATOR) == text.count("\n")
    assert not {PAD, EOS, BOS} & set(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_known_words_are_single_tokens(text):
    words = text.translate(str.maketrans({c: f" {c}" for c in ",;."})).split()
    assert len(TOKENIZER.encode(text)) == len(words)


def test_layout():
    ids = TOKENIZER._tokenizer.token_to_id
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "<0x00>", "<0xFF>", "<image>")
    assert [ids(token) for token in special] == [0, 1, 2, 3, 4, 5, 6, 261, 699]
    assert TOKENIZER.vocab_size == 700


def test_auto_tokenizer_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path / "tokenizer")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(other) == TOKENIZER.vocab_size
    assert (other.pad_token_id, other.eos_token_id, other.bos_token_id, other.unk_token_id) == (0, 1, 2, 3)
    assert other.convert_tokens_to_ids("<image>") == 699
    for text in [*TEXTS, "Zürich, 12 x_y\n", "  two  spaces "]:
        ids = other(text).input_ids
        assert ids == [BOS, *TOKENIZER.encode(text)]
        assert other.decode(ids, skip_special_tokens=True) == text
    # As PaliGemma's processor writes it: image tokens, bos, prompt, line feed.
    prompt = "<image><image><bos>grab the red cup\n"
    ids = other(prompt, add_special_tokens=False).input_ids
    assert ids == [699, 699, BOS, *TOKENIZER.encode("grab the red cup"), SEPARATOR]


def test_save_load_and_files(tmp_path):
    TOKENIZER.save(tmp_path / "t")
    TOKENIZER.save(tmp_path / "t")  # the same again is kept
    with pytest.raises(OSError):
        train_tokenizer(["other"], 700).save(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    for copy in (
        Tokenizer.load(tmp_path / "t"),
        Tokenizer.from_files(TOKENIZER.to_files()),
        pickle.loads(pickle.dumps(TOKENIZER)),
    ):
        assert copy == TOKENIZER
        assert copy.encode("grab the cup") == TOKENIZER.encode("grab the cup")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer.json is missing"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"lack \['tokenizer_config.json'\]"):
        Tokenizer.from_files({"tokenizer.json": ""})


def test_deterministic_and_independent_of_order():
    program = (
        "from tests.data.test_tokenizer import TEXTS; from vla_jax.data.tokenizer import train_tokenizer; "
        "import hashlib, random; random.shuffle(TEXTS); "
        "print(hashlib.sha256(train_tokenizer(TEXTS * 2, 700).to_files()['tokenizer.json'].encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
    assert train_tokenizer(TEXTS[::-1] + TEXTS[:5] * 9, 700) == TOKENIZER  # how often does not count


@settings(max_examples=100, deadline=None)
@given(
    instruction=st.sampled_from([*TEXTS, " grab\nit ", ""]),
    target=st.sampled_from([None, "", *TEXTS]),
    room=st.integers(0, 9),
)
def test_prompt_layout(instruction, target, room):
    length, answer_length = TOKENIZER.lengths(instruction, target)
    row = TOKENIZER.encode_prompt(instruction, target, length + room)
    prompt = [BOS, *TOKENIZER.encode(instruction.strip().replace("\n", " ")), SEPARATOR]
    answer = [*TOKENIZER.encode(target), EOS] if target else []
    assert row.tokens.tolist() == prompt + answer + [PAD] * room
    assert row.mask.tolist() == [True] * length + [False] * room
    assert row.loss.tolist() == [False] * len(prompt) + [True] * len(answer) + [False] * room
    assert row.causal.tolist() == [False] * len(prompt) + [bool(target)] * (len(answer) + room)
    assert row.tokens.tolist().count(SEPARATOR) == 1
    assert len(answer) == answer_length
    if target:
        assert TOKENIZER.decode(row.tokens[row.loss]) == target
    with pytest.raises(ValueError, match=f"text of {length} tokens is over the limit of {length - 1}: "):
        TOKENIZER.encode_prompt(instruction, target, length - 1)


def test_too_long_names_the_text_and_the_remedy():
    with pytest.raises(ValueError) as error:
        TOKENIZER.encode_prompt("grab the red cup", "pass left", 5)
    assert str(error.value) == (
        "text of 9 tokens is over the limit of 5: 'grab the red cup' with target 'pass left'; "
        "shorten it or train with data.max_text_tokens=9 or more"
    )


def test_a_target_has_its_own_limit():
    TOKENIZER.encode_prompt("grab", "pass left", 20, 3)
    with pytest.raises(
        ValueError, match="text target of 3 tokens is over the limit of 2: 'pass left'; shorten it"
    ):
        TOKENIZER.encode_prompt("grab", "pass left", 20, 2)


def test_cached_rows_cannot_be_changed():
    row = TOKENIZER.encode_prompt("grab", None, 8)
    with pytest.raises(ValueError, match="read-only"):
        row.tokens[0] = 7


def test_decode_stops_at_eos_and_shows_unknown_ids():
    ids = [BOS, *TOKENIZER.encode("grab it"), EOS, *TOKENIZER.encode("rest")]
    assert TOKENIZER.decode(np.asarray(ids)) == "grab it"
    assert TOKENIZER.decode([*TOKENIZER.encode("a"), 99_999]) == "a\N{REPLACEMENT CHARACTER}"


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size=265 is too small: these texts need 266 or more"):
        train_tokenizer(["abc"], 265)
    assert train_tokenizer(["abc"], 266).vocab_size == 266
    assert train_tokenizer([], 300).decode([7]) == "\x01"
