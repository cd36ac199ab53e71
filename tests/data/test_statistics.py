"""Statistics against numpy over all rows at once; what they are cached under; what they refuse."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import toy
from vla_jax.data.index import index_dataset
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.source import EpisodeSource
from vla_jax.data.statistics import Accumulator, compute_statistics, constant_dims, dataset_statistics


def encoded(number, state, action, task="reach"):
    return EncodedEpisode(
        number=number,
        state=np.asarray(state, np.float32),
        action=np.asarray(action, np.float32),
        png={},
        language_instruction="",
        text_target=("",) * len(state),
        metadata={"task": task, "seed": 10 + number},
    )


def check(found, rows):
    rows = np.asarray(rows, np.float64)
    wanted = {
        "mean": rows.mean(0),
        "std": rows.std(0),
        "min": rows.min(0),
        "max": rows.max(0),
        "q01": np.quantile(rows, 0.01, axis=0),
        "q99": np.quantile(rows, 0.99, axis=0),
    }
    assert found.count == len(rows)
    for name, value in wanted.items():
        scale = np.abs(rows).max() + 1e-30
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-12 * scale, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1e4, -3e5]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_accumulator_equals_numpy(chunks, offset, scale, seed):
    rng = np.random.default_rng(seed)
    parts = [(offset + scale * rng.normal(size=(n, 3))).astype(np.float32) for n in chunks]
    accumulator = Accumulator(3)
    for part in parts:
        accumulator.add(part)
    rows = np.concatenate(parts).astype(np.float64)
    check(accumulator.result(), rows)


def test_data_set_and_each_task(dataset, episodes):
    found = dataset_statistics(EpisodeSource(dataset), range(len(episodes)))
    groups = {"": found.dataset, **found.per_task}
    assert sorted(groups) == ["", "push", "reach"]
    for task, statistics in groups.items():
        members = [e for e in episodes if not task or e.metadata["task"] == task]
        check(statistics.state, np.concatenate([e.state for e in members]))
        check(statistics.action, np.concatenate([e.action for e in members]))


def test_sampled_quantiles_of_many_rows():
    rows = np.random.default_rng(0).uniform(size=(50_000, 2)).astype(np.float32)
    results = []
    for _ in range(2):
        accumulator = Accumulator(2, max_rows=5_000)
        for start in range(0, len(rows), 123):
            accumulator.add(rows[start : start + 123])
        assert accumulator._kept <= 10_000
        results.append(accumulator.result())
    assert results[0] == results[1]
    # Standard error of a quantile p of n uniform samples: sqrt(p (1 - p) / n) = 0.0014; five of them.
    np.testing.assert_allclose(results[0].q01, 0.01, atol=0.007)
    np.testing.assert_allclose(results[0].q99, 0.99, atol=0.007)
    np.testing.assert_allclose(results[0].mean, rows.astype(np.float64).mean(0), rtol=1e-12)


def test_the_sample_takes_early_and_late_rows_alike():
    accumulator = Accumulator(1, max_rows=1_000)
    for start in range(0, 20_000, 100):
        accumulator.add(np.arange(start, start + 100, dtype=np.float32)[:, None])
    accumulator.result()
    (rows,) = accumulator._rows
    assert len(np.unique(rows)) == 1_000
    thirds = np.histogram(rows, bins=4, range=(0, 20_000))[0]
    assert thirds.min() > 200 and thirds.max() < 300


def test_constant_dims_are_exact_and_told():
    value = np.float32(0.1)  # not exact in binary: a mean of it may be off by rounding
    state = np.column_stack([np.full(1001, value), np.linspace(0, 1, 1001)])
    found = compute_statistics([encoded(0, state, np.ones((1001, 3)))], toy.SCHEMA)
    assert found.dataset.state.constant == (True, False)
    assert found.dataset.state.std[0] == 0.0
    assert found.dataset.state.mean[0] == float(value)
    lines = constant_dims({"": found.dataset, **found.per_task}, toy.SCHEMA)
    assert any(line.startswith("task ") and "state 'x'" in line for line in lines)
    assert "state 'x' is always 0.1; it normalises to 0" in lines
    assert "action 'grip' is always 1; it normalises to 0" in lines
    assert not any("'y'" in line for line in lines)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    action = np.zeros((4, 3), np.float32)
    action[2, 1] = value
    message = rf"episode 1 \(seed 5\) step 2: action 'dy' is {value}; leave this episode out"
    toy.write(tmp_path, [toy.make_episode(0), toy.make_episode(5, length=4, action=action)], shards=1)
    source = EpisodeSource(tmp_path)
    with pytest.raises(ValueError, match=message):
        index_dataset(source)
    with pytest.raises(ValueError, match=message):
        dataset_statistics(source, [0, 1])


def test_missing_dims():
    with pytest.raises(ValueError, match="episode 4: state has 1 dims, the schema toy 2"):
        compute_statistics([encoded(4, np.zeros((3, 1)), np.zeros((3, 3)))], toy.SCHEMA)
    with pytest.raises(ValueError, match="no episodes"):
        compute_statistics([], toy.SCHEMA)


def test_cache_is_keyed_by_what_it_was_computed_from(tmp_path, monkeypatch):
    episodes = [toy.make_episode(seed) for seed in range(6)]
    toy.write(tmp_path, episodes, shards=1)
    source = EpisodeSource(tmp_path)
    read = []
    monkeypatch.setattr(source, "read", lambda n, original=source.read: read.append(n) or original(n))
    first = dataset_statistics(source, [0, 1, 2])
    assert read == [0, 1, 2]
    assert dataset_statistics(source, [0, 1, 2]) == first and read == [0, 1, 2]
    assert dataset_statistics(source, [0, 1, 3]) != first and read == [0, 1, 2, 0, 1, 3]
    # Other data under the same path; the files even have the same sizes.
    changed = dataclasses.replace(episodes[0], state=episodes[0].state + 1)
    toy.write(tmp_path, [changed, *episodes[1:]], shards=1)
    again = dataset_statistics(EpisodeSource(tmp_path), [0, 1, 2])
    check(again.dataset.state, np.concatenate([e.state for e in (changed, *episodes[1:3])]))


def test_a_torn_cache_file_is_computed_again(tmp_path):
    toy.write(tmp_path, [toy.make_episode(seed) for seed in range(3)])
    source = EpisodeSource(tmp_path)
    first = dataset_statistics(source, range(3))
    (path,) = (tmp_path / "derived").iterdir()
    path.write_text(path.read_text()[:50])
    assert dataset_statistics(source, range(3)) == first
