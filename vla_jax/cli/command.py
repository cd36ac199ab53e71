"""What all commands share: the command line, and errors in one line.

A command is a module with

    def main() -> None:
        args = cli(Args, description=__doc__)
        ...

that `entry` and the stubs in `launch` start by ``run(main)``.
"""

import contextlib
import dataclasses
import difflib
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

from vla_jax.cli import config_file

PROGRAM = "vla-jax"
"""The installed program. Where it was started, `sys.argv[0]` is its name and the command's, e.g. ``vla-jax train``."""

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
"""What each command does, for errors that name no more than a file."""


class UsageError(ValueError):
    """A command line that means nothing."""


def run(main: Callable[[], None]) -> None:
    """Runs a command; an expected error becomes one line on stderr and exit code 2.

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
        doing = _DOING.get(_started()[-1], "running")
        text = f"while {doing}: {files + ': ' if files else ''}{error.strerror}"
    return " ".join(as_typed(text).split())


def typed(command: str) -> list[str]:
    """The words that start a command in the way in which the running one was started."""
    if _started()[0] == PROGRAM:
        return [PROGRAM, command.replace("_", "-")]
    return ["python", "-m", f"launch.{command}"]


def as_typed(text: str) -> str:
    """A text in which the commands of a checkout are those that the user can type.

    Texts speak of ``launch.train`` or ``python -m launch.train``; an installed vla_jax has no `launch`.
    """
    if _started()[0] != PROGRAM:
        return text
    return re.sub(r"(?:python -m )?\blaunch\.([a-z_]+)\b", lambda found: " ".join(typed(found[1])), text)


def _started() -> tuple[str, str]:
    """Who runs: ``("vla-jax", "train_fast")``, or package and module of ``python -m launch.train_fast``."""
    program, _, command = sys.argv[0].partition(" ")
    if program == PROGRAM and command:
        return program, command.replace("-", "_")
    path = Path(sys.argv[0])
    return path.parent.name, path.stem


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
                description=as_typed(description or ""),
                return_unknown_args=True,
                prog=_prog(),
                config=(tyro.conf.FlagCreatePairsOff,),
                **defaults,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UsageError(_one_line(captured.getvalue())) from None
    sys.stderr.write(captured.getvalue())
    if unknown:
        raise UsageError(_unknown(unknown[0], list(option_names(kind, default))))
    return value


def _prog() -> str:
    """What ``usage:`` begins with."""
    package, module = _started()
    return " ".join(typed(module)) if package == PROGRAM else f"python -m {package}.{module}"


def cli_with_config(
    kind: type,
    *,
    description: str | None,
    argv: Sequence[str] | None = None,
    adapt: Callable[[Any, Sequence[str]], Any] = lambda config, argv: config,
) -> tuple[Any, Any]:
    """Like `cli`, with ``--config FILE`` and every field of that file's configuration as a further option.

    `adapt` may change the file's configuration before the options do, given the whole command line.
    ``--model.expert.kind dit`` (and every other ``….kind`` of a table) puts that kind's defaults in the place of the
    file's, with what both have in common as there; then the options are its own.
    Returns the `kind` and the configuration. Without ``--config`` (or with ``--help`` alone) the options are those of
    the default configuration.
    """
    from vla_jax.config import TrainConfig
    from vla_jax.models.kinds import choices, with_kinds

    argv = list(sys.argv[1:] if argv is None else argv)
    path = value_of("--config", argv)
    if path is None and not {"-h", "--help"} & set(argv):
        known = ", ".join(config_file.known_configs())
        raise UsageError(f"--config FILE is needed; there are {known}")
    config = adapt(TrainConfig() if path is None else config_file.load_config(path), argv)
    config = with_kinds(config, dict(_kinds_chosen(argv)))
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("args", Annotated[kind, tyro.conf.arg(name="")]),
            ("config", Annotated[Path | None, tyro.conf.arg(help=config_file.HELP)], None),
            ("values", Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff], config),
        ],
        frozen=True,
        kw_only=True,
    )
    kinds = ", ".join(f"--{option} {'|'.join(names)}" for option, names in choices(config))
    description = (
        f"{description or ''}\n\nParts of which there are several kinds, with options of their own: {kinds}."
    )
    parsed = cli(command, description=description, argv=argv)
    return parsed.args, parsed.values


def option_names(kind: Any, default: Any = None) -> Iterator[str]:
    """The options of a dataclass of dataclasses: ``--train.batch_size``, …

    Of fields that may have several kinds those of the kind that `default`, or the field's default, has.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = field.name
        value = field.default if default is None else getattr(default, name)
        inside = type(value) if dataclasses.is_dataclass(value) else None
        if typing.get_origin(hint) is Annotated:  # a field without a prefix of its own
            hint, *notes = typing.get_args(hint)
            if dataclasses.is_dataclass(hint) and notes:
                yield from option_names(inside or hint, value if inside else None)
                continue
        if dataclasses.is_dataclass(hint):
            inner = option_names(inside or hint, value if inside else None)
            yield from (f"--{name}.{option[2:]}" for option in inner)
        else:
            yield f"--{name}"


def _kinds_chosen(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``model.expert.kind`` and its value, of every option of that form."""
    for i, arg in enumerate(argv):
        option, equals, value = arg.partition("=")
        if option.startswith("--") and option.endswith(".kind") and (equals or i + 1 < len(argv)):
            yield option[2:].replace("-", "_"), value if equals else argv[i + 1]


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
