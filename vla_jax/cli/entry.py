"""``vla-jax COMMAND OPTIONS``: the commands of an installed vla_jax, from any directory.

From a checkout ``python -m launch.COMMAND OPTIONS`` is the same. The installed package has no `launch`: other packages
have that name, ROS 2's among them.
"""

import difflib
import importlib
import sys
from types import ModuleType

from vla_jax.cli.command import PROGRAM, UsageError, run

COMMANDS = {
    "collect": "demonstrations of scripted experts, as a data set",
    "train": "train a policy, or go on where it stopped",
    "train-fast": "train a FAST tokenizer of action chunks",
    "sweep": "train many models in one compiled program",
    "report": "tables and figures of sweeps",
    "evaluate": "success, collisions and latency in closed loop",
    "sample": "pictures of sampled action chunks",
    "benchmark": "latency by part, throughput, roofline",
    "compile": "the real program compiled for an absent TPU pod",
    "serve": "a websocket server that robots talk to",
    "replay": "recorded requests once more, and whether the answers are the same",
    "convert": "weights of other libraries, in and out",
    "toy": "flow and diffusion in the plane",
    "images": "flow on small images",
    "quickstart": "data, training, evaluation and pictures in one go",
}
"""Name → what it does. The module of the same name (dashes are underscores) has its options and its `main`."""


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: vla-jax COMMAND OPTIONS     vla-jax COMMAND --help", "", *lines])


def main() -> None:
    """Runs the command that is named first on the command line; the list of commands loads none of them."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return run(lambda: print(usage(), flush=True))
    name = sys.argv[1].replace("_", "-")
    sys.argv[:2] = [f"{PROGRAM} {name}"]
    run(lambda: _module(name).main())


def _module(name: str) -> ModuleType:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"vla_jax.cli.{name.replace('-', '_')}")
