"""A third term, of one file (`state_term`) and one line in `TERMS`: nothing else has to know of it.

It is trained on the tabletop side by side under a policy that balances gradients, and stands in metrics, diagnostics,
validation and in the sweep's report.
"""

import csv
import json

import jax
import numpy as np
import pytest

from tests.lab import sweeper
from tests.objectives import toy
from tests.objectives.state_term import StateTerm
from tests.objectives.test_weighting_step import run, start
from tests.serve.toy import dataset
from vla_jax.cli.command import cli_with_config
from vla_jax.cli.train import TrainArgs
from vla_jax.config import TrainConfig, from_json, to_json
from vla_jax.files import read_lines
from vla_jax.lab.columns import along_one_axis
from vla_jax.lab.grid import make_cells, replaced, value_of
from vla_jax.lab.plan import plan
from vla_jax.lab.report import write_report
from vla_jax.lab.run import SweepConfig, sweep
from vla_jax.lab.store import Store
from vla_jax.lab.table import Row, read_rows
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.objective import Objective
from vla_jax.objectives.terms import TERMS
from vla_jax.objectives.weighting import WeightingConfig

GRID = ("objective.weights.state=0.3,3",)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The line in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TERMS, "state", StateTerm())
        yield


def base() -> TrainConfig:
    return replaced(
        sweeper.base(str(dataset())),
        {"objective.weighting.policy": "gradnorm", "train.val_every": 4, "train.save_every": 4},
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two cells that differ in the third λ, trained as one program."""
    store = Store(tmp_path_factory.mktemp("three"))
    cells = make_cells(base(), GRID, seeds=1)
    assert [cell.name for cell in cells] == ["state=0.3,seed=0", "state=3,seed=0"]
    sweep(cells, store, SweepConfig(episodes=0), {"command": "python -m launch.sweep …"})
    return store, cells


def test_metrics_diagnostics_and_validation_have_it(swept):
    store, cells = swept
    logs = [read_lines(store.cell(cell.name) / "metrics.jsonl") for cell in cells]
    training, validation = ([lines[i] for lines in logs] for i in (-2, -1))
    for line in training:
        for name in ("state_loss", "text_loss", "action_loss", "state_weight", "diagnostics/state_norm"):
            assert line[name] > 0, name
        assert {
            "diagnostics/cosine",
            "diagnostics/cosine_text_state",
            "diagnostics/cosine_action_state",
        } <= set(line)
        assert len(line["diagnostics/ratio_action_state_by_time"]) == 2
        weights = [line[f"{name}_weight"] for name in ("text", "action", "state")]
        assert sum(weights) == pytest.approx(3, rel=1e-5)  # GradNorm's, of three losses
    assert training[0]["state_weight"] < training[1]["state_weight"]  # the balance that is asked for differs
    assert all(line["val/state_loss"] > 0 for line in validation)


def test_the_report_has_it(swept, tmp_path):
    store, _ = swept
    files = {path.name for path in write_report([store.root], tmp_path)}
    assert {"report.html", "curves.png", "gradients.png", "gradients_text_state.png"} <= files
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(row["state_weight"]) for row in rows] == [0.3, 3] and all(
        float(row["state_loss"]) > 0 for row in rows
    )
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert [s["state_weight"] for s in numbers["settings"]] == [0.3, 3]
    assert numbers["settings"][0]["state_loss"]["mean"] == float(rows[0]["state_loss"])
    assert "λ_state=0.3" in numbers["settings"][0]["label"]
    (row, *_) = along_one_axis(read_rows([store.root]))
    assert row.axis == "state" and row.weight == 0.3


def objective(**values) -> ObjectiveConfig:
    return ObjectiveConfig(weights=(("state", 0.5),), **values)


@pytest.mark.parametrize("policy", ["fixed", "cosine", "uncertainty", "gradnorm", "pcgrad"])
def test_policies_of_all_kinds_weigh_three_losses(policy):
    """Constant, scheduled, by losses, by gradients with a memory and without. Microbatches and an empty sample change
    nothing, and what is remembered is finite."""
    data = toy.batch_of()
    values = {"start": 0.2} if policy == "cosine" else {}
    cfg = toy.config(objective(weighting=WeightingConfig(policy=policy, **values)))
    state, metrics = run(cfg, data, steps=2)
    padded = jax.tree.map(lambda x: np.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1)), data)
    parts = replaced(cfg, {"train.accumulate": 2})
    other, again = run(parts, padded, steps=2)
    names = {"text_loss", "action_loss", "state_loss", "loss", "grad_norm"}
    if policy != "fixed":
        names |= {"text_weight", "action_weight", "state_weight"}
    assert names <= metrics.keys()
    for name in names:
        np.testing.assert_allclose(again[name], metrics[name], rtol=2e-4, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), other.weighting, state.weighting
    )
    assert all(np.isfinite(x) for x in jax.tree.leaves(state.weighting))


def test_its_gradient_flows():
    """λ times the derivative of the term alone is what it adds to the step's gradient."""
    data, params = toy.batch_of(), toy.params_of()

    def gradient(config):
        of = Objective(model=toy.Toy(), process=toy.Process(), config=config)
        drawn = of.draw(jax.random.key(0), data)
        return jax.jit(jax.grad(lambda p: of.losses(p, data, drawn, of.counts(data, drawn)).total))(params)

    three, two, alone = map(
        gradient,
        (
            objective(),
            ObjectiveConfig(),
            ObjectiveConfig(text=False, action_weight=0.0, weights=(("state", 1.0),)),
        ),
    )
    assert np.abs(alone["backbone"]["mix"]).max() > 1e-3 and not np.abs(alone["expert"]["x"]).any()
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + 0.5 * c, rtol=1e-4, atol=1e-6), three, two, alone
    )


