"""Damaged checkpoints are found and passed over; another config, a full disk and a missing item are one line."""

import errno
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from vla_jax.checkpoint import Checkpoints, UnreachableCheckpointError, failures, load, read_meta, write
from vla_jax.checkpoint.manager import UNREADABLE
from vla_jax.checkpoint.paths import run_path

CONFIG = {"train": {"batch_size": 8, "keep": 2}, "seed": 0}


def tree(step):
    return {
        "backbone": {
            "w": jax.random.normal(jax.random.key(0), (150, 40)) * step
        },  # too large to lie in an index
        "expert": {"w": jnp.full((4,), step, jnp.bfloat16), "n": jnp.int32(step)},
    }


def items(step):
    return {"params": tree(step), "ema": tree(step + 0.5)}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items(1))


def saved(folder):
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, items(step), {"config": CONFIG, "tokenizer": "{}"})
    checkpoints.close()
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return saved(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """For tests that change nothing."""
    return saved(tmp_path_factory.mktemp("run"))


def restore(run_dir, config=CONFIG, free=()):
    checkpoints = Checkpoints(run_dir, keep=2)
    try:
        return checkpoints.restore_latest(abstract(), same={"config": config}, free=free)
    finally:
        checkpoints.close()


def assert_step(found, step):
    jax.tree.map(np.testing.assert_array_equal, found, items(step))


def test_newest_is_restored_and_only_the_newest_are_kept(run_dir):
    restored = restore(run_dir)
    assert restored.step == 3
    assert_step(restored.items, 3)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"2", "3"}


def test_one_item_of_a_run_a_folder_or_a_step(run_dir):
    for path, step in ((run_dir, 3), (run_dir / "checkpoints", 3), (run_dir / "checkpoints" / "2", 2)):
        jax.tree.map(np.testing.assert_array_equal, load(path, "ema"), items(step)["ema"])
        meta = read_meta(path)
        assert meta["step"] == step and meta["config"] == CONFIG and meta["tokenizer"] == "{}"
        assert "jax" in meta["versions"]
    with pytest.raises(ValueError, match="has no 'opt_state'; it has ema, params"):
        load(run_dir, "opt_state")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load(run_dir / "nowhere", "ema")


def data_files(folder):
    """Those that hold the arrays: orbax keeps what each process wrote beside what it merged."""
    return [f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 10_000]


def truncate(step_dir):
    for file in data_files(step_dir / "params"):
        file.write_bytes(file.read_bytes()[:50])


def flip_a_bit(step_dir):
    for file in data_files(step_dir / "ema"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))


def lose_an_item(step_dir):
    shutil.rmtree(step_dir / "params")


def tear_the_metadata(step_dir):
    (step_dir / "meta" / "metadata").write_text('{"config": ')


def lose_the_config(step_dir):
    file = step_dir / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["config"]
    file.write_text(json.dumps(meta))


DAMAGES = [truncate, flip_a_bit, lose_an_item, tear_the_metadata, lose_the_config]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over_with_a_warning(run_dir, capfd, damage):
    damage(run_dir / "checkpoints" / "3")
    restored = restore(run_dir)
    assert restored.step == 2
    assert_step(restored.items, 2)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "is unreadable" in said[0] and "continuing from step 2" in said[0]
    assert (run_dir / UNREADABLE / "3-0").is_dir()

    checkpoints = Checkpoints(run_dir, keep=2)  # the step is free to be saved again
    checkpoints.save(3, items(3), {"config": CONFIG})
    checkpoints.close()
    assert restore(run_dir).step == 3


@pytest.mark.parametrize("damage", [truncate, lose_an_item, tear_the_metadata])
def test_loading_passes_over_damage_too(run_dir, capfd, damage):
    damage(run_dir / "checkpoints" / "3")
    jax.tree.map(np.testing.assert_array_equal, load(run_dir, "params"), items(2)["params"])
    assert "using step 2" in capfd.readouterr().err
    with pytest.raises(ValueError, match="is unreadable"):
        load(run_dir / "checkpoints" / "3", "params")


