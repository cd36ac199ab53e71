"""What all entry points share: the command line, and errors in one line.

A launcher is

    def main() -> None:
        args = cli(Args, description=__doc__)
        ...

    if __name__ == "__main__":
        run(main)
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

FAILED = 2
"""Exit code where the user can mend it."""


_DOING = {
    "collect": "collecting demonstrations",
    "convert": "converting weights",
    "evaluate": "evaluating the policy",
    "serve": "serving the policy",
    "sweep": "training the sweep's cells",
    "train": "training",
    "train_fast": "training the FAST tokenizer",
}
"""What each launcher does, for errors that name no more than a file."""


class UsageError(ValueError):
    """A command line that means nothing."""


def run(main: Callable[[], None]) -> None:
    """Runs a launcher; an expected error becomes one line on stderr and exit code 2.

    ``--traceback``, or VLA_TRACEBACK=1 in the environment, shows where it comes from.
    """
    trace = "--traceback" in sys.argv or os.environ.get("VLA_TRACEBACK", "") not in ("", "0")
    sys.argv[:] = [arg for arg in sys.argv if arg != "--traceback"]
    if trace:  # what the worker processes of a run look at
        os.environ["VLA_TRACEBACK"] = "1"
    else:  # Orbax logs through absl every trace of every thread of an error that we report
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        main()
    except BrokenPipeError:  # the reader of our output has seen enough: `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if trace:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt as stop:
        print(" ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)


def one_line(error: ValueError | OSError) -> str:
    """The message; of an error of the operating system also what was being done, and never its number alone."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and text.startswith("[Errno "):
        files = " → ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        doing = _DOING.get(Path(sys.argv[0]).stem, "running")
        text = f"while {doing}: {files + ': ' if files else ''}{error.strerror}"
    return " ".join(text.split())


def cli(
    kind: type, *, description: str | None, default: Any = None, argv: Sequence[str] | None = None
) -> Any:
    """An instance of the dataclass `kind` from the command line; raises UsageError.

    Every field, at any depth, is an option (``--train.batch_size 8``; dashes or underscores) and is documented by
    the string under it. Unknown options are answered with the nearest known one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    defaults = {} if default is None else {"default": default}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            value, unknown = tyro.cli(
                kind,
                args=argv,
                description=description,
                return_unknown_args=True,
                prog=f"python -m launch.{Path(sys.argv[0]).stem}",
                config=(tyro.conf.FlagCreatePairsOff,),
                **defaults,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UsageError(_one_line(captured.getvalue())) from None
    sys.stderr.write(captured.getvalue())
    if unknown:
        raise UsageError(_unknown(unknown[0], list(option_names(kind))))
    return value


def cli_with_config(
    kind: type,
    *,
    description: str | None,
    argv: Sequence[str] | None = None,
    adapt: Callable[[Any, Sequence[str]], Any] = lambda config, argv: config,
) -> tuple[Any, Any]:
    """Like `cli`, with ``--config FILE`` and every field of that file's configuration as a further option.

    `adapt` may change the file's configuration before the options do, given the whole command line.
    Returns the `kind` and the configuration. Without ``--config`` (or with ``--help`` alone) the options are those of
    the default configuration.
    """
    from vla_jax.config import TrainConfig

    argv = list(sys.argv[1:] if argv is None else argv)
    path = value_of("--config", argv)
    if path is None and not {"-h", "--help"} & set(argv):
        raise UsageError(f"--config FILE is needed{_known_configs()}")
    config = adapt(TrainConfig() if path is None else load_config(path), argv)
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("args", Annotated[kind, tyro.conf.arg(name="")]),
            ("config", Annotated[Path | None, tyro.conf.arg(help="Python file with get_config().")], None),
            ("values", Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff], config),
        ],
        frozen=True,
        kw_only=True,
    )
    parsed = cli(command, description=description, argv=argv)
    return parsed.args, parsed.values


def load_config(path: str | Path) -> Any:
    """What `get_config()` of a Python file returns; raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}{_known_configs()}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, TypeError, ImportError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "get_config" not in vars(module):
        raise ValueError(f"{path} has no get_config()")
    return module.get_config()


def option_names(kind: Any) -> Iterator[str]:
    """The options of a dataclass of dataclasses: ``--train.batch_size``, …"""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = field.name
        if typing.get_origin(hint) is Annotated:  # a field without a prefix of its own
            hint, *notes = typing.get_args(hint)
            if dataclasses.is_dataclass(hint) and notes:
                yield from option_names(hint)
                continue
        if dataclasses.is_dataclass(hint):
            yield from (f"--{name}.{inner[2:]}" for inner in option_names(hint))
        else:
            yield f"--{name}"


def _unknown(option: str, known: list[str]) -> str:
    if not option.startswith("-"):
        return f"'{option}' does not belong to any option"
    name = option.split("=")[0].replace("-", "_").replace("__", "--", 1)
    # Compare the last part first: people remember batch_size, not where it is.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        k for k in known if k.split(".")[-1] == name.lstrip("-").split(".")[-1]
    ]
    return f"unknown option {option}; " + (f"did you mean {near[0]}?" if near else "--help lists all of them")


def _one_line(box: str) -> str:
    """The message in tyro's box, without the box and the help below it."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    text = " ".join(lines[:rule])
    return re.sub(r"^Error parsing (?:(?:values|args)[\w.-]*: )?", "", text) or box


def value_of(option: str, argv: Sequence[str]) -> str | None:
    """What follows an option on a command line that has not been parsed."""
    for i, arg in enumerate(argv):
        if arg == option and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
    return None


def _known_configs() -> str:
    found = sorted(str(path) for path in Path("configs").glob("*.py") if not path.name.startswith("_"))
    return f"; there are {', '.join(found)}" if found else ""
