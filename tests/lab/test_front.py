"""Fronts, hypervolumes and regrets against numbers worked out in another way."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.config import TrainConfig
from vla_jax.lab.figures import draw_front, draw_policies
from vla_jax.lab.front import apart, hypervolume, judge, pareto, pareto_settings
from vla_jax.lab.grid import replaced
from vla_jax.lab.table import Row, check_comparable, mean_of, settings_of, where

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
    assert hypervolume(np.array(some)) == pytest.approx(covered.mean(), abs=1e-9)


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


def some_rows():
    rows = [
        row("fixed", weight, seed, ce, action, success)
        for weight, ce, action, success in ((0.1, 1.0, 4.0, 0.2), (1.0, 2.0, 1.0, 0.5), (10.0, 4.0, 1.0, 0.9))
        for seed in (0, 1)
    ]
    return [*rows, row("uncertainty", 1.0, 0, 1.0, 2.0, 0.8), row("uncertainty", 1.0, 1, 2.0, 2.0, 0.9)]


def test_regret_is_against_the_best_fixed_weight():
    """CE 1, 2, 4 and action loss 4, 1, 1: u is (0, 1), (½, 0), (1, 0), so λ = 1 costs ¼ and is the best."""
    verdicts = judge(settings_of(some_rows()))
    assert verdicts.best.weight == 1.0 and verdicts.most_successful.weight == 10.0
    assert verdicts.front.mean == pytest.approx(0.5)
    (found,) = verdicts.policies
    # Seeds: u = (0, ½) and (½, ½); costs ¼ and ½.
    assert found.hypervolume.values == pytest.approx((0.5, 0.25))
    assert found.regret.values == pytest.approx((0.0, 0.25))
    assert found.success_regret.values == pytest.approx((0.1, 0.0))
    assert [v.regret.mean for v in verdicts.fixed] == pytest.approx([0.25, 0.0, 0.25])


def test_regret_is_paired_by_seed_where_a_sweep_is_unfinished():
    """Seed 0 of the policy is missing: its seed 1 is compared with the best λ's seed 1, not with its first."""
    rows = [
        row("fixed", weight, seed, ce * (1 + seed), action, 0.5 + 0.1 * seed)
        for weight, ce, action in ((0.1, 1.0, 4.0), (1.0, 2.0, 1.0))
        for seed in (0, 1)
    ]
    rows.append(row("mgda", 1.0, 1, 4.0, 1.0, 0.6))
    verdicts = judge(settings_of(rows))
    (found,) = verdicts.policies
    (best,) = (v for v in verdicts.fixed if v.setting is verdicts.best)
    assert verdicts.best.weight == 1.0 and best.regret.values == (0.0, 0.0)
    assert found.regret.values == (0.0,) and found.success_regret.values == pytest.approx((0.0,))
    # Without a common seed there is nothing to compare with.
    rows[-1] = row("mgda", 1.0, 7, 4.0, 1.0, 0.6)
    (alone,) = judge(settings_of(rows)).policies
    assert alone.regret is None and alone.success_regret is None


def test_pictures_of_policies_show_each_and_the_front():
    found = settings_of(some_rows())
    verdicts = judge(found)
    figure = draw_policies(verdicts)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["uncertainty", "fixed λ = 0.1", "fixed λ = 1", "fixed λ = 10"]
    assert len(figure.axes) == 3
    (losses,) = draw_front(found).axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    (front,) = (line for label, line in lines.items() if "fixed λ, κ = 1" in str(label))
    # λ = 10 has the action loss of λ = 1 at twice its text loss: it is not on the front.
    assert sorted(front.get_xdata()) == pytest.approx([1.0, 2.0]) and "uncertainty" in lines
    assert [s.weight for s in pareto_settings(found)] == [0.1, 1.0, 1.0]


def test_losses_beside_the_smallest_are_paired_by_seed():
    """Seed 1 doubles every loss: the ratios know nothing of it."""
    rows = [
        row("fixed", weight, seed, ce * (1 + seed), action * (1 + seed), 0.5)
        for weight, ce, action in ((0.1, 1.0, 3.0), (1.0, 2.0, 1.0))
        for seed in (0, 1)
    ]
    rows.append(row("mgda", 1.0, 1, 2.2, 2.0, 0.5))
    small, large, mgda = apart(settings_of(rows))
    assert small.losses["ce"] == large.losses["action_loss"] == (0, 0, 0, (0, 0))
    assert small.losses["action_loss"][:3] == pytest.approx((2, 2, 2)) and large.losses[
        "ce"
    ].low == pytest.approx(1)
    assert mgda.losses["ce"].mean == pytest.approx(0.1) and mgda.losses["action_loss"].mean == pytest.approx(
        0
    )


def test_cells_that_differ_in_what_no_figure_shows_are_refused():
    rows = some_rows()
    check_comparable(rows)
    other = dataclasses.replace(rows[0], config=replaced(rows[0].config, {"optim.learning_rate": 0.5}))
    with pytest.raises(ValueError, match=r"optim\.learning_rate .*--where optim\.learning_rate=VALUE"):
        check_comparable([*rows, other])
    assert where([*rows, other], ["optim.learning_rate=0.5"]) == [other]
    with pytest.raises(ValueError, match="use --seeds"):
        where(rows, ["seed=0"])
    with pytest.raises(ValueError, match="no cell"):
        where(rows, ["optim.learning_rate=7"])


def test_without_two_fixed_weights_nothing_is_judged():
    assert (
        judge(settings_of([row("fixed", 1.0, 0, 1.0, 1.0, 0.5), row("mgda", 1.0, 0, 1.0, 1.0, 0.5)])) is None
    )
