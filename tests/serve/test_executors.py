import dataclasses

import jax
import numpy as np
import pytest

from vla_jax.serve.executors import ExecutorConfig, Overlapping, RecedingHorizon, make_executor
from vla_jax.types import Observation

SOLVER = object()  # the executor only hands it on


def observe(position: np.ndarray) -> Observation:
    robots = len(position)
    return Observation(
        images={"top": np.zeros((robots, 4, 4, 3), np.uint8)},
        state=position.astype(np.float32),
        instruction=("go",) * robots,
    )


@dataclasses.dataclass
class CountingPolicy:
    """Predicts the absolute index of each step since the last look, and remembers how it was asked."""

    horizon: int = 6
    execute: int = 5
    calls: list = dataclasses.field(default_factory=list)

    def plan(self, observation, key, temperature):
        self.calls.append(("plan", jax.random.key_data(key).tolist(), temperature))
        return [f"plan {i}" for i in range(len(observation.instruction))]

    def act(self, observation, key, *, solver, plan=None, plan_visible=False):
        assert solver is SOLVER
        self.calls.append(("act", jax.random.key_data(key).tolist(), plan, plan_visible))
        return observation.state[:, None, :] + np.arange(1, self.horizon + 1)[None, :, None]


@dataclasses.dataclass
class RunningPolicy(CountingPolicy):
    """The same, told which chunk runs."""

    told: list = dataclasses.field(default_factory=list)

    def act(self, observation, key, *, running=None, **how):
        self.told.append(running)
        return super().act(observation, key, **how)


@dataclasses.dataclass
class NumberedPolicy(CountingPolicy):
    """Each chunk holds the number of its prediction in the first dimension, the step within it in the second."""

    def act(self, observation, key, *, solver, plan=None, plan_visible=False):
        self.calls.append("act")
        steps = np.arange(self.horizon)
        chunk = np.stack([np.full(self.horizon, len(self.calls) - 1), steps], axis=-1)
        return np.repeat(chunk[None].astype(np.float32), len(observation.instruction), axis=0)


def executor_of(kind: str, policy, **changes):
    keeps = changes.pop("keeps", None)
    config = ExecutorConfig(kind=kind, **changes)
    return make_executor(policy, config, solver=SOLVER, key=jax.random.key(0), keeps=keeps)


def drive(executor, robots: int, rounds: int) -> np.ndarray:
    """Runs position ← action and returns all the executed actions, [b rounds·K a]."""
    position, executed = np.zeros((robots, 1)), []
    executor.reset(observe(position))
    for _ in range(rounds):
        actions = executor(observe(position))
        position = actions[:, -1]
        executed.append(actions)
    return np.concatenate(executed, axis=1)


@pytest.mark.parametrize("execute", [1, 4, 6])
def test_executed_steps_are_contiguous(execute):
    executor = RecedingHorizon(
        CountingPolicy(), ExecutorConfig(execute=execute), solver=SOLVER, key=jax.random.key(0)
    )
    actions = drive(executor, robots=3, rounds=5)
    expected = np.arange(1, 5 * execute + 1)
    np.testing.assert_array_equal(actions[..., 0], np.broadcast_to(expected, (3, 5 * execute)))


def test_unless_told_otherwise_as_many_steps_as_the_policy_says_are_run():
    for kind in ("receding", "async", "ensemble"):
        assert drive(executor_of(kind, CountingPolicy(execute=3)), robots=2, rounds=2).shape == (2, 6, 1)
        assert drive(executor_of(kind, CountingPolicy(), execute=2), robots=2, rounds=2).shape == (2, 4, 1)
    with pytest.raises(ValueError, match=r"delay=4 is more than execute=3.*use --execute 4"):
        executor_of("async", CountingPolicy(execute=3), delay=4)


def test_each_prediction_has_its_own_noise_and_an_episode_can_be_repeated():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(7))
    drive(executor, robots=1, rounds=4)
    first = [call[1] for call in policy.calls]
    assert len({str(key) for key in first}) == 4
    policy.calls.clear()
    drive(executor, robots=1, rounds=4)
    assert [call[1] for call in policy.calls] == first


