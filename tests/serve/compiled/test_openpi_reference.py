"""openpi's algorithm, as benchmarks/_openpi_reference.py writes it, gives the actions of the public models' twins."""

import jax
import numpy as np
import pytest

from benchmarks._openpi_reference import Reference
from launch._random_policy import observe, random_policy
from vla_jax.config import TrainConfig, prompt_form
from vla_jax.data.config import DataConfig
from vla_jax.flow.config import SolverConfig
from vla_jax.models import presets
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.compiled.policy import CompiledPolicy

KEY = jax.random.key(3)
SOLVER = SolverConfig(num_steps=2)
ROUNDING = 5e-5
"""Of float32 over some 250 tokens; a clock that runs the other way changes actions by tenths."""


@pytest.mark.parametrize("preset", ["pi0_tiny", "pi05_tiny"])
def test_actions_are_those_of_openpis_loop(preset):
    """Two robots without a third camera; the clock is the presets' own, which is openpi's."""
    model = presets.PRESETS[preset]()
    data = DataConfig(prompt=prompt_form(model))
    policy = random_policy(TrainConfig(model=model, data=data), cameras=3, batch_size=2)
    assert policy.config.model.expert.clock == "reversed"
    observation = observe(policy.bundle, 2, seed=1, cameras=2)
    reference = Reference(policy, num_steps=2, dtype="float32")
    expected = reference.infer(observation, KEY)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(policy.act(observation, KEY, solver=SOLVER), expected, atol=ROUNDING)
    compiled = CompiledPolicy(policy, CompileConfig(buckets=(2,)))
    np.testing.assert_allclose(compiled.act(observation, KEY, solver=SOLVER), expected, atol=ROUNDING)
    if model.expert.time == "adarms":
        # The norms' own weights, zero where training starts, are among what is compared.
        silent = jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if "Dense_0" in jax.tree_util.keystr(path) else x, reference.params
        )
        reference.params = silent
        assert np.abs(reference.infer(observation, KEY) - expected).max() > 100 * ROUNDING
