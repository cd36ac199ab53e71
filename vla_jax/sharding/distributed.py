"""The processes of one run: how they find each other, agree, and speak to people.

`initialize` is the only place that starts `jax.distributed`; call it before anything asks for a device. Without a
cluster everything here means one process, at no cost. What is exchanged goes through the coordination service,
a small key-value store in process 0, never through the devices: it works while they are busy or stuck.
"""

import collections
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import jax
from jax._src import distributed as _jax_distributed  # the store and its barriers have no public name

from vla_jax.sharding import last_words

LOST = 3
"""Exit code where another process is the reason: start all of them again."""

START_TIMEOUT = 300.0
"""Seconds that the processes wait for each other at the start."""

_GRACE = 60
"""Seconds that JAX may wait longer than we do: its own timeout ends the process with a C++ stack trace."""

_HEARTBEAT_TIMEOUT = 1800
"""JAX's own detection of dead processes ends them without a word about which; ours (train/cluster/watchdog.py) is far
quicker. It stays on, for the case that ours is gone too."""

_BARRIER_TIMEOUT = 24 * 3600
"""In seconds. Who waits too long is the watchdog's business, which can say for whom."""

_calls: collections.Counter[str] = collections.Counter()


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = START_TIMEOUT,
) -> None:
    """Joins the cluster, if there is one: that of the arguments, or what JAX finds in the environment.

    JAX knows Cloud TPU (also several slices), GKE, SLURM and Open MPI, and the environment variables
    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` stand for the arguments. On CPU the
    processes' collectives run over gloo.

    Raises ValueError where only some of the three are known. Where not all processes are there after `start_timeout`
    seconds, says so in one line and ends this one with the exit code LOST.
    """
    if start_timeout <= 0:
        raise ValueError(f"--start-timeout {start_timeout}: must be above 0 seconds")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "JAX_PROCESS_ID")
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give all of "
            f"{', '.join(given)}, or none and let the cluster be detected"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        if ":" not in coordinator:
            raise ValueError(f"--coordinator {coordinator} has no port; give HOST:PORT of process 0")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id {process_id} must be from 0 to {num_processes - 1}")
    # Stopping is agreed upon by the training loop itself; JAX's handler would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _together_within(start_timeout):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if missing else "deactivate",
                initialization_timeout=int(start_timeout) + _GRACE,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=60,
            )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return  # no cluster: one process
    if process_count() > 1:
        address = _jax_distributed.global_state.coordinator_address
        assert address is not None  # there are several processes
        last_words.leave(me(), address)


