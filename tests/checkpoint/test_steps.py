"""Which step is read: one for all that is wanted, the newest whole one, under the number that it says itself."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.checkpoint import Checkpoints, load, open_newest, read_meta, steps
from vla_jax.checkpoint.manager import UNREADABLE
from vla_jax.checkpoint.manifest import NAME
from vla_jax.checkpoint.plain_sum import plain_sum

CONFIG = {"seed": 0}


def tree(step):
    return {"w": jnp.arange(5000.0) + step, "n": jnp.int32(step)}


def save(folder, *numbers, keep=3):
    with contextlib.closing(Checkpoints(folder, keep=keep)) as checkpoints:
        for step in numbers:
            checkpoints.save(step, {"params": tree(step)}, {"config": CONFIG})


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def run_dir(template, tmp_path):
    return shutil.copytree(template, tmp_path / "run")


def both(path):
    """Number and arrays, taken from one step."""
    return open_newest(path, lambda saved: (saved.step, saved.item("params")))


def assert_step(found, step):
    assert found[0] == step
    jax.tree.map(np.testing.assert_array_equal, found[1], tree(step))


def restore(run_dir):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(1))
    with contextlib.closing(Checkpoints(run_dir, keep=3)) as checkpoints:
        return checkpoints.restore_latest({"params": abstract}, same={"config": CONFIG})


def break_arrays(step_dir):
    for file in step_dir.rglob("d/*"):
        if file.stat().st_size > 10_000:
            data = bytearray(file.read_bytes())
            data[5000] ^= 1
            file.write_bytes(data)


def test_after_damage_number_and_arrays_are_of_the_older_step(run_dir, capfd):
    break_arrays(run_dir / "checkpoints/2")
    assert_step(both(run_dir), 1)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "the checksum of 'params' is wrong: w" in said[0] and "using step 1" in said[0]


def test_a_save_in_between_changes_nothing(run_dir):
    def read(saved):
        save(run_dir, 3)
        return saved.step, saved.item("params")

    assert_step(open_newest(run_dir, read), 2)
    assert_step(both(run_dir), 3)


def test_a_step_that_is_deleted_meanwhile_is_looked_for_again(run_dir, capfd):
    """As a trainer does that keeps the newest two: no word of it, for nothing is broken."""
    times = []

    def read(saved):
        if not times:
            save(run_dir, 3)
            shutil.rmtree(saved.folder)
        times.append(saved.step)
        return saved.step, saved.item("params")

    assert_step(open_newest(run_dir, read), 3)
    assert times == [2, 3] and capfd.readouterr().err == ""


def test_the_step_stands_in_the_metadata_whatever_the_folder_is_called(run_dir, capfd):
    folder = run_dir / "checkpoints"
    (folder / "1").rename(folder / "9")
    assert_step(both(run_dir), 2)
    assert_step(both(folder / "9"), 1)
    (folder / "2").rename(folder / "best")
    assert_step(both(folder / "best"), 2)
    assert_step(both(run_dir), 1)
    restored = restore(run_dir)
    assert restored.step == 1 and (folder / "1").is_dir() and not (folder / "9").exists()
    assert "checkpoints/9 holds step 1" in capfd.readouterr().err
    save(run_dir, 2)
    assert_step(both(run_dir), 2)


def test_a_copy_under_another_number_is_moved_aside(run_dir, capfd):
    shutil.copytree(run_dir / "checkpoints/1", run_dir / "checkpoints/7")
    assert restore(run_dir).step == 2
    assert (run_dir / UNREADABLE / "1-as-7-0").is_dir() and "holds step 1" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["²", "٣", "007", "3.orbax-checkpoint-tmp", "x"])
def test_folders_that_are_no_steps_are_none(run_dir, name):
    (run_dir / "checkpoints" / name).mkdir()
    (run_dir / "checkpoints" / "5").write_text("a file")
    assert_step(both(run_dir), 2)
    assert steps.whole_steps(steps.run_path(run_dir / "checkpoints")) == [1, 2]
    assert read_meta(run_dir)["step"] == 2


@pytest.mark.parametrize("name", ["meta/metadata", NAME, "params/_METADATA"])
def test_a_changed_digit_in_any_file_is_seen(run_dir, capfd, name):
    file = run_dir / "checkpoints/2" / name
    data = file.read_bytes()
    at = next(i for i in range(len(data)) if chr(data[i]) in "12345678")
    file.write_bytes(data[:at] + bytes([data[at] + 1]) + data[at + 1 :])
    assert_step(both(run_dir), 1)
    assert "is unreadable (the checksum of" in capfd.readouterr().err
    assert restore(run_dir).step == 1


def test_a_lost_manifest_is_damage(run_dir, capfd):
    (run_dir / "checkpoints/2" / NAME).unlink()
    assert_step(both(run_dir), 1)
    assert f"it lacks {NAME}" in capfd.readouterr().err


def make_old(step_dir):
    """As it was saved before there were manifests and weighted sums."""
    (step_dir / NAME).unlink()
    file = step_dir / "meta/metadata"
    meta = json.loads(file.read_text())
    meta["fingerprints"] = {"params": plain_sum(tree(meta["step"]))}
    file.write_text(json.dumps(meta))


def test_older_checkpoints_still_load(run_dir, capfd):
    for step in (1, 2):
        make_old(run_dir / f"checkpoints/{step}")
    assert_step(both(run_dir), 2)
    assert restore(run_dir).step == 2 and capfd.readouterr().err == ""
    break_arrays(run_dir / "checkpoints/2")
    assert_step(both(run_dir), 1)


def test_metadata_that_nothing_vouches_for_fall_back_where_they_mean_nothing(run_dir, capfd):
    """Older checkpoints have no checksum of their tokenizer: what cannot be built of it is damage."""

    def build(saved):
        return saved.built("tokenizer", lambda: {1: "fine"}[saved.step]), saved.item("params")

    with pytest.raises(ValueError, match=r"its tokenizer cannot be read by this version \(KeyError: 2\)"):
        open_newest(run_dir, build)
    make_old(run_dir / "checkpoints/2")
    assert open_newest(run_dir, build)[0] == "fine"
    assert "its tokenizer: KeyError: 2); using step 1" in capfd.readouterr().err


def test_nothing_whole_is_one_line(run_dir):
    for step in (1, 2):
        break_arrays(run_dir / f"checkpoints/{step}")
    with pytest.raises(ValueError, match="checkpoints/2 is unreadable") as raised:
        load(run_dir, "params")
    assert "\n" not in str(raised.value)
