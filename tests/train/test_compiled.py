"""Compiler options of the training step: whose they are, and that the compiler is given them."""

import pytest

from tests.train.toy import make_job, small_loop
from vla_jax.sharding import MeshConfig, activate
from vla_jax.train.compiled import jit_train_step, xla_options
from vla_jax.train.config import LoopConfig

VMEM, FUSION = "xla_tpu_scoped_vmem_limit_kib=65536", "xla_gpu_autotune_level=2"


def test_options_go_to_their_platform():
    more = (VMEM, FUSION, "xla_embed_ir_in_executable=true")
    tpu, gpu, cpu = (xla_options(platform, more) for platform in ("tpu", "gpu", "cpu"))
    assert tpu.pop("xla_jf_spmd_threshold_for_windowed_einsum_mib").isdigit()
    assert tpu == {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_embed_ir_in_executable": "true"}
    assert gpu == {"xla_gpu_autotune_level": "2", "xla_embed_ir_in_executable": "true"}
    assert cpu == {"xla_embed_ir_in_executable": "true"}
    assert xla_options("tpu", ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1",)).popitem()[1] == "1"


def test_the_compiler_is_given_them():
    job = make_job(small_loop(), MeshConfig())
    state = job.builder.shapes
    batch = next(iter(job.batches(0)))

    def lowered(*xla):
        with activate(job.builder.mesh):
            return jit_train_step(job.train_step, job.builder, xla).lower(state, batch)

    assert lowered(VMEM).compile() is not None  # not this platform's
    with pytest.raises(Exception, match="xla_no_such_thing"):
        lowered("xla_no_such_thing=1").compile()


def test_what_is_no_option_is_refused():
    with pytest.raises(ValueError, match=r"train\.xla: 'fast' is not name=value"):
        LoopConfig(xla=("fast",))