@contextlib.contextmanager
def _together_within(seconds: float) -> Iterator[None]:
    """Ends this process where the body, in which it waits for the others, takes longer."""
    together = threading.Event()

    def watch() -> None:
        if not together.wait(seconds):
            _give_up(seconds)

    threading.Thread(target=watch, name="start", daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        _give_up(seconds, str(error).strip().splitlines()[0])
    finally:
        together.set()


def _give_up(seconds: float, reason: str = "") -> NoReturn:
    """Says who did not come, as far as that can be known: the coordinator answers or it does not."""
    state = _jax_distributed.global_state
    where = f"the coordinator, process 0 at {state.coordinator_address}"
    if not process_index():
        time.sleep(
            min(2.0, seconds)
        )  # the others may have begun to wait later, and want to say so themselves
        found = reason or "another process was not started, or ended before it came"
    elif _answers(state.coordinator_address):
        found = reason or f"{where}, is there, but another process was not started, or ended before it came"
    else:
        found = f"{where}, does not answer"
    print(
        f"error: [{me()}] not all processes came together within {seconds:.0f} s (--start-timeout): {found}; "
        "start all of them again, with the same --coordinator",
        file=sys.stderr,
        flush=True,
    )
    leave_at_once(LOST)


def _answers(address: str | None) -> bool:
    host, _, port = (address or "").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def shutdown(patience: float = 30.0) -> None:
    """Leaves the cluster once all processes do; where one does not within `patience` seconds, ends this one, in order.

    For the end of a run: nothing is left to do then, so that a process that died on its way out harms nobody.
    """
    store = client()
    if store is not None:
        try:
            store.wait_at_barrier("vla/leave", int(1000 * patience))
        except RuntimeError:
            say("warning: another process did not come to the end; what this one had to do is done")
            leave_at_once(0)
    jax.distributed.shutdown()
    last_words.take_back()


def leave_at_once(code: int) -> NoReturn:
    """Ends this process without waiting for the others, which an orderly exit would."""
    last_words.take_back()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def client():
    """The coordination service's client; None in a process that is alone."""
    return _jax_distributed.global_state.client if process_count() > 1 else None


def coordinator() -> str | None:
    """HOST:PORT of process 0; None in a process that is alone."""
    return _jax_distributed.global_state.coordinator_address


def process_index() -> int:
    """This process's number; unlike `jax.process_index` it starts no backend."""
    return _jax_distributed.global_state.process_id


def process_count() -> int:
    """How many processes the run has; starts no backend."""
    return _jax_distributed.global_state.num_processes


def me() -> str:
    """This process, for people."""
    return f"process {process_index()} of {process_count()} ({socket.gethostname()})"


def say(message: str) -> None:
    """One line on stderr, with the process's name where there are several."""
    prefix = f"[{me()}] " if process_count() > 1 else ""
    print(f"{prefix}{message}", file=sys.stderr, flush=True)


def gather(name: str, value: str) -> list[str]:
    """Every process's `value`, in order. All must call it, with the same `name`, the same number of times."""
    store = client()
    if store is None:
        return [value]
    key = f"vla/gather/{name}/{_calls[name]}"
    _calls[name] += 1
    store.key_value_set(f"{key}/{process_index()}", value)
    store.wait_at_barrier(key, _BARRIER_TIMEOUT * 1000)
    found = {int(path.rsplit("/", 1)[1]): text for path, text in store.key_value_dir_get(key)}
    return [found[i] for i in range(process_count())]


def barrier(name: str) -> None:
    """Returns once all processes are here."""
    gather(name, "")


def all_agree(name: str, ok: bool) -> bool:
    """Whether all processes say yes."""
    return all(answer == "yes" for answer in gather(name, "yes" if ok else "no"))


def check_same(
    facts: Mapping[str, str],
    details: Mapping[str, Mapping[str, object]] | None = None,
    *,
    mend: str = "start all of them from the same command and code",
) -> None:
    """Raises ValueError, on every process, where a fact is not the same on all of them; names who differs.

    **Arguments:**

    - `facts`: short texts by name, such as a config's hash.
    - `details`: for some of them the fields behind the text, so that the differing ones can be named.
    - `mend`: what to do about it.
    """
    hosts = gather("host", socket.gethostname())
    for name, value in facts.items():
        values = gather(name, value)
        usual = max(values, key=lambda v: (values.count(v), v == values[0]))
        odd = [i for i, v in enumerate(values) if v != usual]
        if not odd:
            continue
        fields = (details or {}).get(name)
        difference = f"{values[odd[0]]!r} instead of {usual!r}"
        if fields is not None:
            everyone = gather(f"{name} fields", _as_lines(fields))
            mine, theirs = everyone[odd[0]], everyone[values.index(usual)]
            difference = _difference(mine.splitlines(), theirs.splitlines()) or difference
        others = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise ValueError(
            f"process {odd[0]} ({hosts[odd[0]]}){others} has another {name} than the other processes: "
            f"{difference}; {mend}"
        )


def _as_lines(fields: Mapping[str, object]) -> str:
    return "\n".join(f"{name}={value!r}" for name, value in sorted(fields.items()))


def _difference(one: Sequence[str], other: Sequence[str]) -> str:
    mine, theirs = (sorted(set(a) - set(b)) for a, b in ((one, other), (other, one)))
    if not mine and not theirs:
        return ""
    return f"{', '.join(mine[:4]) or 'nothing'} instead of {', '.join(theirs[:4]) or 'nothing'}"


def _number(value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    text = os.environ[variable]
    if not text.isdigit():
        raise ValueError(f"{variable}={text} is not a number")
    return int(text)
