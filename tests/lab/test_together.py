"""Cells of one program against the same models trained alone, on one device and on eight.

python -m tests.lab.test_together trains cells on simulated devices and prints one JSON object.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.toy import Toy, batch_of, config, params_of
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.lab.grid import make_cells
from vla_jax.lab.plan import plan
from vla_jax.lab.together import Together, padding, pick
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.weighting import WeightingConfig
from vla_jax.train.optim import make_optimizer
from vla_jax.train.state import TrainState
from vla_jax.train.step import make_train_step
from vla_jax.train.weigh import policy_of

STEPS = 4
PROCESS = make_process(ProcessConfig())


def init_params(key):
    noise = jax.random.normal(key, ())
    return jax.tree.map(lambda x: x + 0.1 * noise, params_of())


def base(**objective):
    cfg = config(ObjectiveConfig(**objective), steps=STEPS)
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, ema_decay=0.5, max_skipped=2))


def together(cells, devices=None):
    """Trains all cells of one program; returns their state and the last metrics."""
    devices = tuple(devices or jax.devices()[:1])
    (group,) = plan(cells)
    made = Together(
        model=Toy(),
        process=PROCESS,
        config=group.config,
        tx=make_optimizer(group.config.optim, STEPS),
        init_params=init_params,
        knobs=group.knobs(padding(len(cells), devices)),
        devices=devices,
    )
    state, batches = made.init(), [batch_of(seed=i) for i in range(STEPS)]
    step = made.compile_step(batches[0])
    for batch in batches:
        state, metrics = step(state, batch)
    return made, state, metrics, step


def alone(cell):
    """The same, as a run of its own."""
    cfg = cell.config
    tx = make_optimizer(cfg.optim, STEPS)
    step = jax.jit(make_train_step(Toy(), PROCESS, cfg, tx))
    params = init_params(jax.random.key(cfg.seed))
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        ema=params,
        opt_state=tx.init(params),
        weighting=policy_of(cfg).init(),
    )
    for i in range(STEPS):
        state, metrics = step(state, batch_of(seed=i))
    return state, metrics


def compare(cells):
    _, states, metrics, _ = together(cells)
    ends = set()
    for i, cell in enumerate(cells):
        want, want_metrics = alone(cell)
        for part in ("params", "ema", "weighting"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=cell.name),
                pick(getattr(states.state, part), i),
                getattr(want, part),
            )
        assert metrics.keys() == want_metrics.keys()
        for name, value in want_metrics.items():
            np.testing.assert_allclose(
                metrics[name][i], value, rtol=1e-4, atol=1e-5, err_msg=f"{cell.name} {name}"
            )
        ends.add((float(want.params["backbone"]["mix"][0, 0]), float(want.params["expert"]["out"][0, 0])))
    assert states.state.step == STEPS
    return ends


def test_sixteen_cells_are_sixteen_runs():
    """λ, κ, learning rate and seed differ; so do the results, but not from those of separate runs."""
    grid = ["objective.action_weight=0.1,10", "objective.insulation=0,0.5", "optim.learning_rate=0.01,0.003"]
    ends = compare(make_cells(base(), grid, seeds=2))
    assert len(ends) == 16
    assert len({backbone for backbone, _ in ends}) == 12  # κ = 0 and a clip per group: λ does not reach it


@pytest.mark.parametrize(
    "objective",
    [
        {"weighting": WeightingConfig(policy="gradient_ratio")},
        {"weighting": WeightingConfig(policy="cosine", begin=0.25), "action_reduction": "sum"},
        {"diagnostics": DiagnosticsConfig(every=2, stride=1)},
    ],
    ids=["gradient_ratio", "cosine", "diagnostics"],
)
def test_policies_and_diagnostics_are_those_of_separate_runs(objective):
    """A state that depends on λ, a term that is left out while λ is 0, and a branch on the step."""
    compare(make_cells(base(**objective), ["objective.action_weight=0.3,3"], seeds=1))


def test_without_actions_the_expert_stays_as_it_was():
    cells = make_cells(base(action_weight=0.0), [], seeds=2)
    assert len(compare(cells)) == 2
    _, states, metrics, _ = together(cells)
    assert "action_loss" not in metrics
    first = init_params(jax.random.key(1))["expert"]
    # Weight decay is all that moves it.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2),
        pick(states.state.params, 1)["expert"],
        first,
    )


def test_branches_on_the_step_stay_branches():
    """Mapped over cells, a comparison in every n-th step must not be computed in all of them."""
    cells = make_cells(base(diagnostics=DiagnosticsConfig(every=2, stride=1)), [], seeds=2)
    _, _, _, step = together(cells)
    assert "conditional" in step._compiled.as_text()


def test_a_cell_that_diverges_leaves_the_others_alone():
    cells = make_cells(base(), ["optim.learning_rate=0.01,1e30"], seeds=1)
    _, states, _, _ = together(cells)
    assert states.diverged.tolist() == [False, True]
    assert states.skipped[0] == 0 and states.skipped[1] >= 2
    want, _ = alone(cells[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pick(states.state.params, 0), want.params
    )


def test_cells_on_eight_devices():
    """Five cells on eight devices, three copies: the same models, and nothing is said between devices."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.lab.test_together"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found == {"gap": found["gap"], "collectives": 0, "shards": [8, 1]} and found["gap"] < 1e-6


def main() -> None:
    """Five cells on one device and on eight."""
    cells = make_cells(base(), [], seeds=5)
    _, one, _, _ = together(cells)
    _, eight, _, step = together(cells, jax.devices())
    leaf = eight.state.params["backbone"]["mix"]
    gaps = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)[:5]).max()),
        one.state.params,
        eight.state.params,
    )
    text = step._compiled.as_text()
    out = {
        "gap": max(jax.tree.leaves(gaps)),
        "collectives": sum(
            text.count(name) for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        ),
        "shards": [len(leaf.addressable_shards), leaf.addressable_shards[0].data.shape[0]],
    }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
