"""What a training that does not fit says: XLA's own errors, as one line with the amounts and what to change."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.train.toy import make_job, small_loop
from vla_jax.sharding import MeshConfig
from vla_jax.sharding.report import human
from vla_jax.train.cluster.beats import COMPILING, RESTORING
from vla_jax.train.cluster.watchdog import Watchdog, _broken_collective
from vla_jax.train.loop import fit
from vla_jax.train.memory import OutOfMemory, explained, out_of_memory

GIB = 2**30


def at(step: int, phase: str) -> Watchdog:
    watchdog = Watchdog(silent_after=60, stuck_after=0)
    watchdog.at(step, phase)
    return watchdog


@pytest.mark.parametrize(
    ("said", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.73G) "
            "exceeds available HBM (15.75G).",
            20.73,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 512.0M of 15.75G hbm.", 0.5, 15.75),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.90G "
            "of 7.48G hbm. Exceeded hbm capacity by 14.42G.",
            21.9,
            7.48,
        ),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G. That was not possible. "
            "There are 11.08G free.; (0x0x0_HBM0)",
            15.65,
            11.08,
        ),
        (
            "RESOURCE_EXHAUSTED: Attempting to reserve 10.51G at the bottom of memory. That was not possible. There "
            "are 8.97G free, 0B reserved, and 8.97G reservable.",
            10.51,
            8.97,
        ),
    ],
)
def test_a_tpus_error_gives_both_numbers(said, needed, available):
    assert out_of_memory(RuntimeError(said)) == pytest.approx((needed * GIB, available * GIB))
    with pytest.raises(OutOfMemory) as found, explained(at(1, COMPILING)):
        raise jax.errors.JaxRuntimeError(said)
    message = str(found.value)
    assert (
        f"at step 1, compiling: {human(needed * GIB)} needed, {available:.2f} GiB there; divide the"
        in message
    )
    assert "train.accumulate" in message and "\n" not in message


@pytest.mark.parametrize(
    ("said", "amount"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.", "4.44 GiB"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00GiB.", "16.00 GiB"),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 6.27GiB (6727663616B) on device ordinal 0",
            "6.27 GiB",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 281474976710656 bytes.", "262144.00 GiB"),
    ],
)
def test_a_gpus_error_gives_what_could_not_be_had(said, amount):
    assert out_of_memory(RuntimeError(said)) is None
    with pytest.raises(OutOfMemory) as found, explained(at(0, RESTORING)):
        raise jax.errors.JaxRuntimeError(
            f"{said}\nBufferAssignment OOM Debugging.\n  parameter allocation: 9.64GiB"
        )
    message = str(found.value)
    assert f"at step 0, restoring or initialising: {amount} more could not be had; split the state" in message
    assert "\n" not in message and not _broken_collective(found.value)


def test_other_errors_stay_what_they_are():
    for error in (
        jax.errors.JaxRuntimeError("INTERNAL: the network is gone"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)"),
        ValueError("checkpoint 4 could not be written (RESOURCE_EXHAUSTED: no memory on the disk)"),
    ):
        with pytest.raises(type(error)) as found, explained(at(1, COMPILING)):
            raise error
        assert found.value is error and out_of_memory(error) is None


def test_a_run_that_does_not_fit_ends_in_one_line(tmp_path):
    """With the real error of this machine's runtime, for 128 TiB."""
    loop = small_loop()
    job = make_job(loop, MeshConfig())

    def too_much(state, batch):
        state, metrics = job.train_step(state, batch)
        large = jnp.sort(jnp.arange(2**47, dtype=jnp.int8) + metrics["loss"].astype(jnp.int8))
        return state, metrics | {"large": large[::-1][0]}

    with pytest.raises(
        OutOfMemory, match=r"memory is too small, at step 1, .* more could not be had; divide"
    ):
        fit(dataclasses.replace(job, train_step=too_much), loop, tmp_path)
