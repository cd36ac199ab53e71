"""FAST: round trips within the bound, any sequence decodes, the public tokenizer's layout is read."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from scipy import fft
from tokenizers import trainers

from tests.data import toy
from vla_jax.cli import train_fast as train_fast_launcher
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.config import FastConfig
from vla_jax.data.fast.ids import action_ids
from vla_jax.data.fast.train import train_fast
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.loader import make_loader
from vla_jax.data.sample import Sample
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.data.transforms import from_json, to_json

K, A, SCALE = 8, 3, 10.0


def smooth_chunks(n: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(size=(n, K, A)) * 0.3, axis=1)


@pytest.fixture(scope="module")
def chunks():
    return smooth_chunks(2000, 0)


@pytest.fixture(scope="module")
def fast(chunks):
    return train_fast(chunks, vocab_size=400, scale=SCALE)


@pytest.fixture(scope="module")
def byte_level(chunks):
    """The public tokenizer's layout: byte-level BPE over characters that take two bytes, no shape in its settings."""
    low = -354
    values = np.around(fft.dct(chunks, axis=1, norm="ortho") * SCALE).astype(int) - low
    bpe = tokenizers.ByteLevelBPETokenizer()
    alphabet = [chr(i) for i in range(values.max() + 1)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    bpe._tokenizer.train_from_iterator(("".join(map(chr, row)) for row in values.reshape(2000, -1)), trainer)
    settings = {
        "scale": 10, "min_token": low, "vocab_size": 700, "time_horizon": None, "action_dim": None,
        "processor_class": "UniversalActionProcessor",
    }  # fmt: skip
    return FastTokenizer(
        {"tokenizer.json": bpe._tokenizer.to_str(), "processor_config.json": json.dumps(settings)}
    )


def dct(n: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix, from its definition."""
    rows = np.cos(np.pi * np.arange(n)[:, None] * (2 * np.arange(n) + 1) / (2 * n)) * np.sqrt(2 / n)
    rows[0] /= np.sqrt(2)
    return rows


def test_coefficients_are_the_paper_s(fast, chunks):
    """Lowest frequency of all dimensions first: the text is row-major over (frequency, dimension)."""
    want = np.around(np.einsum("fk,nka->nfa", dct(K), chunks) * SCALE)
    np.testing.assert_array_equal(fast.quantize(chunks), want)
    row = fast.encode(chunks[:1])[0]
    text = "".join(fast._pieces[token].decode() for token in row)
    np.testing.assert_array_equal([ord(c) + fast.min_token for c in text], want[0].ravel())


@pytest.mark.parametrize("kind", ["fast", "byte_level"])
def test_round_trip_is_the_rounding_alone(kind, request, chunks):
    """Parseval: a dimension's squared error is that of its coefficients, each at most half a step off."""
    tokenizer = request.getfixturevalue(kind)
    rows = tokenizer.encode(chunks[:300])
    decoded = [tokenizer.decode(row, K, A) for row in rows]
    assert not any(chunk.malformed for chunk in decoded)
    error = np.stack([chunk.actions for chunk in decoded]) - chunks[:300]
    bound = np.sqrt(K) * 0.5 / SCALE
    assert np.sqrt((error**2).sum(axis=1)).max() <= bound + 1e-5
    assert np.abs(error).max() > 0.2 * bound  # not merely a copy
    assert np.mean([len(row) for row in rows]) < K * A


def test_coefficients_beyond_the_alphabet_are_clipped_and_counted(fast, chunks):
    wild = chunks[:5] * 100
    assert fast.clipped(chunks) == 0 and fast.clipped(wild) > 0.1
    decoded = [fast.decode(row) for row in fast.encode(wild)]
    assert not any(chunk.malformed for chunk in decoded)
    got = fast.quantize(np.stack([chunk.actions for chunk in decoded]))
    np.testing.assert_array_equal(got, np.clip(fast.quantize(wild), fast.min_token, fast.max_token))


@pytest.mark.parametrize("kind", ["fast", "byte_level"])
def test_any_sequence_decodes_and_says_when_it_was_none(kind, request):
    """10,000 random sequences, ids that do not exist among them: no exception, and the flag is right."""
    tokenizer = request.getfixturevalue(kind)
    rng = np.random.default_rng(1)
    flagged = 0
    for _ in range(10_000):
        row = rng.integers(-2, tokenizer.vocab_size + 5, rng.integers(0, 2 * K * A))
        chunk = tokenizer.decode(row, K, A)
        assert chunk.actions.shape == (K, A) and np.isfinite(chunk.actions).all()
        inside = all(0 <= token < tokenizer.vocab_size for token in row)
        if kind == "fast":
            whole = sum(tokenizer.lengths[token] for token in row if 0 <= token < tokenizer.vocab_size)
            assert chunk.malformed == (not inside or whole != K * A)
        elif not inside:
            assert chunk.malformed
        flagged += chunk.malformed
    assert flagged > 9000


def test_a_malformed_sequence_gives_the_nearest_chunk(fast, chunks):
    row = fast.encode(chunks[:1])[0]
    whole = fast.decode(row)
    cut, longer, strange = fast.decode(row[:-2]), fast.decode(row + row[:1]), fast.decode([-1, *row, 10**6])
    assert cut.malformed and longer.malformed and strange.malformed and not whole.malformed
    np.testing.assert_array_equal(longer.actions, whole.actions)
    np.testing.assert_array_equal(strange.actions, whole.actions)
    kept = fast.quantize(whole.actions).ravel()
    kept[sum(fast.lengths[token] for token in row[:-2]) :] = 0  # the highest frequencies are missing
    np.testing.assert_array_equal(fast.quantize(cut.actions).ravel(), kept)
    assert np.abs(cut.actions).max() > 0.1
    assert fast.decode([]).malformed


@pytest.mark.parametrize("code", [0x800, 0xFFFD, 0x10FFFF])
def test_bytes_that_spell_a_coefficient_beyond_the_alphabet(byte_level, chunks, code):
    """Three or four bytes that no chunk is ever written with: the largest coefficient stands for it, and is flagged."""
    row = byte_level.encode(chunks[:1])[0]
    whole = byte_level.quantize(byte_level.decode(row, K, A).actions).ravel()
    single = {piece: token for token, piece in enumerate(byte_level._pieces) if len(piece) == 1}
    as_bytes = [single[bytes([byte])] for byte in "".join(map(chr, whole - byte_level.min_token)).encode()]
    assert not byte_level.decode(as_bytes, K, A).malformed
    spelt = [single[bytes([byte])] for byte in chr(code).encode()]
    assert len(spelt) == (3 if code < 0x10000 else 4)
    first = len(chr(whole[0] - byte_level.min_token).encode())
    strange = byte_level.decode(spelt + as_bytes[first:], K, A)
    assert strange.malformed
    wanted = np.asarray([0x7FF + byte_level.min_token, *whole[1:]])
    np.testing.assert_array_equal(byte_level.quantize(strange.actions).ravel(), wanted)


def test_training_again_gives_the_same_files(fast, chunks, tmp_path):
    assert train_fast(chunks, vocab_size=400, scale=SCALE) == fast
    fast.save(tmp_path / "fast")
    assert FastTokenizer.load(tmp_path / "fast") == fast


def test_errors_name_what_is_wrong(fast, chunks, tmp_path):
    with pytest.raises(ValueError, match="more than vocab_size=20"):
        train_fast(chunks, vocab_size=20)
    with pytest.raises(ValueError, match="horizon 8, not 4"):
        fast.encode(chunks[:, :4])
    with pytest.raises(FileNotFoundError, match="no FAST tokenizer in"):
        FastTokenizer.load(tmp_path)


TEXTS = ["pick the red cup", "pick the blue ball"]


def test_ids_lie_behind_a_small_vocabulary(fast):
    text = train_tokenizer(TEXTS, 320)
    ids, total = action_ids(text, fast)
    row = ids.of([0, fast.vocab_size - 1])
    assert row == [320 + fast.vocab_size, 320, 320 + fast.vocab_size - 1, text.eos]
    assert total == 321 + fast.vocab_size == max(row) + 1
    np.testing.assert_array_equal(ids.fast(np.asarray(row[1:3])), [0, fast.vocab_size - 1])


def test_ids_of_paligemma_count_down_from_the_last_location(fast):
    """openpi's mapping: 257152 - 1 - 128 - t. Here the vocabulary is PaliGemma's, the pieces are not."""
    small = json.loads(train_tokenizer(TEXTS, 320).to_files()["tokenizer.json"])
    for i in range(128):
        small["added_tokens"].append(
            {"id": 257_024 + i, "content": f"<seg{i:03}>", "special": False, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip
        small["model"]["vocab"][f"<seg{i:03}>"] = 257_024 + i
    files = {"tokenizer.json": json.dumps(small), "tokenizer_config.json": "{}"}
    text = type(train_tokenizer(TEXTS, 320))(files)
    assert text.vocab_size == 257_152
    ids, total = action_ids(text, fast)
    assert total == 257_152  # nothing is added
    for token in (0, 1, 399):
        assert ids.first + ids.step * token == 257_152 - 1 - 128 - token
    assert ids.begin == tuple(text.encode("Action: ")) and ids.end == (*text.encode("|"), text.eos)


def test_transform(fast, chunks):
    ids, _ = action_ids(train_tokenizer(TEXTS, 320), fast)
    longest = max(map(len, fast.encode(chunks)))
    make = TokenizeActions(
        fast=fast, ids=ids, horizon=K, action_dim=A, max_tokens=longest + 2, keep_actions=False
    )
    sample = Sample(images={}, state=np.zeros(2), instruction="", actions=chunks[0], action_mask=None)
    done = make.inputs(sample)
    assert done.actions is None
    tokens, mask, loss = done.action_tokens
    row = tokens[mask]
    assert row[0] == ids.begin[0] and row[-1] == ids.end[0] and not loss[0]
    assert loss.sum() == mask.sum() - 1
    back = make.decode(row[None, None, 1:-1], np.ones((1, 1, len(row) - 2), bool))
    assert not back.malformed.any()
    np.testing.assert_allclose(back.actions[0, 0], chunks[0], atol=np.sqrt(K) * 0.5 / SCALE)
    counts = make.coefficients(1000)
    assert counts[row[1:-1]].sum() == K * A == make.total and counts[:320].sum() == 0
    (again,) = from_json(json.loads(json.dumps(to_json([make]))))
    assert again == make
    short = TokenizeActions(fast=fast, ids=ids, horizon=K, action_dim=A, max_tokens=4, keep_actions=True)
    with pytest.raises(ValueError, match=r"over the limit of 4; train with data\.fast\.max_tokens="):
        short.inputs(sample)


def test_batches_hold_tokens_beside_or_instead_of_actions(tmp_path):
    """From a data set: the tokens are the normalised chunk before padding; files give the same as training anew."""
    toy.write(tmp_path / "toy", [toy.make_episode(seed) for seed in range(8)])
    config = DataConfig(
        path=str(tmp_path / "toy"),
        image_size=8,
        vocab_size=300,
        val_episodes=2,
        fast=FastConfig(vocab_size=300),
    )
    batches = {}
    for how in ("none", "beside", "instead"):
        bundle = prepare(config, action_dim=5, horizon=4, action_tokens=how)
        batches[how] = make_loader(config, bundle, horizon=4, batch_size=6, seed=0).batch(0)
    assert batches["none"].action_tokens is None and batches["instead"].actions is None
    beside, instead = batches["beside"], batches["instead"]
    np.testing.assert_array_equal(beside.actions, batches["none"].actions)
    np.testing.assert_array_equal(beside.action_tokens, instead.action_tokens)
    inner = beside.action_token_loss & (beside.action_tokens != bundle.tokenizer.eos)
    decoded = bundle.decode_actions(beside.action_tokens, inner)
    assert decoded.actions.shape == (6, 4, 5) and not decoded.malformed.any()
    np.testing.assert_allclose(decoded.actions, beside.actions, atol=np.sqrt(4) * 0.5 / 10 + 1e-6)
    assert bundle.vocab_size == 300 + bundle.tokenize_actions.fast.vocab_size + 1
    bundle.tokenize_actions.fast.save(tmp_path / "fast")
    given = dataclasses.replace(config, fast=FastConfig(path=str(tmp_path / "fast")))
    assert prepare(given, action_dim=5, horizon=4, action_tokens="instead") == bundle
    with pytest.raises(ValueError, match="horizon 4, not 6"):
        prepare(given, horizon=6, action_tokens="instead")


def test_the_launcher_writes_what_a_run_would_train(tmp_path, monkeypatch, capsys):
    toy.write(tmp_path / "toy", [toy.make_episode(seed) for seed in range(8)])
    (tmp_path / "config.py").write_text(
        "from vla_jax.config import TrainConfig\n"
        "from vla_jax.data.config import DataConfig\n"
        "from vla_jax.data.fast.config import FastConfig\n"
        "from vla_jax.models.config import VLAConfig\n"
        "from vla_jax.models.experts.joint import JointConfig\n"
        "def get_config():\n"
        "    return TrainConfig(model=VLAConfig(expert=JointConfig(horizon=4)),\n"
        "        data=DataConfig(vocab_size=300, val_episodes=2, fast=FastConfig(vocab_size=300)))\n"
    )
    command = ["train_fast", "--config", str(tmp_path / "config.py"), "--data.path", str(tmp_path / "toy")]
    out, report = tmp_path / "fast", tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out), "--json", str(report)])
    train_fast_launcher.main()
    assert "tokens" in capsys.readouterr().out
    config = DataConfig(
        path=str(tmp_path / "toy"), vocab_size=300, val_episodes=2, fast=FastConfig(vocab_size=300)
    )
    bundle = prepare(config, horizon=4, action_tokens="instead")
    assert FastTokenizer.load(out) == bundle.tokenize_actions.fast
    measured = json.loads(report.read_text())
    assert measured["rmse"] < 0.5 / 10 and measured["action_dim"] == 3 and measured["tokens_mean"] <= 12
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out), "--data.fast.path", str(out)])
    with pytest.raises(ValueError, match="names a tokenizer that exists"):
        train_fast_launcher.main()
