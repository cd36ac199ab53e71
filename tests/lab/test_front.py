"""Fronts, hypervolumes and regrets against numbers worked out in another way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.config import TrainConfig
from vla_jax.lab.front import hypervolume, judge, pareto
from vla_jax.lab.grid import replaced
from vla_jax.lab.table import Row, mean_of, settings_of

points = st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])] * 2), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(points)
def test_the_front_dominates_all_else_and_nothing_on_it(some):
    some = np.array(some)
    front = pareto(some)

    def dominates(a, b):
        return (a <= b).all() and (a < b).any()

    for i in range(len(some)):
        assert (i in front) == (not any(dominates(q, some[i]) for q in some))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(points)
def test_hypervolume_counts_the_dominated_grid_cells(some):
    """All coordinates are multiples of 0.1, so the area is a number of squares."""
    corners = np.arange(10) / 10 + 0.05
    x, y = np.meshgrid(corners, corners)
    covered = np.zeros_like(x, bool)
    for a, b in some:
        covered |= (x > a) & (y > b)
    assert hypervolume(some) == pytest.approx(covered.mean(), abs=1e-9)


def test_intervals_are_students():
    assert mean_of([1.0]) == (1, 1, 1, (1.0,))
    found = mean_of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.302653 / 3**0.5)


def row(policy, weight, seed, ce, action, success):
    config = replaced(
        TrainConfig(),
        {"objective.weighting.policy": policy, "objective.action_weight": weight, "seed": seed},
    )
    values = {"objective.weighting.policy": policy, "objective.action_weight": weight, "seed": seed}
    result = {
        "values": values,
        "val": {"text_loss": ce, "action_loss": action},
        "closed_loop": {"success": success},
    }
    return Row(name=f"{policy}{weight}{seed}", config=config, result=result, folder=None)


def test_regret_is_against_the_best_fixed_weight():
    """CE 1, 2, 4 and action loss 4, 1, 1: u is (0, 1), (½, 0), (1, 0), so λ = 1 costs ¼ and is the best."""
    rows = [
        row("fixed", weight, seed, ce, action, success)
        for weight, ce, action, success in ((0.1, 1.0, 4.0, 0.2), (1.0, 2.0, 1.0, 0.5), (10.0, 4.0, 1.0, 0.9))
        for seed in (0, 1)
    ]
    rows += [row("uncertainty", 1.0, 0, 1.0, 2.0, 0.8), row("uncertainty", 1.0, 1, 2.0, 2.0, 0.9)]
    verdicts = judge(settings_of(rows))
    assert verdicts.best.weight == 1.0 and verdicts.most_successful.weight == 10.0
    assert verdicts.front.mean == pytest.approx(0.5)
    (found,) = verdicts.policies
    # Seeds: u = (0, ½) and (½, ½); costs ¼ and ½.
    assert found.hypervolume.values == pytest.approx((0.5, 0.25))
    assert found.regret.values == pytest.approx((0.0, 0.25))
    assert found.success_regret.values == pytest.approx((0.1, 0.0))
    assert [v.regret.mean for v in verdicts.fixed] == pytest.approx([0.25, 0.0, 0.25])


def test_without_two_fixed_weights_nothing_is_judged():
    assert (
        judge(settings_of([row("fixed", 1.0, 0, 1.0, 1.0, 0.5), row("mgda", 1.0, 0, 1.0, 1.0, 0.5)])) is None
    )
