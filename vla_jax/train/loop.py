"""The training loop: restore or initialise, step, log, validate, save.

It knows nothing of robots or of models: a `Job` brings the functions. Three rules shape it. Nothing waits for the
device: results are read two steps late, while the next steps already run. Whatever a run writes to
``metrics.jsonl`` or into a checkpoint is a function of (config, data, step), so that a run that was killed and
started again ends with the same bytes. And all processes take the same turns: whatever decides between two ways is
either the same everywhere or agreed upon (`interrupt.Vote`).
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from vla_jax.checkpoint import Checkpoints
from vla_jax.checkpoint.paths import Path, is_remote, write_atomically
from vla_jax.checkpoint.shared import make_shared
from vla_jax.sharding import activate, batch_sharding, check_batch, distributed
from vla_jax.train.cluster.beats import COMPILING, RESTORING, STEP
from vla_jax.train.cluster.interrupt import StopSignal, Vote
from vla_jax.train.cluster.watchdog import Watchdog
from vla_jax.train.compiled import jit_train_step
from vla_jax.train.config import LoopConfig
from vla_jax.train.flops import total_peak
from vla_jax.train.ledger import Ledger
from vla_jax.train.memory import explained
from vla_jax.train.metrics import MetricsLog
from vla_jax.train.overlap import settled
from vla_jax.train.prefetch import Prefetch
from vla_jax.train.profile import Profiler, Steps
from vla_jax.train.progress import Progress, StepClock, memory_in_use
from vla_jax.train.state import StateBuilder, TrainState
from vla_jax.types import Batch, PyTree

IN_FLIGHT = 2
"""Steps the host may be ahead of the results it has read (on CPU none: there is nothing to overlap)."""

FREE_TO_CHANGE = (
    "mesh.",
    "solver.",
    "execute",
    "model.remat",
    "model.attention",
    "model.unroll",
    "train.accumulate",
    "train.xla",
    "train.log_every",
    "train.val_",
    "train.save_every",
    "train.keep",
    "train.max_skipped",
    "train.host_timeout",
    "train.hang_timeout",
    "train.tensorboard",
    "train.wandb",
    "objective.diagnostics.",
    "data.path",  # the data's fingerprint is compared instead
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.cache_mb",
)
"""Fields that may differ when a run is continued: they change how it is computed or reported, not what."""

PLACEMENT = "placement.txt"
"""In a run's directory: where this start's arrays lie."""

SKIPPED = "skipped_in_a_row"
"""In a checkpoint's metadata: a run that diverges stops at the same step whether it was interrupted or not."""

METRICS = "metrics"
"""In a checkpoint's metadata: what metrics.jsonl held (`metrics.Written`)."""

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


class TrainingDiverged(ValueError):
    """Too many steps in a row had no finite loss or gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that the loop is given: step, data, initial parameters and what checkpoints say."""

    builder: StateBuilder
    """Shapes, shardings and initialiser of the state."""
    schedule: optax.Schedule
    """Learning rate by step, for the log."""
    train_step: TrainStep
    """Pure; its metrics hold ``skipped``, 1 where the update was left out."""
    validate: Callable[[PyTree, Iterator[Batch]], dict[str, Any]] | None
    """(parameters, device batches) → metrics; None: no validation."""
    batches: Callable[[int], Iterator[Batch]]
    """Host batches from a step on; of each the rows that lie on this process's devices (`sharding.local_rows`)."""
    val_batches: Callable[[], Iterator[Batch]]
    """Host batches of one validation, the same rows."""
    meta: Mapping[str, Any]
    """JSON values that are saved with the parameters: `config` (resolved), `data_fingerprint`, and whatever a
    policy needs."""
    sample_flops: float
    """Analytic FLOPs of one training sample."""
    key: PRNGKeyArray
    """Initialises the parameters."""
    sample_tokens: int = 0
    """Tokens of one training sample, padding included; 0: not known."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The config's defaults, as JSON: what a checkpoint means that is older than a field."""
    placement: str = ""
    """Where every array lies, for people; kept in ``placement.txt``."""
    identity: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda meta: {
        key: json.loads(json.dumps(meta[key])) for key in ("config", "data_fingerprint")
    }
    """What of `meta`, and of a checkpoint's metadata, must be the same on continuing, as JSON values."""
    start: Callable[[], dict[str, Any] | None] = lambda: None
    """Reads the parameters, by path, that a new run does not draw; not called where it continues."""


