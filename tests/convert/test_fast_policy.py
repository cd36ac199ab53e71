"""A converted π0-FAST is a policy: tokens and actions equal a decoding without a cache, by openpi's formulas."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import fft
from tokenizers import trainers

from tests.convert import layouts
from vla_jax.cli.command import UsageError, cli
from vla_jax.cli.convert import ConvertArgs
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.data.tokenizer import Tokenizer, train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.request import parse

SIZES = dataclasses.replace(layouts.TINY, vocab=257_152, width=16, depth=2)
HORIZON, DIMS = 4, 8
LOW, SCALE, FAST_TOKENS = -354, 10, 400
GREEDY = SolverConfig()
RNG = np.random.default_rng(11)
STATISTICS = {
    name: {
        "mean": [0.0] * DIMS,
        "std": [1.0] * DIMS,
        "q01": list(low),
        "q99": list(low + width),
    }
    for name, low, width in (
        ("state", RNG.uniform(-1, 0, DIMS), RNG.uniform(1, 2, DIMS)),
        ("actions", RNG.uniform(-1, 0, DIMS), RNG.uniform(1, 2, DIMS)),
    )
}


def save_tokenizer(folder):
    """A small vocabulary with PaliGemma's segmentation tokens, which stand behind its last location token, 257,023."""
    files = train_tokenizer(["Task: pick up the cup, State: 0123456789-;\nAction: |"] * 4, 320).to_files()
    small = json.loads(files["tokenizer.json"])
    plain = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    for i in range(128):
        small["added_tokens"].append({"id": 257_024 + i, "content": f"<seg{i:03}>", **plain})
        small["model"]["vocab"][f"<seg{i:03}>"] = 257_024 + i
    Tokenizer(files | {"tokenizer.json": json.dumps(small)}).save(folder)


def save_fast(folder, **settings):
    """As physical-intelligence/fast ships it: byte-level BPE over characters, no sizes in its settings."""
    chunks = np.cumsum(np.random.default_rng(0).normal(size=(500, HORIZON, DIMS)) * 0.3, axis=1)
    values = np.around(fft.dct(chunks, axis=1, norm="ortho") * SCALE).astype(int) - LOW
    bpe = tokenizers.ByteLevelBPETokenizer()
    alphabet = [chr(i) for i in range(values.max() + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=FAST_TOKENS, initial_alphabet=alphabet[:100], show_progress=False
    )
    bpe._tokenizer.train_from_iterator(("".join(map(chr, row)) for row in values.reshape(500, -1)), trainer)
    said = {"scale": SCALE, "min_token": LOW, "time_horizon": None, "action_dim": None, **settings}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(bpe._tokenizer.to_str())
    (folder / "processor_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    arrays = {
        name: 0.3 * x if x.ndim > 1 else 0.05 * x
        for name, x in layouts.random(layouts.openpi(SIZES, "fast")).items()
    }
    save_tokenizer(folder / "tokenizer")
    # A random network repeats its last token, which it reads and writes by one table: small rows let the layers
    # decide. A longer row for "|" ends chunks early.
    table = arrays["PaliGemma/llm/embedder/input_embedding"]
    table *= 0.02
    bar = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]["|"]
    table[bar] *= 3
    save_fast(folder / "fast")
    layouts.save_openpi(folder / "pi0_fast", arrays, value=True)
    file = folder / "pi0_fast/assets/droid/norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": STATISTICS}))
    return folder


def to_policy(theirs, out, horizon=HORIZON, source="pi0_fast", **changes):
    given = {"tokenizer": theirs / "tokenizer", "fast": theirs / "fast", "robot": "droid_fast"} | changes
    options = Options(horizon=horizon, policy=PolicyOptions(**given))
    convert(theirs / source, out, source="openpi", target="vla_jax", dtype="float32", options=options)
    policy = Policy.load(out)
    model = dataclasses.replace(policy.config.model, dtype="float32")
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))


@pytest.fixture(scope="module")
def policy(theirs, tmp_path_factory):
    return to_policy(theirs, tmp_path_factory.mktemp("ours") / "fast")