def test_plan_is_decoded_once_held_and_shown():
    policy = CountingPolicy()
    config = ExecutorConfig(execute=2, plan_visible=True)
    executor = RecedingHorizon(policy, config, solver=SOLVER, key=jax.random.key(0))
    drive(executor, robots=2, rounds=3)
    assert [call[0] for call in policy.calls] == ["plan", "act", "act", "act"]
    assert all(call[2:] == (["plan 0", "plan 1"], True) for call in policy.calls[1:])
    assert len({str(call[1]) for call in policy.calls}) == 4


def test_the_plans_temperature_reaches_the_policy():
    for temperature in (0.0, 0.7):
        policy = CountingPolicy()
        drive(executor_of("receding", policy, plan_visible=True, temperature=temperature), robots=1, rounds=1)
        assert policy.calls[0][0] == "plan" and policy.calls[0][2] == temperature
    with pytest.raises(ValueError, match=r"temperature=-1.* is negative"):
        ExecutorConfig(temperature=-1.0)


def test_without_plan_visible_nothing_is_decoded_and_a_forced_plan_is_shown_anyway():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(0))
    drive(executor, robots=2, rounds=2)
    assert all(call[0] == "act" and call[2:] == (None, False) for call in policy.calls)
    executor.reset(observe(np.zeros((2, 1))), plan=["a", "b"])
    executor(observe(np.zeros((2, 1))))
    assert policy.calls[-1][2:] == (["a", "b"], True)
    executor.reset(observe(np.zeros((2, 1))))
    executor(observe(np.zeros((2, 1))))
    assert policy.calls[-1][2:] == (None, False)


def test_only_active_robots_are_computed_and_each_keeps_its_own_plan():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(0))
    observation = observe(np.array([[10.0], [20.0], [30.0]]))
    executor.reset(observation, plan=["a", "b", "c"])
    actions = executor(observation, active=np.array([True, False, True]))
    np.testing.assert_array_equal(actions[..., 0], [[11, 12], [0, 0], [31, 32]])
    assert policy.calls[-1][2] == ["a", "c"]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ExecutorConfig(execute=0)
    with pytest.raises(ValueError, match="use --execute 6 or less"):
        RecedingHorizon(CountingPolicy(), ExecutorConfig(execute=7), solver=SOLVER, key=jax.random.key(0))
    executor = RecedingHorizon(
        CountingPolicy(horizon=8), ExecutorConfig(), solver=SOLVER, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="1 plans for 2 robots"):
        executor.reset(observe(np.zeros((2, 1))), plan=["a"])


@pytest.mark.parametrize("kind", ["receding", "async", "rtc", "rtc_jacobian_free", "rtc_prefix"])
def test_without_a_delay_every_executor_runs_the_first_actions_of_each_chunk(kind):
    actions = drive(executor_of(kind, RunningPolicy(), execute=3), robots=2, rounds=4)
    np.testing.assert_array_equal(actions[0, :, 0], np.arange(1, 13))


def test_a_synchronous_robot_stands_still_while_it_predicts():
    executor = executor_of("receding", NumberedPolicy(horizon=6), execute=2, delay=2, keeps=[False, True])
    executor.reset(observe(np.zeros((1, 1))))
    pieces = [executor(observe(np.zeros((1, 1))))[0].tolist() for _ in range(2)]
    assert pieces[0] == [[0, 0], [0, 1]]
    # The second dimension keeps its value, the first is a rate.
    assert pieces[1] == [[0, 1], [0, 1], [1, 0], [1, 1]]
    assert executor.switches == [4]