def fit(
    job: Job,
    loop: LoopConfig,
    run_dir: str | os.PathLike,
    *,
    watchdog: Watchdog | None = None,
    stop: StopSignal | None = None,
    profile: Steps | None = None,
    begun: float | None = None,
    extend: bool = False,
) -> TrainState:
    """Trains until `loop.steps`, or until told to stop, and returns the last state.

    Everything goes to `run_dir`, a directory that all processes share; where it holds a checkpoint, training
    continues from it, with `extend` also to more steps than it was begun with. `stop` is given where signals were to be
    heeded before this; `begun` is when the command began (`time.monotonic`). Raises ValueError where that checkpoint
    belongs to another config or the processes do not share the directory, OutOfMemory and TrainingDiverged.
    """
    begun = time.monotonic() if begun is None else begun
    mesh = job.builder.mesh
    check_batch(loop.batch_size, loop.accumulate, mesh)
    with contextlib.ExitStack() as stack:
        if watchdog is None:
            watchdog = stack.enter_context(_watchdog(loop))
        if stop is None:
            stop = stack.enter_context(StopSignal())
        run_dir = make_shared(run_dir)
        stack.enter_context(_only_one(run_dir))
        checkpoints = Checkpoints(run_dir, keep=loop.keep)
        stack.callback(checkpoints.close)
        stack.enter_context(watchdog.guard())  # before anything above waits for a process that has failed
        stack.enter_context(explained(watchdog))
        watchdog.at(0, RESTORING)
        state, start, planned, meta = _restore_or_init(job, checkpoints, extend)
        progress = Progress(start=start, steps=loop.steps)
        stack.callback(progress.close)
        if not _goes_on(job, loop, run_dir, start, planned, stop, progress):
            return state
        log = _open_records(job, loop, run_dir, start, meta.get(METRICS))
        stack.callback(log.close)
        ledger = Ledger(None if jax.process_index() else run_dir / "goodput.json", step=start, begun=begun)
        batches = stack.enter_context(Prefetch(job.batches(start), batch_sharding(mesh)))
        profiler = Profiler(profile, run_dir / "profile")
        stack.callback(profiler.close)
        trainer = _Trainer(
            job, loop, checkpoints, log, progress, watchdog, ledger, profiler, meta.get(SKIPPED, 0)
        )
        state, step = trainer.run(state, start, batches, stop)
        with ledger.spent("checkpoint"):
            watchdog.at(step, "finishing the checkpoint")
            checkpoints.wait()
        log.perf(step, ledger.perf())
        ledger.write()
        progress.say(ledger.table())
        if trainer.diverged is not None:
            raise TrainingDiverged(f"{trainer.diverged}; checkpoint {step} is saved")
        progress.say(_how_it_ended(run_dir, step, loop.steps, stop))
        return state


def _goes_on(
    job: Job, loop: LoopConfig, run_dir: Path, start: int, planned: int, stop: StopSignal, progress: Progress
) -> bool:
    """Whether steps remain and no process was told to stop; says where the run stands."""
    if planned != loop.steps:
        rate = float(jax.device_get(job.schedule(start)))
        progress.say(
            f"train.steps {planned} → {loop.steps}: from step {start + 1} on the schedules of learning rate and λ "
            f"are those of {loop.steps} steps; the next learning rate is {rate:.3g}"
        )
    if start >= loop.steps:
        progress.say(f"{run_dir} is finished: step {start} of {loop.steps}")
        return False
    if not distributed.all_agree("begin", not stop.requested):
        progress.say(f"stopped before step {start + 1}; run the same command to continue")
        return False
    if start:
        progress.say(f"continuing {run_dir} from step {start} of {loop.steps}")
    return True


