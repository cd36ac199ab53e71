"""The progress line, and the clock behind it."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
from tqdm import tqdm

from vla_jax.types import Device


class StepClock:
    """Wall time per step, and the share of it spent waiting for data, since it was last read.

    Steps are counted where their results arrive, so nothing is synchronised on its account. Time spent in
    `paused` (compiling, validating, saving) belongs to no step.
    """

    def __init__(self):
        self._start = time.perf_counter()
        self._steps = 0
        self._wait = self._pause = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around taking the next batch."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around whatever is not a training step."""
        start = time.perf_counter()
        yield
        self._pause += time.perf_counter() - start

    def arrived(self) -> None:
        """One step's results are here."""
        self._steps += 1

    def read(
        self, *, batch_size: int, sample_flops: float, sample_tokens: int, chips: int, peak: float | None
    ) -> dict[str, float]:
        """Seconds per step, data wait, samples (per chip) and tokens per second and MFU since the last call.

        Starts anew. `sample_flops` per training sample (see `flops.py` for the convention of MFU), `sample_tokens`
        with padding, 0 where unknown, `peak` FLOP/s of all `chips`, None where unknown.
        """
        seconds = time.perf_counter() - self._start - self._pause
        steps = max(self._steps, 1)
        samples = self._steps * batch_size / seconds
        perf = {
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._wait / steps,
            "samples_per_second": samples,
            "samples_per_second_per_chip": samples / chips,
        }
        if sample_tokens:
            perf["tokens_per_second"] = samples * sample_tokens
        if peak is not None:
            perf["mfu"] = samples * sample_flops / peak
        self.__init__()
        return perf


def memory_in_use(devices: Sequence[Device]) -> dict[str, float]:
    """GiB of device memory now and at most so far, of the fullest device; empty where the platform does not say."""
    found = [stats for stats in (device.memory_stats() for device in devices) if stats]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {name: max(s.get(key, 0) for s in found) / 2**30 for name, key in names.items()} if found else {}


class Progress:
    """A bar on a terminal, a line now and then in a log file, nothing on hosts other than the first."""

    def __init__(self, *, start: int, steps: int, seconds_between_lines: float = 10.0):
        self._quiet = bool(jax.process_index())
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=steps, unit="step", dynamic_ncols=True, smoothing=0.05)
        self._steps = steps
        self._between = seconds_between_lines
        self._last = -float("inf")

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float], perf: Mapping[str, float]) -> None:
        """Shows the losses of a step and the speed."""
        losses = dict.fromkeys(["loss", "text_loss", *sorted(n for n in metrics if n.endswith("_loss"))])
        parts = {name: f"{float(metrics[name]):.4g}" for name in losses if name in metrics}
        parts["step"] = f"{perf['step_seconds'] * 1e3:.0f}ms"
        parts["wait"] = f"{perf['data_wait_seconds'] * 1e3:.0f}ms"
        parts["samples/s"] = f"{perf['samples_per_second']:.0f}"
        if "tokens_per_second" in perf:
            parts["tokens/s"] = f"{perf['tokens_per_second']:.0f}"
        if "mfu" in perf:
            parts["mfu"] = f"{perf['mfu']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix(parts, refresh=False)
        elif not self._quiet and time.monotonic() - self._last >= self._between:
            self._last = time.monotonic()
            self.say(f"step {step}/{self._steps}  " + "  ".join(f"{k} {v}" for k, v in parts.items()))

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