@pytest.mark.parametrize(("delay", "execute"), [(0, 2), (1, 2), (2, 2), (2, 3)])
def test_an_asynchronous_robot_runs_the_old_chunk_until_the_new_one_is_there(delay, execute):
    """Every step is run exactly once, by the newest chunk that is there at its time, without a gap."""
    executor = executor_of("async", NumberedPolicy(horizon=6), execute=execute, delay=delay)
    executor.reset(observe(np.zeros((2, 1))))
    actions = np.concatenate([executor(observe(np.zeros((2, 1)))) for _ in range(4)], axis=1)
    expected = []
    for step in range(4 * execute):
        newest = max(n for n in range(4) if n == 0 or n * execute + delay <= step)
        expected.append([newest, step - newest * execute])
    np.testing.assert_array_equal(actions, np.broadcast_to(expected, actions.shape))
    assert executor.switches == [n * execute + delay for n in (1, 2, 3)]


def test_the_policy_is_told_what_runs():
    policy = RunningPolicy(horizon=6)
    executor = executor_of("rtc", policy, execute=2, delay=1, bound=7.0)
    drive(executor, robots=2, rounds=3)
    assert policy.told[0] is None
    for told, looked_at in zip(policy.told[1:], (0, 2)):
        # Looked at `looked_at`, planned the six steps behind it, ran two of them.
        expected = [looked_at + n for n in (3, 4, 5, 6)] + [0, 0]
        np.testing.assert_array_equal(told.actions[0, :, 0], expected)
        assert (told.delay, told.end, told.how, told.bound) == (1, 4, "vjp", 7.0)


def test_the_pull_can_be_shortened():
    policy = RunningPolicy(horizon=12)
    drive(executor_of("rtc", policy, execute=2, delay=1, overlap=3), robots=1, rounds=2)
    assert (policy.told[1].delay, policy.told[1].end) == (1, 3)
    with pytest.raises(ValueError, match="use --overlap 2 or more"):
        ExecutorConfig(kind="rtc", execute=4, delay=2, overlap=1)
    for kind in ("receding", "async", "ensemble", "rtc_prefix"):
        with pytest.raises(ValueError, match=f"overlap=3 does nothing with executor {kind}; use rtc or"):
            ExecutorConfig(kind=kind, overlap=3)


def test_only_the_active_robots_chunks_are_told():
    policy = RunningPolicy()
    executor = executor_of("rtc", policy, execute=2)
    observation = observe(np.array([[10.0], [20.0], [30.0]]))
    executor.reset(observation)
    executor(observation)
    executor(observation, active=np.array([True, False, True]))
    np.testing.assert_array_equal(policy.told[-1].actions[:, 0, 0], [13, 33])


@pytest.mark.parametrize(("delay", "execute", "decay"), [(0, 1, 0.01), (0, 1, 0.5), (2, 2, 0.1), (1, 3, 0.0)])
def test_ensembling_averages_the_chunks_that_are_there(delay, execute, decay):
    """Against a loop over steps and predictions; execute 1 without delay is ACT's algorithm 2."""
    horizon = 6
    executor = executor_of(
        "ensemble", NumberedPolicy(horizon=horizon), execute=execute, delay=delay, decay=decay
    )
    executor.reset(observe(np.zeros((1, 1))))
    actions = np.concatenate([executor(observe(np.zeros((1, 1)))) for _ in range(9)], axis=1)[0]
    for step, action in enumerate(actions):
        there = [
            (n, step - n * execute)
            for n in range(9)
            if n * execute + (delay if n else 0) <= step < n * execute + horizon
        ]
        weights = np.exp(-decay * np.arange(len(there)))
        np.testing.assert_allclose(action, weights @ np.asarray(there) / weights.sum(), rtol=1e-5)


def test_guidance_reaches_the_policy():
    class Guided(CountingPolicy):
        def act(self, observation, key, *, guidance, **how):
            self.weight = guidance
            return super().act(observation, key, **how)

    policy = Guided()
    drive(executor_of("receding", policy, execute=2, guidance=2.5), robots=1, rounds=1)
    assert policy.weight == 2.5


