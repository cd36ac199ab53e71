"""From one format to another, always by way of ours."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vla_jax.checkpoint.read import first_line
from vla_jax.config import LoraConfig, TrainConfig, config_hash
from vla_jax.convert import big_vision, lerobot, openpi, paligemma_hf, pi0_hf
from vla_jax.convert.entry import Entry, Lazy, exported, imported, row_slices
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.model import our_shapes
from vla_jax.convert.padding import Silenced, padded_dims
from vla_jax.convert.policy_data import policy_data, public_data, public_objective
from vla_jax.convert.run import RunSource, write_run
from vla_jax.convert.stream import Whole, place
from vla_jax.data.config import DataConfig
from vla_jax.models.config import VLAConfig
from vla_jax.types import PyTree

OURS = "vla_jax"

SOURCES: dict[str, Callable[[Path, Options], Opened]] = {
    "big_vision": big_vision.open_weights,
    "paligemma_hf": paligemma_hf.open_weights,
    "pi0_hf": pi0_hf.open_weights,
    "openpi": openpi.open_weights,
    "lerobot": lerobot.open_weights,
}
#: format → (table, writer).
TARGETS: dict[str, tuple[Callable[..., list[Entry]], Callable[..., None]]] = {
    "paligemma_hf": (paligemma_hf.export_table, paligemma_hf.write_weights),
    "pi0_hf": (pi0_hf.export_table, pi0_hf.write_weights),
    "openpi": (openpi.export_table, openpi.write_weights),
}
#: Of these, those that hold backbones alone: of a π0 they get all but its action expert.
BACKBONES = ("paligemma_hf",)
#: Of these, the one that holds statistics of state and actions.
WITH_STATISTICS = "openpi"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "keep": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What was converted: counts, the model found, and arrays of the source that were left out."""

    arrays: int
    parameters: int
    model: VLAConfig
    left_out: tuple[str, ...]
    """Arrays of theirs that were read over: unused ones, copies of tied ones."""
    merged: int = 0
    """Matrices that LoRA was merged into."""
    lost: tuple[str, ...] = ()
    """Whose statistics of state and actions the format has no place for."""
    without_expert: int = 0
    """Arrays of the action expert, where the format holds backbones alone."""
    silenced: int = 0
    """Action dims of the model that the run's robot does not have, written as zeros; see `padding`."""


def convert(
    path: Path,
    out: Path,
    *,
    source: str,
    target: str,
    dtype: str = "keep",
    weights: str | None = None,
    options: Options = Options(),
) -> ConversionReport:
    """Reads `path` in the format `source`, writes the folder `out` in the format `target`; one of them is vla_jax.

    Both: a run's weights alone, LoRA merged, with all that a policy needs and without what only training needs.
    Holds about one array at a time. `dtype` is float32, bfloat16, or keep, which leaves every array its type;
    `weights` chooses a run's params or ema (None: ema where there is one). Raises FileNotFoundError, FileExistsError
    or ValueError, each in one line; then there is no `out`.
    """
    if OURS not in (source, target):
        raise ValueError(f"from {source} to {target}: one of the two must be {OURS}; convert in two steps")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: there are {', '.join(DTYPES)}")
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another folder, or remove it")
    if source == target:
        return _plain(path, out, DTYPES[dtype], weights)
    if target == OURS:
        return _import(open_weights(path, source, options), out, source, DTYPES[dtype], options)
    return _export(path, out, target, DTYPES[dtype], weights, options)