def behind(error):
    """As Orbax wraps what TensorStore said."""
    outer = Exception("Encountered error while reading array index: (slice(0, 30, 1),).")
    outer.__cause__ = error
    return outer


TENSORSTORE = 'Error reading "backbone.w/0.0": Failed to open: "…/d/9b08": '
PASSING = [
    (PermissionError(errno.EACCES, "Permission denied", "_METADATA"), "give this user the right"),
    (
        behind(ValueError(f"PERMISSION_DENIED: {TENSORSTORE}Permission denied [os_error_code='13']")),
        "the right",
    ),
    (behind(ValueError(f"UNKNOWN: {TENSORSTORE}Input/output error [os_error_code='5']")), "the disk"),
    (OSError(errno.EIO, "Input/output error"), "the disk or the network"),
    (MemoryError(), "free memory"),
    (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 GiB."),
        "free memory",
    ),
    (TimeoutError("no answer for 60 s"), "the disk or the network"),
    (behind(ValueError("UNAVAILABLE: HTTP 503 from storage.googleapis.com")), "the disk or the network"),
]


@pytest.mark.parametrize("notes", ["{code} {spec}", "{spec} {code}"])
def test_what_the_operating_system_said_in_one_line(notes):
    found = notes.format(code="[os_error_code='13']", spec="[tensorstore_spec='{create:false}']")
    line = failures.first_line(ValueError(f"PERMISSION_DENIED: {TENSORSTORE}Permission denied {found}"))
    assert line == "Permission denied"


def unlucky(monkeypatch, error):
    """Nothing of step 3 can be read."""
    restore = ocp.StandardCheckpointer.restore

    def fails(self, directory, *args, **kwargs):
        if directory.parent.name == "3":
            raise error
        return restore(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fails)


@pytest.mark.parametrize(("error", "mend"), PASSING)
def test_what_cannot_be_read_now_is_reported_and_left_where_it_is(untouched, monkeypatch, capfd, error, mend):
    unlucky(monkeypatch, error)
    for read in (lambda: restore(untouched), lambda: load(untouched, "params")):
        with pytest.raises(
            UnreachableCheckpointError, match=r"checkpoints/3 cannot be read now .*stays"
        ) as raised:
            read()
        assert mend in str(raised.value) and "\n" not in str(raised.value)
    assert capfd.readouterr().err == "" and not (untouched / UNREADABLE).exists()
    monkeypatch.undo()
    assert restore(untouched).step == 3


def test_a_folder_that_one_may_not_look_into_is_not_a_missing_one(untouched, monkeypatch):
    """For Orbax it is; and for root there is none, so the refusal is played."""
    paths = type(run_path(untouched))
    listed = paths.iterdir

    def refused(self):
        if self.name == "params" and self.parent.name == "3":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(paths, "iterdir", refused)
    with pytest.raises(UnreachableCheckpointError, match="give this user the right"):
        restore(untouched)
    assert not (untouched / UNREADABLE).exists()


@pytest.mark.parametrize("mine", [None, ValueError("OUT_OF_RANGE")])
def test_out_of_reach_to_one_process_is_so_to_all(tmp_path, monkeypatch, mine):
    """Else some would go on to an older step while one reports an error."""
    said = {
        "out of reach": ["", "checkpoint 3 cannot be read now"],
        "read": ["yes" if mine is None else "no", "no"],
    }
    monkeypatch.setattr(failures.distributed, "gather", lambda name, value: said[name])

    def read():
        if mine is not None:
            raise mine

    with pytest.raises(UnreachableCheckpointError, match="process 1: checkpoint 3 cannot be read now"):
        failures.agreed(tmp_path, read, together=True)


def test_nothing_whole_is_an_error_and_nothing_is_moved(run_dir):
    for step in ("2", "3"):
        truncate(run_dir / "checkpoints" / step)
    with pytest.raises(ValueError, match="no older one is whole"):
        restore(run_dir)
    assert not (run_dir / UNREADABLE).exists()


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert restore(tmp_path) is None


