"""Starts the processes of a run on this machine, and tells how each of them ended."""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    said: str
    at: float
    """By `time.monotonic`."""

    @property
    def error(self) -> str:
        """Its last line that begins with "error:", or nothing."""
        return next((line for line in reversed(self.said.splitlines()) if line.startswith("error:")), "")


class Group:
    """Some processes of one run.

    **Arguments:**

    - `module`: what to run, with `options`.
    - `devices`: simulated CPU devices of each.
    - `cache`: a folder of compiled programs, shared by all groups.
    - `variables`: further ones of their environment.
    """

    def __init__(
        self,
        module: str,
        options: Sequence[str],
        *,
        processes: int,
        devices: int,
        cache: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        environment.pop("XLA_FLAGS", None)
        with socket.socket() as one:
            one.bind(("localhost", 0))
            address = f"localhost:{one.getsockname()[1]}"
        self.processes, self._logs = [], []
        for i in range(processes):
            command = [sys.executable, "-m", module, *map(str, options)]
            if processes > 1:
                command += [
                    "--coordinator",
                    address,
                    "--num-processes",
                    str(processes),
                    "--process-id",
                    str(i),
                ]
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
            self._logs.append(log)

    def running(self) -> list[int]:
        """The numbers of those that still run."""
        return [i for i, process in enumerate(self.processes) if process.poll() is None]

    def signal(self, i: int, number: int) -> None:
        """Sends a signal to one."""
        self.processes[i].send_signal(number)

    def wait(self, patience: float) -> list[Ended]:
        """Waits for all; those that run longer than `patience` seconds are killed (code -9)."""
        end, times = time.monotonic() + patience, {}
        while len(times) < len(self.processes):
            for i, process in enumerate(self.processes):
                if i not in times and process.poll() is not None:
                    times[i] = time.monotonic()
            if time.monotonic() > end:
                for process in self.processes:
                    process.kill()
            time.sleep(0.02)
        found = []
        for i, log in enumerate(self._logs):
            log.seek(0)
            while self.processes[i].returncode < 0 and "ended suddenly" not in log.read():
                if time.monotonic() > max(times.values()) + 30:
                    break
                time.sleep(0.1)  # its helper says it on its behalf
                log.seek(0)
            log.seek(0)
            found.append(Ended(self.processes[i].returncode, log.read(), times[i]))
            log.close()
        return found