def _open_records(
    job: Job, loop: LoopConfig, run_dir: Path, start: int, written: Mapping[str, Any] | None
) -> MetricsLog:
    """Writes configuration and placement, and opens the metrics' files where the checkpoint left them."""
    config = job.meta["config"]
    if not jax.process_index():
        write_atomically(run_dir / "config.json", json.dumps(config, indent=2) + "\n")
        if job.placement:
            write_atomically(run_dir / PLACEMENT, job.placement)
    return MetricsLog(
        run_dir,
        start=start,
        tensorboard=loop.tensorboard,
        wandb=loop.wandb,
        config=config,
        written=written,
    )


def _how_it_ended(run_dir: Path, step: int, steps: int, stop: StopSignal) -> str:
    if step >= steps:
        return f"finished: {run_dir}, step {step}"
    asked = f" {time.monotonic() - stop.since:.1f} s after being told to" if stop.since is not None else ""
    return f"stopped and saved at step {step} of {steps}{asked}; run the same command to continue"


def _watchdog(loop: LoopConfig) -> Watchdog:
    return Watchdog(silent_after=loop.host_timeout, stuck_after=loop.hang_timeout)


class _Trainer:
    """The running loop: its job, logs, checkpoints and watchers, and how many steps were skipped."""

    def __init__(
        self,
        job: Job,
        loop: LoopConfig,
        checkpoints: Checkpoints,
        log: MetricsLog,
        progress: Progress,
        watchdog: Watchdog,
        ledger: Ledger,
        profiler: Profiler,
        skipped: int,
    ):
        self.job, self.loop = job, loop
        self.checkpoints, self.log, self.progress = checkpoints, log, progress
        self.watchdog, self.ledger, self.profiler = watchdog, ledger, profiler
        self.pending: collections.deque[tuple[int, dict[str, Any], Any]] = collections.deque()
        self.skipped, self.skipped_in_all = skipped, 0
        """Steps left out in a row up to now, and all of this start."""
        self.stop = False
        """Whether the processes have agreed to stop."""
        self.diverged: str | None = None
        """Why training makes no sense any more."""
        devices = job.builder.mesh.devices.flatten().tolist()
        self.chips, self.peak = len(devices), total_peak(devices)
        if self.peak is None:
            progress.say(f"no MFU: the peak of a {devices[0].device_kind} is not in train/flops.py")
        self.in_flight = 0 if devices[0].platform == "cpu" else IN_FLIGHT
        self.clock = StepClock()

    def run(
        self, state: TrainState, step: int, batches: Iterator[Batch], stop: StopSignal
    ) -> tuple[TrainState, int]:
        """Steps until the end or the signal; the last step is saved."""
        loop, vote = self.loop, Vote(self.job.builder.mesh)
        self.watchdog.at(step + 1, "waiting for data")
        batch = next(batches)
        train_step = self._compile(state, batch, step + 1)
        self.ledger.begin()
        while True:
            self.profiler.before(step + 1)
            self.watchdog.at(step + 1, STEP)
            state, metrics = train_step(state, batch)
            step += 1
            self.pending.append((step, settled(metrics), vote.cast(stop.requested)))
            self._read(self.in_flight)
            if self.profiler.last(step):
                self._read(0)
                self.profiler.close()
            last = step == loop.steps or self.stop or self.diverged is not None
            if loop.val_every and (step % loop.val_every == 0 or step == loop.steps):
                self._validate(state, step)
            if step % loop.save_every == 0 or last:
                self._save(state, step)
            if last:
                return state, step
            self.watchdog.at(step + 1, "waiting for data")
            with self.clock.waiting(), self.ledger.spent("data"):
                batch = next(batches)

    def _compile(self, state: TrainState, batch: Batch, step: int):
        builder = self.job.builder
        self.watchdog.at(step, COMPILING)
        with self.clock.paused(), self.ledger.spent("compile"), activate(builder.mesh):
            self.progress.say("compiling the training step …")
            start = time.perf_counter()
            compiled = (
                jit_train_step(self.job.train_step, builder, self.loop.xla).lower(state, batch).compile()
            )
            self.progress.say(f"compiled in {time.perf_counter() - start:.1f} s")
            # The first step opens connections, for which no process waits longer than its network's library likes.
            distributed.barrier("compiled")
            return compiled

    def _read(self, leave: int) -> None:
        """Takes in the results of all but the newest `leave` steps; waits for those that still run."""
        while len(self.pending) > leave:
            step, metrics, stop = self.pending.popleft()
            skipped = bool(metrics["skipped"])
            self.stop = self.stop or bool(stop)
            self.skipped = self.skipped + 1 if skipped else 0
            self.skipped_in_all += skipped or bool(metrics.get("spiked", False))
            self.clock.arrived()
            self.progress.advance()
            if self.skipped >= self.loop.max_skipped:
                self.diverged = self.diverged or (
                    f"step {step}: loss or gradient was not finite {self.skipped} times in a row; lower "
                    "optim.learning_rate, look at the data, or raise train.max_skipped"
                )
            if step % self.loop.log_every == 0:
                self._report(step, jax.device_get(metrics))

    def _report(self, step: int, metrics: dict[str, Any]) -> None:
        self.log.metrics(step, metrics | {"learning_rate": self.job.schedule(step - 1)})
        perf = self.clock.read(
            batch_size=self.loop.batch_size,
            sample_flops=self.job.sample_flops,
            sample_tokens=self.job.sample_tokens,
            chips=self.chips,
            peak=self.peak,
        )
        perf |= memory_in_use(self.job.builder.mesh.local_devices)
        perf |= self.ledger.perf() | {"skipped_steps": self.skipped_in_all}
        self.log.perf(step, perf)
        self.ledger.write_now_and_then()
        self.progress.show(step, metrics, perf)

    def _validate(self, state: TrainState, step: int) -> None:
        if self.job.validate is None:
            return
        self._read(0)
        self.watchdog.at(step, "validating")
        mesh = self.job.builder.mesh
        params = state.whole(averaged=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.clock.paused())
            stack.enter_context(self.ledger.spent("evaluation"))
            batches = stack.enter_context(Prefetch(self.job.val_batches(), batch_sharding(mesh)))
            with activate(mesh):
                metrics = jax.device_get(self.job.validate(params, batches))
            self.log.metrics(step, {f"val/{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {float(v):.4g}" for name, v in metrics.items() if v.ndim == 0)
        self.progress.say(f"step {step} validation: {shown}")

    def _save(self, state: TrainState, step: int) -> None:
        self._read(0)
        self.watchdog.at(step, "saving")
        with self.clock.paused(), self.ledger.spent("checkpoint"):
            self.log.sync()
            self.checkpoints.save(
                step, state.items(), {**self.job.meta, SKIPPED: self.skipped, METRICS: self.log.written()}
            )
        self.ledger.saved(step)


def _restore_or_init(
    job: Job, checkpoints: Checkpoints, extend: bool
) -> tuple[TrainState, int, int, Mapping[str, Any]]:
    """State, steps done, the steps that the run had planned, and the checkpoint's metadata; none where the run is new.

    Only with `extend` may that be fewer than the configuration's.
    """
    steps = job.meta["config"]["train"]["steps"]
    shapes = job.builder.shapes
    restored = checkpoints.restore_latest(
        shapes.items(),
        same=job.identity(job.meta),
        identity=job.identity,
        free=(*FREE_TO_CHANGE, "train.steps"),
        defaults=job.defaults,
    )
    if restored is None:
        return job.builder.init(job.key, job.start()), 0, steps, {}
    planned = restored.meta["config"]["train"]["steps"]
    if planned > steps:
        raise ValueError(
            f"train.steps={steps}, but {checkpoints.directory.parent} was planned with {planned}: a run can be "
            "continued with as many or more; to use what it has learned so far, start another with train.init_from"
        )
    if planned < steps and not extend:
        raise ValueError(
            f"{checkpoints.directory.parent} was planned with train.steps={planned}, not {steps}; --extend continues "
            "it, with the schedules of learning rate and λ stretched to the new end, or use another run directory"
        )
    step = jax.device_put(jax.numpy.int32(restored.step), shapes.step.sharding)
    return TrainState.from_items(step, restored.items), restored.step, planned, restored.meta


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Two processes that train into one directory would ruin it; the lock ends with its process, however that ends."""
    if jax.process_index() or is_remote(run_dir):
        yield
        return
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{run_dir} is being trained by another process; use another --run-dir"
            ) from error
        yield
