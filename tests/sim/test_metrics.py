import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_jax.sim import metrics


@pytest.mark.parametrize(
    ("wins", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_newcombes_published_table(wins, trials, low, high):
    assert metrics.wilson(wins, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_their_equation_and_are_symmetric(case):
    wins, trials = case
    low, high = metrics.wilson(wins, trials)
    share = wins / trials
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(
            metrics.Z_95**2 * bound * (1 - bound) / trials, abs=1e-12
        )
    assert 0 <= low <= share <= high <= 1
    mirrored = metrics.wilson(trials - wins, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_impossible_counts():
    for wins, trials in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="trials"):
            metrics.wilson(wins, trials)


def test_sides_share_and_entropy():
    assert metrics.sides(["left", "right"]) == pytest.approx((0.5, 1.0, 2))
    assert metrics.sides(["left"] * 5) == pytest.approx((1.0, 0.0, 5))
    # Binary entropy of 1/4: 2 - (3/4)·log2(3).
    assert metrics.sides(["left", "right", "right", "right", "none"]) == pytest.approx(
        (0.25, 2 - 0.75 * np.log2(3), 4)
    )
    assert metrics.sides(["none", None]) is None


def test_chunk_diversity_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    chunks, scale = rng.normal(size=(3, 5, 4, 2)), np.array([0.5, 3.0])
    distances = [
        np.sqrt(np.mean(((first - second) / scale) ** 2))
        for observation in chunks
        for first, second in itertools.combinations(observation, 2)
    ]
    assert metrics.chunk_diversity(chunks, scale) == pytest.approx(np.mean(distances))


def test_chunk_diversity_of_equal_and_of_independent_chunks():
    rng = np.random.default_rng(1)
    scale = np.array([0.1, 20.0])
    same = np.repeat(rng.normal(size=(2, 1, 8, 2)), 6, axis=1)
    assert metrics.chunk_diversity(same, scale) == 0.0
    noise = rng.normal(size=(4, 8, 2000, 2)) * scale
    assert metrics.chunk_diversity(noise, scale) == pytest.approx(np.sqrt(2), rel=0.02)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.chunk_diversity(same[:, :1], scale)


def test_aggregation_by_task_and_group():
    records = [
        {"task": "reach", "group": "easy", "success": True},
        {"task": "reach", "group": "easy", "success": True},
        {"task": "reach", "group": "easy", "success": False},
        {"task": "push", "group": "easy", "success": False},
        {"task": "hammer", "group": "hard", "success": True},
    ]
    tasks = metrics.per_task(records)
    assert list(tasks) == ["reach", "push", "hammer"]
    assert tasks["reach"]["success"] == pytest.approx(2 / 3)
    assert tasks["reach"]["success_ci"] == list(metrics.wilson(2, 3))
    groups = metrics.per_group(records)
    assert groups["easy"]["success"] == pytest.approx(0.5)
    assert groups["easy"]["success_tasks"] == pytest.approx(1 / 3)
    assert (groups["easy"]["tasks"], groups["hard"]["episodes"]) == (2, 1)
    assert metrics.per_group([{"task": "a", "success": True}]) == {}


def test_mean_of_skips_missing_values():
    records = [{"x": 1.0}, {"x": None}, {"x": 3.0}, {}]
    assert metrics.mean_of(records, "x") == 2.0
    assert metrics.mean_of(records, "y") is None


def test_smoothness_of_known_motions():
    """Constant acceleration has no jerk; a step between chunks is a jump at the switch and nowhere else."""
    t = np.arange(10.0)
    ramp = np.stack([0.5 * t, -2 * t], axis=-1)
    step = np.stack([np.where(t < 4, 1.0, 4.0), np.where(t < 4, 2.0, 6.0)], axis=-1)
    even, jumpy, short, cut = metrics.smoothness(
        np.stack([ramp, step, ramp, step]), [10, 10, 1, 4], switches=[4, 7], control_hz=10.0
    )
    assert even == pytest.approx((0, np.hypot(0.5, 2), np.hypot(0.5, 2)), abs=1e-9)
    # The step of (3, 4) bends twice, up and down again: 2 (9 + 16) over 8 bends of 2 dimensions, at 10 Hz squared.
    assert jumpy.jerk == pytest.approx(np.sqrt(50 / 16) * 100)
    assert (jumpy.switch_jump, jumpy.step_jump) == (2.5, 0.0)
    assert short == (None, None, None)
    assert cut == (0.0, None, 0.0)  # what was commanded after the end does not count