def test_delays_that_cannot_be_bridged_are_refused():
    with pytest.raises(ValueError, match=r"delay=3 is more than execute=2.*use --execute 3"):
        ExecutorConfig(kind="async", execute=2, delay=3)
    with pytest.raises(ValueError, match="use --execute 4 or less"):
        executor_of("rtc", CountingPolicy(), execute=5, delay=2)
    with pytest.raises(ValueError, match="'fast' is unknown"):
        ExecutorConfig(kind="fast")
    assert isinstance(executor_of("async", CountingPolicy(), execute=3, delay=3), Overlapping)
    executor_of("receding", CountingPolicy(), execute=6, delay=9)


@dataclasses.dataclass
class DrawingPolicy(CountingPolicy):
    """Chunks are what each robot draws; prediction number `broken` is not finite."""

    broken: int = -1

    def act(self, observation, key, *, running=None, **how):
        super().act(observation, key, **how)
        chunks = np.array(jax.vmap(lambda one: jax.random.normal(one, (self.horizon, 1)))(key))
        chunks[-1] = np.nan if len(self.calls) - 1 == self.broken else chunks[-1]
        return chunks


KINDS = ("receding", "async", "ensemble", "rtc")


@pytest.mark.parametrize("kind", KINDS)
def test_an_episodes_noise_depends_on_neither_the_others_nor_their_number(kind):
    keys = jax.random.split(jax.random.key(5), 3)
    config = ExecutorConfig(kind=kind, execute=2)

    def run(rows, active):
        executor = make_executor(DrawingPolicy(), config, solver=SOLVER, key=keys[np.array(rows)])
        observation = observe(np.zeros((len(rows), 1)))
        executor.reset(observation)
        return np.concatenate([executor(observation), executor(observation, active=np.array(active))], axis=1)

    together = run([0, 1, 2], [True, True, True])
    np.testing.assert_array_equal(run([0, 1, 2], [False, True, True])[1:], together[1:])  # one has ended
    np.testing.assert_array_equal(run([2, 1], [True, True]), together[[2, 1]])
    np.testing.assert_array_equal(run([1], [True]), together[[1]])
    assert np.abs(together[:, :2] - together[:, 2:]).min() > 1e-6  # and differs from step to step


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_may_be_written_to(kind):
    """A robot that clips in place changes neither the rest of the chunk nor what it waits with."""

    def run(spoil):
        executor = executor_of(kind, RunningPolicy(horizon=6), execute=2, delay=2, keeps=[True])
        executor.reset(observe(np.zeros((2, 1))))
        made = []
        for _ in range(3):
            actions = executor(observe(np.zeros((2, 1))))
            made.append(actions.copy())
            if spoil:
                actions[:] = 99
        return np.concatenate(made, axis=1)

    np.testing.assert_array_equal(run(True), run(False))


@pytest.mark.parametrize("kind", KINDS)
def test_actions_that_are_not_finite_are_not_run_and_the_executor_goes_on(kind):
    observation, config = observe(np.zeros((2, 1))), ExecutorConfig(kind=kind, execute=2, delay=1)
    how = {"solver": SOLVER, "key": jax.random.key(3)}
    executor, whole = (make_executor(DrawingPolicy(broken=n), config, **how) for n in (1, -1))
    for one in (executor, whole):
        one.reset(observation)
        one(observation)
    with pytest.raises(FloatingPointError, match="actions for robot 1 are not finite"):
        executor(observation)
    np.testing.assert_array_equal(executor(observation), whole(observation))
    assert executor.switches == whole.switches


@pytest.mark.parametrize("kind", KINDS)
def test_observations_that_no_robot_can_have_are_refused_at_the_door(kind):
    executor, good = executor_of(kind, RunningPolicy(), execute=2), observe(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="call reset"):
        executor(good)
    executor.reset(good)
    for wrong, message in (
        (dataclasses.replace(good, images={"top": good.images["top"] / 255}), r"images\['top'\] is float64"),
        (observe(np.array([[0.0], [np.nan]])), r"state\[1, 0\] is nan"),
        (dataclasses.replace(good, instruction="go"), "instruction is a text"),
        (observe(np.zeros((3, 1))), "3 texts; the episode began with 2 robots"),
    ):
        with pytest.raises(ValueError, match=message):
            executor(wrong)