def open_weights(path: Path, source: str, options: Options) -> Opened:
    """Their weights, checked by name and shape, not yet read."""
    if source not in SOURCES:
        raise ValueError(f"weights of {source!r} are not read here; there are {', '.join(SOURCES)}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        opened = SOURCES[source](path, options)
        opened.check()
    except (ValueError, OSError):
        raise
    except Exception as error:  # JSON beside the weights holds something of another kind than the format says
        raise ValueError(f"{path} is not of the format {source}: {first_line(error)}") from error
    return opened


def load(
    path: Path,
    *,
    source: str,
    shardings: Mapping[str, jax.sharding.Sharding],
    dtype: str = "keep",
    options: Options = Options(),
) -> PyTree:
    """Their weights as our parameters on their devices, without a file in between.

    `shardings` by path of ours (``backbone/img/…``). The host holds one array at a time.
    """
    opened = open_weights(path, source, options)
    opened.check_copies()
    shapes = our_shapes(opened.model, expert=opened.expert)
    return place(imported(opened.entries, opened.source, shapes, DTYPES[dtype]), shardings)


def _import(
    opened: Opened, out: Path, source: str, dtype: np.dtype | None, options: Options
) -> ConversionReport:
    opened.check_copies()
    shapes = our_shapes(opened.model, expert=opened.expert)
    arrays = imported(opened.entries, opened.source, shapes, dtype)
    record: dict[str, Any] = {
        "converted": {"from": source, "arrays": len(opened.source.specs)},
        "assets": dict(opened.assets),
    }
    policy = opened.expert or not opened.model.expert.is_network  # and not a PaliGemma
    data = public_data(opened.model) if policy else DataConfig()
    config = TrainConfig(model=opened.model, data=data, objective=public_objective(opened.model))
    if options.policy is not None:
        if not policy:
            raise ValueError(f"{opened.where} has no expert, so a tokenizer does not make it a policy")
        config, bundle = policy_data(opened.model, opened.assets, options.policy, options.horizon)
        record["data"] = bundle.to_json()
    _check_space(out, arrays)
    write_run(out, arrays, config, record)
    left_out = {*opened.copies, *opened.unused} & set(opened.source.specs)
    return dataclasses.replace(_report(arrays, opened.model, left_out), merged=len(opened.merged))


def _plain(path: Path, out: Path, dtype: np.dtype | None, weights: str | None) -> ConversionReport:
    """A run's weights in a run of their own: one set of parameters, nothing frozen or low-rank."""
    run = RunSource(path, weights)
    arrays = exported([Entry(theirs=name, ours=name) for name in run.specs], run, dtype)
    optim = dataclasses.replace(run.config.optim, freeze=(), frozen_dtype="float32")
    config = dataclasses.replace(run.config, lora=LoraConfig(), optim=optim)
    kept = ("data", "data_fingerprint", "assets", "converted")
    record = {key: run.meta[key] for key in kept if key in run.meta}
    _check_space(out, arrays)
    write_run(out, arrays, config, record | {"config_hash": config_hash(config)}, verify=run.verify)
    return _report(arrays, run.model, set())


def _export(
    path: Path, out: Path, target: str, dtype: np.dtype | None, weights: str | None, options: Options
) -> ConversionReport:
    if target not in TARGETS:
        raise ValueError(f"{target!r} is not written here; there are {', '.join(TARGETS)}")
    run = RunSource(path, weights)
    make_table, write = TARGETS[target]
    entries = _table(make_table, run, target, options)
    left_out = set(run.specs) - {entry.ours for entry in entries}
    expert = {name for name in left_out if name.startswith("expert/")} if target in BACKBONES else set()
    if left_out - expert:
        raise ValueError(
            f"{target} has no place for {len(left_out - expert)} of {path}'s arrays "
            f"({sorted(left_out - expert)[0]}, …)"
        )
    silenced = range(0) if expert else padded_dims(run)
    arrays = exported(entries, Silenced(run, silenced), dtype)
    assets = run.assets
    _check_space(out, arrays)
    with Whole(out) as partial:
        write(partial, arrays, run.model, options, assets)
        for name in expert:  # the checksums are of everything that the run has
            for rows in row_slices(run.specs[name].shape, run.specs[name].dtype.itemsize):
                run.read(name, rows)
        run.verify()
    lost = () if target == WITH_STATISTICS else tuple(assets.get("norm_stats", ()))
    return dataclasses.replace(
        _report(arrays, run.model, set()), lost=lost, silenced=len(silenced), without_expert=len(expert)
    )


def _table(
    make_table: Callable[..., list[Entry]], run: RunSource, target: str, options: Options
) -> list[Entry]:
    entries = make_table(run.model, options, expert=run.expert)
    missing = {entry.ours for entry in entries} - set(run.specs)
    if missing:
        raise ValueError(f"{target} wants {sorted(missing)[0]}, which {run.path} does not have")
    return entries


def _check_space(out: Path, arrays: Mapping[str, Lazy]) -> None:
    """A full disk is better met before than in the middle of writing."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, free = sum(lazy.nbytes for lazy in arrays.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{out} would take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on the disk"
        )


def _report(arrays: Mapping[str, Lazy], model: VLAConfig, left_out: set[str]) -> ConversionReport:
    parameters = sum(lazy.size for lazy in arrays.values())
    return ConversionReport(
        arrays=len(arrays), parameters=parameters, model=model, left_out=tuple(sorted(left_out))
    )