def message(seed):
    rng = np.random.default_rng(seed)
    low, high = (np.asarray(STATISTICS["state"][key]) for key in ("q01", "q99"))
    state = rng.uniform(low, high)
    return {
        "observation/exterior_image_1_left": rng.integers(256, size=(8, 8, 3), dtype=np.uint8),
        "observation/wrist_image_left": rng.integers(256, size=(8, 8, 3), dtype=np.uint8),
        "observation/joint_position": state[:7],
        "observation/gripper_position": state[7:],
        "prompt": "Pick_up the CUP",
    }


def observation(policy, sent):
    engine = Engine(policy, solver=GREEDY, buckets=(1,))
    (request,), _ = parse(sent, engine.spec, {})
    return engine, engine.prepare(request, seed=0)


def prompt_by_hand(policy, sent):
    """Ids of openpi's text."""
    low, high = (np.asarray(STATISTICS["state"][key]) for key in ("q01", "q99"))
    state = np.concatenate([sent["observation/joint_position"], sent["observation/gripper_position"]])
    state = (np.float32(state) - low) / (high - low + 1e-6) * 2 - 1
    bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    text = f"Task: pick up the cup, State: {' '.join(map(str, bins))};\n"
    return [2, *policy.bundle.tokenizer.encode(text)]


@functools.partial(jax.jit, static_argnums=0)
def next_logits(model, params, batch, last):
    """Logits behind the text's position `last`: images and text in one pass, nothing kept from the one before."""
    _, hidden = model.apply({"params": params}, batch, method="prefill")
    return model.apply({"params": params}, hidden[0, last], method="logits")


def decode_by_hand(policy, sent):
    """Greedy ids behind "Action: ", among FAST's and "|"."""
    tokenizer, prompt = policy.bundle.tokenizer, prompt_by_hand(policy, sent)
    begin, bar = tokenizer.encode("Action: "), tokenizer.encode("|")
    row = [*prompt, *begin]
    length, limit = len(prompt) + 256, 256 - len(begin)
    black = np.zeros((1, 8, 8, 3), np.uint8)
    cameras = (
        sent["observation/exterior_image_1_left"][None],
        black,
        sent["observation/wrist_image_left"][None],
    )
    names = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    base = policy.bundle.observation_batch(observation(policy, sent)[1].observation).replace(
        images=dict(zip(names, cameras)), image_mask={name: np.ones(1, bool) for name in names}
    )
    allowed = np.full(SIZES.vocab, -np.inf, np.float32)
    allowed[[*range(257_023, 257_023 - FAST_TOKENS, -1), *bar]] = 0
    written = []
    while len(written) < limit:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(row)] = row
        there = np.arange(length)[None]
        batch = base.replace(
            tokens=tokens,
            token_mask=there < len(row),
            token_causal=there >= len(prompt),
            token_loss=np.zeros((1, length), bool),
        )
        logits = next_logits(policy.model, policy.params, batch, jnp.asarray(len(row) - 1))
        token = int(np.argmax(np.asarray(logits) + allowed))
        if token == bar[0]:
            break
        written.append(token)
        row.append(token)
    return written


def actions_by_hand(theirs, ids):
    """BPE ids → bytes → characters → coefficients → inverse DCT → openpi's quantiles; missing coefficients are 0."""
    bpe = tokenizers.Tokenizer.from_file(str(theirs / "fast/tokenizer.json"))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*printable}))}
    spelled = b""
    for token in (bpe.id_to_token(257_023 - i) for i in ids):
        plain = (
            not set(token) <= byte_of.keys()
        )  # a character of the alphabet itself, as the public files hold too
        spelled += token.encode() if plain else bytes(byte_of[char] for char in token)
    text = spelled.decode("utf-8", errors="ignore")
    coefficients = np.zeros(HORIZON * DIMS)
    values = np.asarray([ord(char) + LOW for char in text])[: HORIZON * DIMS]
    coefficients[: len(values)] = values
    chunk = fft.idct(coefficients.reshape(HORIZON, DIMS) / SCALE, axis=0, norm="ortho")
    low, high = (np.asarray(STATISTICS["actions"][key]) for key in ("q01", "q99"))
    return (chunk + 1) / 2 * (high - low + 1e-6) + low


