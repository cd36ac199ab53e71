"""All 50 tasks: each can be built, and its expert demonstrates it."""

import numpy as np
import pytest

from vla_jax.sim.metaworld import TASKS, demonstrate, headless
from vla_jax.sim.metaworld.demos import EXTRA_FRAMES
from vla_jax.sim.metaworld.simulator import Simulator

pytest.importorskip("metaworld", reason="the extra `sim` is not installed")
try:
    headless.prepare()
except OSError as _error:
    pytest.skip(f"no headless OpenGL here: {_error}", allow_module_level=True)

SCENES = 3
"""No expert succeeds in every scene; one that fails in this many does not know its task."""


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_demonstrates_its_task(task):
    simulator = Simulator(task)
    tries = (demonstrate(simulator, None, seed, noisy=False) for seed in range(SCENES))
    found = next((demonstration for demonstration in tries if demonstration is not None), None)
    simulator.close()
    assert found is not None
    steps = len(found.actions)
    assert found.success_step <= steps <= found.success_step + EXTRA_FRAMES
    assert found.state.shape == (steps, 4) and np.isfinite(found.state).all()
    assert np.abs(found.actions).max() <= 1 and np.abs(np.diff(found.state[:, :3], axis=0)).max() > 1e-3
