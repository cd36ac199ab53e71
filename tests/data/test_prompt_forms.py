"""Prompts of the model families, and tokenizers of other libraries."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.data import toy
from vla_jax.data.bundle import DataBundle, prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.prompt_forms import FORMS, Prompt, discretize
from vla_jax.data.sample import Sample
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.data.tokenizer_files import read_tokenizer
from vla_jax.data.transforms import Tokenize, from_json, to_json
from vla_jax.types import Observation

SENTENCEPIECE = Path(__file__).parent / "sentencepiece"
"""A small BPE model with Gemma's options and what sentencepiece 0.2.3 itself makes of some texts."""
STATE = np.asarray([-1.5, -1.0, -0.9999, 0.0, 0.5, 1.0, 7.0])
INSTRUCTION = "  Pick_up the\nRed cup "


def test_state_bins_are_openpi_s():
    """256 equal bins of [-1, 1]; unclipped, a value below gets -1."""
    edges = [-1 + i / 128 for i in range(257)]
    want = [max(i for i in range(256) if edges[i] <= x) if x >= -1 else -1 for x in STATE]
    np.testing.assert_array_equal(discretize(STATE, clip=False), want)
    np.testing.assert_array_equal(discretize(STATE), np.maximum(want, 0))
    assert list(discretize(STATE)) == [0, 0, 0, 128, 192, 255, 255]


def test_forms():
    bins = "0 0 0 128 192 255 255"
    want = {
        "paligemma": ("Pick_up the Red cup", "\n"),
        "pi0": ("Pick up the Red cup", "\n"),
        "pi05": (f"Task: Pick up the Red cup, State: {bins};\nAction: ",),
        "fast": (f"Task: pick up the red cup, State: {bins};\n",),
    }
    assert {form: Prompt(form).pieces(INSTRUCTION, STATE) for form in FORMS} == want
    assert "State: -1 0" in Prompt("pi05", clip_state=False).pieces("", STATE)[0]
    with pytest.raises(ValueError, match="use one of paligemma, pi0, pi05, fast"):
        DataConfig(prompt="pi06")


def test_pieces_are_tokenised_by_themselves():
    """The separator is one token whatever stands before it; the default is what `encode_prompt` always was."""
    tokenizer = train_tokenizer(["pick up the red cup", "left"], 320)
    sample = Sample(images={}, state=STATE, instruction="pick up the red cup", text_target="left")
    row = Tokenize(tokenizer, 12, 4).inputs(sample).text
    assert row is tokenizer.encode_prompt("pick up the red cup", "left", 12, 4)
    n = row.mask.sum() - 1 - len(tokenizer.encode("left"))
    assert list(row.tokens[:n]) == [2, *tokenizer.encode("pick up the red cup"), *tokenizer.encode("\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy"
    toy.write(path, [toy.make_episode(seed) for seed in range(6)])
    return path


def config(folder, **changes) -> DataConfig:
    values = {
        "path": str(folder),
        "image_size": 8,
        "vocab_size": 400,
        "val_episodes": 1,
        "max_text_tokens": 64,
    }
    return DataConfig(**values | changes)


def observation() -> Observation:
    return Observation(
        images={camera: np.zeros((1, 8, 8, 3), np.uint8) for camera in ("top", "wrist")},
        state=np.asarray([[0.3, -9.0]], np.float32),
        instruction=("push the block",),
    )


@pytest.mark.parametrize("clip", [True, False])
def test_the_state_in_the_prompt_is_replayed_from_a_checkpoint(folder, clip):
    """Normalised and not yet padded, though the model's state is wider."""
    bundle = prepare(config(folder, prompt="pi05", prompt_clip_state=clip), state_dim=5, action_dim=4)
    again = DataBundle.from_json(json.loads(json.dumps(bundle.to_json())))
    assert again.transforms == bundle.transforms
    batch = again.observation_batch(observation())
    assert batch.state.shape == (1, 5)
    first, last = discretize(batch.state[0, :2], clip)
    assert (last < 0) == (not clip)
    text = again.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])
    assert text == f"Task: push the block, State: {first} {last};\nAction: "
    assert again.text_lengths(observation(), 0, "go")[1] == len(again.tokenizer.encode("go")) + 1


def test_a_limit_that_some_state_would_break_is_refused(folder):
    longest = max(
        len(prepare(config(folder, prompt="pi05")).tokenizer.encode(f"Task: {t}, State: 255 255;\nAction: "))
        for t in ("push the block", "reach the block")
    )
    with pytest.raises(ValueError, match=r"data\.max_text_tokens="):
        prepare(config(folder, prompt="pi05", max_text_tokens=longest))


def test_old_transforms_are_read(folder):
    """Checkpoints from before there were forms name none."""
    bundle = prepare(config(folder))
    values = to_json(bundle.transforms)
    for value in values:
        value.pop("prompt", None)
    assert from_json(values) == bundle.transforms


# --- tokenizers of others ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_like():
    return read_tokenizer(SENTENCEPIECE / "bpe.model")


def test_a_sentencepiece_model_encodes_as_sentencepiece_does(gemma_like):
    golden = json.loads((SENTENCEPIECE / "encoded.json").read_text())
    assert len(golden) > 80
    for text, ids in golden.items():
        assert gemma_like.encode(text) == ids, text
    assert gemma_like.decode(golden["Ünïcode 手 🤖"]) == "Ünïcode 手 🤖"
    assert gemma_like.last_location == 6


def test_hugging_face_files(gemma_like, tmp_path):
    """A directory, the file alone, and in a data set's transforms; openpi's action text stands around FAST tokens."""
    gemma_like.save(tmp_path / "hf")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "my.json").write_text((tmp_path / "hf" / "tokenizer.json").read_text())
    text = "Task: push the blue ball, State: 3 127 255;\nAction: "
    for path in (tmp_path / "hf", tmp_path / "alone" / "my.json"):
        assert read_tokenizer(path).encode(text) == gemma_like.encode(text)


def test_a_given_tokenizer_is_the_bundle_s(folder):
    bundle = prepare(config(folder, tokenizer=str(SENTENCEPIECE / "bpe.model"), prompt="fast"))
    batch = bundle.observation_batch(dataclasses.replace(observation(), state=np.zeros((1, 2), np.float32)))
    text = bundle.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])
    assert text.startswith("Task: push the block, State: ") and text.endswith(";\n")


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor"):
        read_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0fnonsense")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        read_tokenizer(tmp_path / "broken.model")
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="<pad> has id None, not 0"):
        read_tokenizer(tmp_path / "other.json")
