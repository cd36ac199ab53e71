"""From a configuration to a trained policy: puts data, model, objective and optimiser together for the loop."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from vla_jax.checkpoint import Saved, open_newest, read_meta
from vla_jax.checkpoint.manager import flatten
from vla_jax.checkpoint.paths import run_path
from vla_jax.config import TrainConfig, config_hash, to_json, upgraded
from vla_jax.data.bundle import DataBundle, prepare
from vla_jax.data.index import DatasetIndex, index_dataset, split_episodes
from vla_jax.data.loader import Loader, make_loader
from vla_jax.flow.processes import Process, make_process
from vla_jax.layers.attention import check_backend
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.weighting import trunk
from vla_jax.objectives.weighting.config import OPTIONS
from vla_jax.sharding import (
    batch_sharding,
    check_batch,
    check_prefix,
    check_unsharded,
    distributed,
    local_rows,
    make_mesh,
    placement,
    replicated,
)
from vla_jax.train import spikes
from vla_jax.train.cluster.hosts import bundle_hash, code_hash
from vla_jax.train.cluster.interrupt import StopSignal
from vla_jax.train.cluster.watchdog import Watchdog
from vla_jax.train.flops import train_flops
from vla_jax.train.init_from import check_start, read_start
from vla_jax.train.loop import PLACEMENT, Job, fit
from vla_jax.train.optim import learning_rate, make_optimizer
from vla_jax.train.overlap import settled
from vla_jax.train.parts import init_params, make_parts
from vla_jax.train.profile import Steps
from vla_jax.train.state import InitParams, StateBuilder, state_builder
from vla_jax.train.step import add_up, make_eval_step, make_train_step
from vla_jax.train.weigh import policy_of
from vla_jax.types import Batch, PyTree


def train(
    config: TrainConfig,
    run_dir: str | os.PathLike,
    *,
    dry_run: bool = False,
    extend: bool = False,
    profile: Steps | None = None,
    begun: float | None = None,
    start_timeout: float = distributed.START_TIMEOUT,
) -> None:
    """Trains, or continues to train, into `run_dir`; with `dry_run` only prints what would happen. `extend`: a run may
    be continued with more steps than it was begun with.

    With several processes all call it, after `sharding.distributed.initialize`. `begun` is when the command began
    (`time.monotonic`), for the ledger; `start_timeout` the seconds that a process has until it is heard of.

    Raises ValueError, FileNotFoundError and OSError with one clear line each; see `loop.fit`.
    """
    begun = time.monotonic() if begun is None else begun
    loop = config.train
    watchdog = Watchdog(
        silent_after=loop.host_timeout, stuck_after=loop.hang_timeout, start_timeout=start_timeout
    )
    with StopSignal() as stop, watchdog:
        check_hosts(config)
        mesh = make_mesh(config.mesh)
        check_batch(loop.batch_size, loop.accumulate, mesh)
        bundle = prepare_together(config, floor=has_floor(run_dir))
        config = resolve(config, bundle)
        patches = config.model.backbone.image_tokens
        check_prefix(len(config.model.cameras) * patches + config.data.max_text_tokens, patches, mesh)
        job = make_job(config, bundle, mesh)
        prepared = bundle_hash(bundle)
        distributed.check_same(
            {"data": job.meta["data_fingerprint"], "preparation of the data": prepared.short},
            details={"preparation of the data": prepared.parts},
            mend="give all of them the same data set, with what is kept beside it, and the same data.tokenizer",
        )
        check_weighting_state(run_dir, config)
        table = placement(job.builder.shapes, job.builder.shardings, mesh)
        check_unsharded(table, config.mesh.max_unsharded)
        if not jax.process_index():
            print(describe(json.loads(to_json(config))))
            print("".join(f"note: {line}\n" for line in bundle.constant_dims), end="")
            if dry_run:
                print(f"{table.table()}\n{table.summary()}", flush=True)
                if loop.init_from and not _has_checkpoint(run_dir):
                    print(
                        "\n".join(check_start(config, job.builder.shapes.whole(averaged=False))), flush=True
                    )
            else:
                print(f"{table.summary()}; array by array: {run_path(run_dir) / PLACEMENT}", flush=True)
        if not dry_run:
            job = dataclasses.replace(job, placement=f"{table.table()}\n{table.summary()}\n")
            fit(job, loop, run_dir, watchdog=watchdog, stop=stop, profile=profile, begun=begun, extend=extend)


def _has_checkpoint(run_dir: str | os.PathLike) -> bool:
    try:
        read_meta(run_dir)
    except FileNotFoundError:
        return False
    return True


def check_hosts(config: TrainConfig) -> None:
    """Raises ValueError, on every process, where one of them was started differently; see `distributed`."""
    fields = {name: value for name, value in flatten(json.loads(to_json(config))).items()}
    local = [field for field in fields if field in ("data.path",)]  # hosts may keep the same data elsewhere
    fields = {name: value for name, value in fields.items() if name not in local}
    code = code_hash()
    distributed.check_same(
        {
            "config": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12],
            "code": code.short,
            "number of devices": f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}",
        },
        details={"config": fields, "code": code.parts},
    )


def has_floor(run_dir: str | os.PathLike) -> bool:
    """Whether scales have a least value (`Normalize.floor`): in a new run, and in one that was begun so."""

    def read(saved: Saved) -> bool:
        data = saved.meta.get("data")
        if data is None:
            return True
        return saved.built("statistics", lambda: DataBundle.from_json(data)).normalize.floor

    try:
        return open_newest(run_dir, read)
    except FileNotFoundError:
        return True


def prepare_together(config: TrainConfig, *, floor: bool = True) -> DataBundle:
    """`prepare_data`, first in process 0: what it computes is kept beside the data for the others."""
    bundle = None if distributed.process_index() else prepare_data(config, floor=floor)
    distributed.barrier("data are prepared")
    return prepare_data(config, floor=floor) if bundle is None else bundle


def prepare_data(config: TrainConfig, *, floor: bool = True) -> DataBundle:
    """Transforms, statistics and tokenizer of the configured data set; `floor` as in `data.bundle.prepare`."""
    if not config.data.path:
        raise ValueError("data.path is not set; give --data.path DIR, a data set of launch.collect")
    expert = config.model.expert
    return prepare(
        config.data,
        cameras=config.model.cameras if config.model.backbone.reads_images else None,
        state_dim=expert.state_dim,
        action_dim=expert.action_dim,
        horizon=expert.horizon,
        action_tokens=config.chunk_tokens,
        floor=floor,
        text=config.objective.text and config.chunk_tokens == "none",
    )


def resolve(config: TrainConfig, bundle: DataBundle) -> TrainConfig:
    """The configuration with the sizes that it left to the data set."""
    chunks = bundle.tokenize_actions
    return config.resolve(
        cameras=bundle.cameras,
        state_dim=len(bundle.schema.state_names),
        action_dim=len(bundle.schema.action_names),
        vocab=bundle.vocab_size,
        chunk_tokens=chunks.max_tokens if chunks else 0,
        chunk_targets=chunks.max_tokens - len(chunks.ids.begin) if chunks else 0,
    )


def make_job(config: TrainConfig, bundle: DataBundle, mesh: jax.sharding.Mesh) -> Job:
    """Everything the loop needs, from a resolved configuration."""
    loop = config.train
    check_backend(config.model.attention, mesh.devices.flat[0].platform)
    rows = local_rows(mesh, loop.batch_size)
    loader = loader_of(config, bundle, "train", rows)
    held_out = loader_of(config, bundle, "val", rows) if loop.val_every else None
    model, process = VLA(config.model), make_process(config.process)
    tx = make_optimizer(config.optim, loop.steps)
    builder = plan_state(config, init_params(model, loader.example_batch(), loop.batch_size), mesh)
    check_trunks(config.objective, builder.shapes.params)

    index = index_dataset(loader.source)

    def start() -> dict[str, Any] | None:
        if not loop.init_from:
            return None
        found = read_start(config, builder.shapes.whole(averaged=False))
        if not jax.process_index():
            print("\n".join(found.said), flush=True)
        return found.arrays

    def val_batches() -> Iterator[Batch]:
        assert held_out is not None  # else there is no `validate` to ask for them
        return (held_out.batch(i) for i in range(loop.val_batches))

    return Job(
        builder=builder,
        schedule=learning_rate(config.optim, loop.steps),
        train_step=make_train_step(model, process, config, tx),
        validate=make_validate(model, process, config, builder) if held_out else None,
        batches=loader.iterate,
        val_batches=val_batches,
        meta={
            "config": json.loads(to_json(config)),
            "config_hash": config_hash(config),
            "data": bundle.to_json(),
            "data_fingerprint": index.fingerprint,
            "splits": split_hash(index, config),
        },
        identity=identity_of(split_hash(index, config)),
        sample_flops=train_flops(config),
        sample_tokens=sample_tokens(config),
        key=jax.random.key(config.seed),
        defaults=json.loads(to_json(TrainConfig())),
        start=start,
    )


def identity_of(splits: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What must not change when a run is continued, of a checkpoint's metadata: what shapes a batch, by name.

    That is the configuration, the data set and its `splits`, and schema, transforms, statistics, tokenizer and FAST
    tokenizer. Checkpoints that do not say their splits have these.
    """

    def identity(meta: Mapping[str, Any]) -> dict[str, Any]:
        prepared = bundle_hash(DataBundle.from_json(json.loads(json.dumps(meta["data"]))))
        return {
            "config": upgraded(json.loads(json.dumps(meta["config"]))),
            "data_fingerprint": meta["data_fingerprint"],
            "splits": meta.get("splits", splits),
            "prepared": dict(prepared.parts),
        }

    return identity


