"""What is said of data that do not fit: in one line, with the option that mends it, and never a page of text."""

import sys

import numpy as np
import pytest

from tests.data import toy
from vla_jax.cli.command import one_line, run
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.train import train_fast
from vla_jax.data.quote import quoted
from vla_jax.data.tokenizer import train_tokenizer

LONG = "put the block there " * 125


def test_long_texts_are_not_quoted_whole():
    tokenizer = train_tokenizer([LONG], 300)
    for texts in ((LONG, None), ("go", LONG)):
        with pytest.raises(ValueError, match="over the limit of") as error:
            tokenizer.encode_prompt(*texts, max_len=16)
        assert len(str(error.value)) < 300 and "put the block" in str(error.value)
    assert quoted("short") == "'short'" and len(quoted([LONG] * 50)) < 800


def test_blank_targets_are_none():
    tokenizer = train_tokenizer(["go"], 300)
    row = tokenizer.encode_prompt("go", None, max_len=16)
    for blank in ("", " ", "\n\t "):
        for mine, other in zip(row, tokenizer.encode_prompt("go", blank, max_len=16)):
            np.testing.assert_array_equal(mine, other)
        assert tokenizer.lengths("go", blank) == tokenizer.lengths("go", None)


def config_of(tmp_path, **changes):
    path = tmp_path / "toy"
    toy.write(path, [toy.make_episode(seed, **changes) for seed in range(4)])
    return DataConfig(path=str(path), image_size=8, vocab_size=300)


def test_data_without_texts_are_said(tmp_path, caplog):
    config = config_of(tmp_path, text_target=" ", language_instruction=" ")
    prepare(config, text=True)
    assert "objective.text=True, but no step of" in caplog.text and "use objective.text=False" in caplog.text
    assert "episodes without an instruction (of the tasks ['push', 'reach'])" in caplog.text
    caplog.clear()
    prepare(config)
    assert "objective.text" not in caplog.text


def test_cameras_of_data_and_model_agree_or_are_refused(tmp_path):
    import dataclasses

    config = dataclasses.replace(config_of(tmp_path), cameras=("top",))
    assert prepare(config).cameras == prepare(config, cameras=("top",)).cameras == ("top",)
    with pytest.raises(ValueError, match=r"model\.cameras=\['wrist'\] and data\.cameras=\['top'\] differ"):
        prepare(config, cameras=("wrist",))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3000.0, "need an alphabet of 84853, more than the 55296"),
        (3e18, "normalised actions of up to 3e\\+18"),
    ],
)
def test_fast_tokens_of_huge_actions(size, message):
    chunks = np.asarray([[[size], [size]], [[-size], [-size]]])
    with pytest.raises(ValueError, match=message) as error:
        train_fast(chunks, vocab_size=100_000)
    assert "\n" not in str(error.value)


def test_a_trained_tokenizer_refuses_them_too():
    fast = train_fast(np.random.default_rng(0).normal(size=(20, 2, 1)))
    assert isinstance(fast, FastTokenizer)
    for size in (3e18, np.nan, np.inf):
        with pytest.raises(ValueError, match="FAST tokens: normalised actions of up to"):
            fast.encode(np.full((1, 2, 1), size))


def test_the_systems_errors_say_what_was_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])
    assert one_line(FileNotFoundError(2, "No such file or directory", "a/b")) == (
        "while training: a/b: No such file or directory"
    )
    assert one_line(OSError(28, "No space left on device")) == "while training: No space left on device"
    assert one_line(ValueError("[Errno 2]\n x")) == "[Errno 2] x"

    def full():
        raise OSError(28, "No space left on device", "runs/x/config.json")

    with pytest.raises(SystemExit):
        run(full)
    assert capsys.readouterr().err == "error: while training: runs/x/config.json: No space left on device\n"


def test_an_interrupted_collection_says_that_it_goes_on(monkeypatch, capsys, tmp_path):
    from vla_jax.cli import collect

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "collect", stopped)
    argv = ["launch/collect.py", "--env", "tabletop", "--episodes", "1", "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        run(collect.main)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted - the same command goes on with what is missing\n"


def test_no_remedy_of_recorded_data_is_to_record_them_again():
    from pathlib import Path

    root = Path(__file__).parents[2]
    for path in [
        *(root / "vla_jax").rglob("*.py"),
        *(root / "launch").glob("*.py"),
        *(root / "docs").glob("*.md"),
    ]:
        text = " ".join(path.read_text().replace('"', "").split()).lower()
        for phrase in (
            "collect it again",
            "collect the data set again",
            "collect them again",
            "record it again",
        ):
            assert phrase not in text, path
