"""The command line: every field is an option, and a mistake is one line."""

import dataclasses
import subprocess
import sys

import pytest

from vla_jax.cli.command import UsageError, cli, cli_with_config, option_names
from vla_jax.cli.config_file import load_config
from vla_jax.cli.train import TrainArgs
from vla_jax.config import TrainConfig

CONFIG = """
from vla_jax.config import TrainConfig
from vla_jax.train.config import LoopConfig

def get_config():
    return TrainConfig(seed=3, train=LoopConfig(batch_size=16))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    return str(path)


def parse(*argv):
    return cli_with_config(TrainArgs, description=None, argv=argv)


def test_values_come_from_the_file_and_flags_override_them(file):
    args, config = parse("--config", file, "--run-dir", "x")
    assert args == TrainArgs(run_dir="x") and config.seed == 3 and config.train.batch_size == 16
    args, config = parse(
        *(
            "--config",
            file,
            "--run_dir",
            "x",
            "--dry-run",
            "--train.batch_size",
            "8",
            "--optim.weight-decay=0.5",
        ),
        *("--train.ema_decay", "None", "--model.cameras", "a", "b", "--train.tensorboard", "False"),
        *("--model.expert.time", "adarms"),
    )
    assert args.dry_run and config.seed == 3
    assert config.train.batch_size == 8 and config.train.ema_decay is None and not config.train.tensorboard
    assert config.optim.weight_decay == 0.5 and config.model.cameras == ("a", "b")
    assert config.model.expert.time == "adarms"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--train.batch_sise", "8"),
            r"unknown option --train.batch_sise; did you mean --train.batch_size\?",
        ),
        (("--batch-size", "8"), r"did you mean --train.batch_size\?"),
        (("--run_dirr", "8"), r"did you mean --run_dir\?"),
        (("--zzz", "8"), r"unknown option --zzz; --help lists all"),
        (("stray",), "'stray' does not belong to any option"),
        (("--train.batch_size", "eight"), "--train.batch-size: invalid literal"),
        (("--process.kind", "magic"), "invalid choice 'magic' for argument '--process.kind'"),
        (
            ("--train.batch_size", "9", "--train.accumulate", "2"),
            "^train.batch_size=9 is not divisible .* use 10",
        ),
        (("--optim.beta1", "3"), r"^optim.beta1=3.0: must be in \[0, 1\)"),
        (("--train.steps",), "Missing value for argument '--train.steps'"),
    ],
)
def test_mistakes_are_one_line(file, argv, message):
    with pytest.raises(UsageError, match=message) as error:
        parse("--config", file, "--run-dir", "x", *argv)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(file, tmp_path):
    with pytest.raises(UsageError, match="--config FILE is needed"):
        parse("--run-dir", "x")
    with pytest.raises(UsageError, match="--run-dir"):
        parse("--config", file)
    with pytest.raises(FileNotFoundError, match="there is no config"):
        load_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config(: pass\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "broken.py")
    (tmp_path / "impossible.py").write_text(CONFIG.replace("batch_size=16", "batch_size=0"))
    with pytest.raises(ValueError, match=r"train\.batch_size=0"):
        load_config(tmp_path / "impossible.py")


def documented(kind):
    """Fields of a dataclass, at any depth, without a string under them, there or in the class they come from."""
    import inspect
    import re

    source = "".join(inspect.getsource(c) for c in kind.__mro__ if dataclasses.is_dataclass(c))
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from documented(type(field.default))
        elif not re.search(rf'^    {field.name}: .*(\n[^\n"]*)*?\n    """', source, re.M):
            yield f"{kind.__name__}.{field.name}"


def test_every_option_says_what_it_means(capsys):
    assert list(documented(TrainConfig)) == []
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in option_names(TrainConfig):
        assert name.replace("_", "-") in said


def test_a_launcher_fails_in_one_line_and_code_2(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "launch.train", *options]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--run-dir", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --config FILE is needed") and done.stderr.count("\n") == 1
    assert "Traceback" in run("--run-dir", str(tmp_path), "--traceback").stderr


def test_a_plain_launcher_has_the_same_manners():
    @dataclasses.dataclass(frozen=True)
    class Args:
        episodes: int = 3
        """How many."""
        fast: bool = False
        """Hurry."""

    assert cli(Args, description=None, argv=["--fast", "--episodes", "4"]) == Args(episodes=4, fast=True)
    with pytest.raises(UsageError, match=r"did you mean --episodes\?"):
        cli(Args, description=None, argv=["--episode_s", "4"])