def test_another_config_names_the_fields(run_dir):
    other = {"train": {"batch_size": 16, "keep": 5}, "seed": 0, "new": True}
    with pytest.raises(
        ValueError, match=r"another config: new=True .saved: 'absent'., train.batch_size=16 .saved: 8."
    ):
        restore(run_dir, other, free=("train.keep",))
    assert (
        restore(run_dir, {"train": {"batch_size": 8, "keep": 5}, "seed": 0}, free=("train.keep",)).step == 3
    )


def test_leftovers_of_a_crash_are_no_checkpoint_and_are_cleaned(run_dir):
    leftover = run_dir / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(run_dir / "checkpoints" / "3", leftover)
    assert read_meta(run_dir)["step"] == 3
    assert restore(run_dir).step == 3
    patience = time.monotonic() + 10  # Orbax cleans up in the background
    while leftover.exists() and time.monotonic() < patience:
        time.sleep(0.05)
    assert not leftover.exists()


def test_a_full_disk_is_one_line(run_dir, monkeypatch):
    checkpoints = Checkpoints(run_dir, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(
        OSError, match=r"checkpoint 4 could not .*100 B free on the disk\); the newest whole one is 3"
    ):
        checkpoints.save(4, items(4), {"config": CONFIG})
    checkpoints.close()
    assert read_meta(run_dir)["step"] == 3


def stored(folder, name):
    """An array of step 1 as it lies on the disk."""
    store = {"driver": "ocdbt", "base": f"file://{folder}/checkpoints/1/params/", "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": store}).result()


def test_arrays_lie_in_chunks_on_the_disk(tmp_path, monkeypatch):
    """Whoever converts a model reads its layers one by one, and must not read a whole stack for each.

    But every chunk costs: a vector lies in one, not each of its numbers in its own, and a table in pieces.
    """
    monkeypatch.setattr(write, "CHUNK_BYTES", 400_000)
    monkeypatch.setattr(write, "LAYER_BYTES", 40_000)
    monkeypatch.setattr(write, "FILE_BYTES", 800_000)
    shapes = {"stack": (6, 100, 100), "vector": (7001,), "scales": (18, 64), "table": (3000, 100), "one": ()}
    tree = {k: jax.random.normal(jax.random.key(i), shape) for i, (k, shape) in enumerate(shapes.items())}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"params": tree}, {"config": CONFIG})
    checkpoints.close()
    arrays = [name for name, shape in shapes.items() if shape]
    chunks = {name: stored(tmp_path, name).chunk_layout.read_chunk.shape for name in arrays}
    whole = {name: shapes[name] for name in arrays}
    assert chunks == whole | {"stack": (1, 100, 100), "table": (1000, 100)}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, "params"), tree)


def test_arrays_are_not_compressed_and_files_are_cut(tmp_path, monkeypatch):
    """Both bound the memory of a save: compressed copies, and files that are being filled, are held."""
    monkeypatch.setattr(write, "FILE_BYTES", 100_000)
    tree = {f"w{i}": jnp.ones(10_000) for i in range(8)}  # 40 kB each, which would shrink to almost nothing
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"params": tree}, {"config": CONFIG})
    checkpoints.close()
    assert stored(tmp_path, "w0").codec.to_json()["compressor"] is None
    sizes = [
        file.stat().st_size for file in (tmp_path / "checkpoints/1/params").rglob("d/*") if file.is_file()
    ]
    assert sum(sizes) > 320_000
    assert max(sizes) < 200_000


def test_a_shard_larger_than_what_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "AT_ONCE", 1000)
    tree = {f"w{i}": jax.random.normal(jax.random.key(i), (100 * (i + 1),)) for i in range(12)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"params": tree}, {"config": CONFIG})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, "params"), tree)


def test_orbax_reads_a_step_without_us(tmp_path):
    saved(tmp_path)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as others:
        found = others.restore(
            3, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract()["params"]))
        )
    jax.tree.map(np.testing.assert_array_equal, found["params"], tree(3))
