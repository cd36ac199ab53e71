"""openpi's algorithm, as benchmarks/_openpi_reference.py writes it, gives the actions of the public models' twins."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks._openpi_reference import Reference
from vla_jax.cli.random_policy import observe, random_policy
from vla_jax.config import TrainConfig, prompt_form
from vla_jax.data.config import DataConfig
from vla_jax.data.normalize import Normalize
from vla_jax.data.statistics import FieldStatistics
from vla_jax.data.transforms import PadDims
from vla_jax.flow.config import SolverConfig
from vla_jax.models import presets
from vla_jax.serve.compiled.config import CompileConfig

KEY = jax.random.key(3)
SOLVER = SolverConfig(num_steps=2)
ROUNDING = 5e-5
"""Of float32 over some 250 tokens; a clock that runs the other way changes actions by tenths."""


def with_dims(policy, dims):
    """The same policy on a robot that has only the first so many action dims."""
    bundle = policy.bundle
    schema = dataclasses.replace(bundle.schema, action_names=bundle.schema.action_names[:dims])
    (statistics,) = bundle.normalize.statistics.values()
    action = dataclasses.asdict(statistics.action)
    action = FieldStatistics(**{k: v[:dims] if isinstance(v, list | tuple) else v for k, v in action.items()})
    changes = {
        Normalize: {"statistics": {"": dataclasses.replace(statistics, action=action)}},
        PadDims: {"robot_action_dim": dims},
    }
    transforms = tuple(dataclasses.replace(t, **changes.get(type(t), {})) for t in bundle.transforms)
    bundle = dataclasses.replace(bundle, schema=schema, transforms=transforms)
    return dataclasses.replace(policy, bundle=bundle)


def test_a_policy_that_never_saw_noise_in_padded_dims_is_none_of_openpis():
    policy = random_policy(TrainConfig(model=presets.PRESETS["pi0_tiny"]()), cameras=3)
    with pytest.raises(ValueError, match="noise into all 32 action dims, but this policy knows it in 7"):
        Reference(with_dims(policy, 7), num_steps=2, dtype="float32")


@pytest.mark.parametrize(("preset", "dims"), [("pi0_tiny", 32), ("pi05_tiny", 7)])
def test_actions_are_those_of_openpis_loop(preset, dims):
    """Two robots without a third camera; the clock is the presets' own, which is openpi's."""
    model = presets.PRESETS[preset]()
    model = dataclasses.replace(model, expert=dataclasses.replace(model.expert, padding="noise"))
    data = DataConfig(prompt=prompt_form(model))
    policy = random_policy(TrainConfig(model=model, data=data), cameras=3, batch_size=2)
    assert policy.config.model.expert.clock == "reversed"
    policy = with_dims(policy, dims)
    observation = observe(policy.bundle, 2, seed=1, cameras=2)
    reference = Reference(policy, num_steps=2, dtype="float32")
    expected = reference.infer(observation, KEY)
    assert np.ptp(expected) > 0.1 and expected.shape[-1] == dims
    np.testing.assert_allclose(policy.act(observation, KEY, solver=SOLVER), expected, atol=ROUNDING)
    compiled = policy.compiled(CompileConfig(buckets=(2,)))
    np.testing.assert_allclose(compiled.act(observation, KEY, solver=SOLVER), expected, atol=ROUNDING)
    if model.expert.time == "adarms":
        # The norms' own weights, zero where training starts, are among what is compared.
        silent = jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if "Dense_0" in jax.tree_util.keystr(path) else x, reference.params
        )
        reference.params = silent
        assert np.abs(reference.infer(observation, KEY) - expected).max() > 100 * ROUNDING