def test_of_weight_zero_it_is_not_there():
    """Neither in the program nor in the log; the other losses' draws are the same."""
    data = toy.batch_of()
    without = toy.config(ObjectiveConfig())
    zero = toy.config(ObjectiveConfig(weights=(("state", 0.0),)))
    (a, first), (b, second) = (run(cfg, data, steps=1, state=start(cfg)) for cfg in (without, zero))
    assert first.keys() == second.keys() and "state_loss" not in first
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_its_weight_is_saved_and_an_unknown_name_is_one_line():
    cfg = TrainConfig(objective=objective())
    assert from_json(to_json(cfg)) == cfg and cfg.objective.weight("state") == 0.5
    for weights, message in (
        (
            (("stat", 1.0),),
            r"'stat', which is no term of the objective; did you mean 'state'\?",
        ),
        ((("action", 1.0),), "'action', whose option is objective.action_weight"),
        ((("state", 1.0), ("state", 2.0)), "names 'state' twice"),
        ((("state", -1.0),), "state -1.0 is negative"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            TrainConfig(objective=ObjectiveConfig(weights=weights))
        assert "\n" not in str(error.value)


def test_its_weight_is_an_option_and_a_field_of_a_grid(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "from vla_jax.config import TrainConfig\n\n\ndef get_config():\n    return TrainConfig()\n"
    )
    argv = ("--config", str(file), "--run-dir", "x", "--objective.weights", "state", "0.25")
    _, cfg = cli_with_config(TrainArgs, description=None, argv=argv)
    assert cfg.objective.weights == (("state", 0.25),) and cfg.objective.asked == ("text", "action", "state")
    cells = make_cells(cfg, ["objective.weights.state=0,1,2", "objective.action_weight=0,3"], seeds=1)
    assert [len(group.cells) for group in plan(cells)] == [1, 1, 2, 2]  # which losses are left out decides
    assert value_of(cells[0].config, "objective.weights.state") == 0
    assert value_of(TrainConfig(), "objective.weights.state") == 0
    (group,) = (
        group for group in plan(cells) if len(group.cells) == 2 and "action" in group.config.objective.asked
    )
    knobs = group.knobs()
    assert knobs.weights["state"].tolist() == [1, 2] and knobs.weights["action"].tolist() == [3, 3]
    with pytest.raises(
        ValueError, match=r"no field objective.weights.stat; did you mean objective.weights.state\?"
    ):
        make_cells(cfg, ["objective.weights.stat=1"], seeds=1)


def test_a_report_has_one_lambda():
    """Cells that differ in two weights are no line; which to choose is said."""

    def row(**weights):
        config = replaced(TrainConfig(), {f"objective.{name}": value for name, value in weights.items()})
        return Row(name="", config=config, result={}, folder=None)

    rows = [row(action_weight=a, weights=(("state", s),)) for a in (1.0, 2.0) for s in (0.5, 5.0)]
    with pytest.raises(
        ValueError, match=r"weights of action and of state, .* --where objective.weights.state=5$"
    ):
        along_one_axis(rows)
    assert {r.axis for r in along_one_axis(rows[:2])} == {"state"}
    assert {r.axis for r in along_one_axis(rows[::2])} == {"action"}