def split_hash(index: DatasetIndex, config: TrainConfig) -> str:
    """A short hash of which episodes are trained on and which are held out."""
    splits = [part.tolist() for part in split_episodes(index, config.data)]
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:12]


def plan_state(config: TrainConfig, init: InitParams, mesh: jax.sharding.Mesh) -> StateBuilder:
    """Shapes and shardings of a run's state: what is trained, what is frozen, the optimiser's and the average."""
    parts = make_parts(init, config)
    return state_builder(
        parts.init,
        make_optimizer(config.optim, config.train.steps),
        ema=config.train.ema_decay is not None,
        mesh=mesh,
        weighting=policy_of(config).init,
        spikes=spikes.first(config.train),
        frozen=parts.frozen,
        frozen_dtype=config.optim.frozen_dtype,
    )


def loader_of(
    config: TrainConfig,
    bundle: DataBundle,
    split: Literal["train", "val"],
    rows: Sequence[int] | None = None,
) -> Loader:
    """The batches of a resolved configuration; of each the given rows, or all."""
    return make_loader(
        config.data,
        bundle,
        horizon=config.model.expert.horizon,
        batch_size=config.train.batch_size,
        seed=config.seed if config.data.seed is None else config.data.seed,
        split=split,
        rows=rows,
    )