def test_tokens_and_actions_equal_a_decoding_without_a_cache(theirs, policy, monkeypatch, caplog):
    assert policy.max_chunk_tokens == 256 - len(policy.bundle.tokenizer.encode("Action: "))
    assert policy.model.config.cameras == ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    read, seen = Policy.read_chunks, []
    monkeypatch.setattr(
        Policy, "read_chunks", lambda self, written: seen.append(written) or read(self, written)
    )
    lengths = set()
    for seed in range(3):
        sent = message(seed)
        engine, ready = observation(policy, sent)
        batch = policy.bundle.observation_batch(ready.observation)
        assert batch.tokens[0][batch.token_mask[0]].tolist() == prompt_by_hand(policy, sent)
        wanted = decode_by_hand(policy, sent)
        chunk = policy.act(ready.observation, jax.random.key(0), solver=GREEDY)
        tokens, mask = (np.asarray(x) for x in (seen[-1].tokens, seen[-1].mask))
        assert tokens[0, 0][mask[0, 0]].tolist() == wanted
        np.testing.assert_allclose(chunk[0], actions_by_hand(theirs, wanted), atol=1e-5, rtol=1e-5)
        lengths.add((len(wanted), len(set(wanted))))
    assert len(lengths) > 1 and max(kinds for _, kinds in lengths) > 3, lengths
    assert "chunks were malformed" in caplog.text
    (answer,) = engine.run([ready])
    assert answer.actions.shape == (HORIZON, DIMS)
    np.testing.assert_allclose(answer.actions, chunk[0], atol=1e-5)


def test_a_whole_chunk_comes_back_in_the_robots_units(theirs, policy, caplog):
    actions = policy.bundle.tokenize_actions
    smooth = np.cumsum(np.random.default_rng(5).normal(size=(1, HORIZON, DIMS)) * 0.3, axis=1)
    row = actions.fast.encode(smooth)[0]
    ids = np.asarray(actions.ids.of(row))[len(actions.ids.begin) : -len(actions.ids.end)]
    assert ids.tolist() == [257_023 - token for token in row]
    chunks = policy.bundle.decode_actions(ids[None], np.ones((1, len(ids)), bool))
    assert not chunks.malformed.any()
    low, high = (np.asarray(STATISTICS["actions"][key]) for key in ("q01", "q99"))
    found = policy.bundle.robot_actions(chunks.actions, policy.bundle.blank())[0]
    wanted = (smooth[0] + 1) / 2 * (high - low + 1e-6) + low
    np.testing.assert_allclose(found, actions_by_hand(theirs, ids), atol=1e-5)
    assert np.abs(found - wanted).max() < np.sqrt(HORIZON) * 0.5 / SCALE


def test_what_is_missing_is_one_line_that_names_the_option(theirs, tmp_path):
    save_fast(tmp_path / "long", time_horizon=HORIZON + 1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "broken/processor_config.json").write_text("{")
    train_tokenizer(["pick up"], 300).save(tmp_path / "plain")
    cases = [
        ({"fast": None}, r"give --fast, a folder with physical-intelligence/fast's"),
        ({"fast": tmp_path / "none"}, r"--fast: no FAST tokenizer in .*none"),
        ({"fast": tmp_path / "broken"}, r"--fast .*broken: "),
        ({"horizon": None}, r"give --horizon, the action_horizon"),
        ({"fast": tmp_path / "long"}, r"--horizon 4: the files of --fast are for chunks of 5 actions"),
        ({"tokenizer": tmp_path / "plain"}, r"--tokenizer: it has no <seg000>"),
        ({"state_in_prompt": False}, r"is for a π0\.5; this model's prompt always holds the state"),
    ]
    for changes, wanted in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=wanted) as caught:
            to_policy(theirs, tmp_path / "out", **changes)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    argv = ["--from", "openpi", "--path", "a", "--out", "b", "--fast", "c"]
    with pytest.raises(
        (UsageError, ValueError), match=r"--fast would do nothing here.*give its --tokenizer too"
    ):
        cli(ConvertArgs, description=None, argv=argv)


def test_fast_for_an_expert_is_refused(theirs, tmp_path):
    sizes = dataclasses.replace(layouts.TINY, vocab=300)
    layouts.save_small_openpi(tmp_path / "pi0", sizes, "pi0")
    with pytest.raises(ValueError, match="--fast would do nothing here: these weights have an expert"):
        to_policy(theirs, tmp_path / "out", source=tmp_path / "pi0")