def check_trunks(objective: ObjectiveConfig, params: PyTree) -> None:
    """Raises ValueError where a path of the shared trunk matches no parameter; better here than while compiling."""
    weighting, diagnostics = objective.weighting, objective.diagnostics
    if "trunk" in OPTIONS[weighting.policy]:
        trunk.inside(params, weighting.trunk, "objective.weighting.trunk (of the trained parameters)")
    if diagnostics.every:
        trunk.inside(params, diagnostics.trunk, "objective.diagnostics.trunk (of the trained parameters)")


def check_weighting_state(run_dir: str | os.PathLike, config: TrainConfig) -> None:
    """Raises ValueError where the run's checkpoint lacks what the λ policy remembers."""
    policy = config.objective.weighting.policy
    if policy_of(config).init() is None:
        return
    try:
        meta = read_meta(run_dir)
    except FileNotFoundError:
        return
    if "weighting" not in meta["items"]:
        raise ValueError(
            f"checkpoint {meta['step']} of {run_dir} has no state of objective.weighting.policy={policy}; "
            "continue with the policy it was trained with, or use another run directory"
        )


def make_validate(model: VLA, process: Process, config: TrainConfig, builder: StateBuilder):
    """(parameters, device batches) → metrics. Noise is the same in every validation, so that they compare."""
    mesh = builder.mesh
    eval_step = jax.jit(
        make_eval_step(model, process, config),
        in_shardings=(builder.shardings.whole(averaged=False), batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
    key = jax.random.key(config.seed)

    def validate(params: PyTree, batches: Iterator[Batch]) -> dict[str, Any]:
        sums = [
            settled(eval_step(params, batch, jax.random.fold_in(key, i))) for i, batch in enumerate(batches)
        ]
        return add_up(sums)

    return validate


def sample_tokens(config: TrainConfig) -> int:
    """Tokens of one training sample: images, padded text, the padded chunk as FAST tokens, and the expert's suffix for
    every noise draw, each where there is one."""
    model, objective = config.model, config.objective
    draws = objective.noise_draws if objective.action_weight and model.expert.is_network else 0
    prefix = model.image_tokens + config.data.max_text_tokens
    return prefix + config.padded_chunk + draws * model.expert.tokens


def describe(config: Mapping[str, Any], prefix: str = "") -> str:
    """A configuration for people: one line per section."""
    own = [f"{key}={value}" for key, value in config.items() if not isinstance(value, Mapping)]
    lines = [f"{prefix or 'run'}: {' '.join(own)}"] if own else []
    sections = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    lines += [describe(value, f"{prefix}.{key}".lstrip(".")) for key, value in sections.items()]
    return "\n".join(lines)
