"""The asynchronous executor: deterministic with a pool that answers after so many steps, then with a real thread."""

import threading
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from tests.serve.test_executors import SOLVER, CountingPolicy, DrawingPolicy, RunningPolicy, observe
from vla_jax.serve.executors import ExecutorConfig, Overlapping
from vla_jax.serve.executors.background import Background

KEY = jax.random.key(0)


class SlowPool:
    """Computes at once, but says so only after `delays` looks (one per step), in turn."""

    def __init__(self, *delays: int):
        self._delays, self._asked = delays, 0

    def submit(self, function, *arguments):
        delay = self._delays[min(self._asked, len(self._delays) - 1)]
        self._asked += 1

        class Slow(Future):
            looks = 0

            def done(self):
                self.looks += 1
                return self.looks >= delay

        future = Slow()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how):
        self.closed = True


def drive(executor: Background, steps: int) -> np.ndarray:
    """Robots that are where the last action put them."""
    position, executed = np.zeros((2, 1)), []
    executor.reset(observe(position))
    for _ in range(steps):
        position = executor.step(observe(position))
        executed.append(position)
    return np.stack(executed, axis=1)


@pytest.mark.parametrize("kind", ["async", "rtc", "rtc_jacobian_free", "rtc_prefix"])
@pytest.mark.parametrize(("delay", "execute"), [(1, 2), (2, 2), (3, 5)])
def test_a_constant_delay_is_the_simulated_executor(kind, delay, execute):
    """Same keys, same chunks told of, same actions: what is evaluated is what runs on a robot."""
    config = ExecutorConfig(kind=kind, execute=execute, delay=delay)
    real, simulated = RunningPolicy(horizon=10), RunningPolicy(horizon=10)
    background = Background(real, config, solver=SOLVER, key=KEY, pool=SlowPool(delay))
    got = drive(background, 6 * execute)

    executor, position, pieces = Overlapping(simulated, config, solver=SOLVER, key=KEY), np.zeros((2, 1)), []
    executor.reset(observe(position))
    for _ in range(6):
        pieces.append(executor(observe(position)))
        position = pieces[-1][:, -1]
    np.testing.assert_array_equal(got, np.concatenate(pieces, axis=1))
    assert background.starved == 0 and set(background.delays) == {delay}
    assert background.switches == [s for s in executor.switches if s < 6 * execute]
    if kind != "async":
        assert real.told.pop(1) is not None  # the discarded continuation that compiles
    assert len(real.told) == len(simulated.told) == 6
    for mine, theirs in zip(real.told, simulated.told):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine.actions, theirs.actions)
            assert (mine.delay, mine.end, mine.how) == (theirs.delay, theirs.end, theirs.how)


def test_measured_delays_are_left_out_and_the_longest_is_expected():
    policy = RunningPolicy(horizon=12)
    config = ExecutorConfig(kind="rtc", execute=4, delay=0)
    executor = Background(policy, config, solver=SOLVER, key=KEY, pool=SlowPool(0, 1, 3, 2, 2))
    got = drive(executor, 20)
    # The counting policy plans the absolute index of each step: any step lost or run twice would show.
    np.testing.assert_array_equal(got[0, :, 0], np.arange(1, 21))
    assert list(executor.delays) == [1, 3, 2, 2]
    assert [told.delay for told in policy.told[2:]] == [0, 1, 3, 3]


def test_what_continues_is_compiled_before_the_episode_and_once_per_number_of_robots():
    policy = RunningPolicy(horizon=10)
    executor = Background(
        policy, ExecutorConfig(kind="rtc", execute=2), solver=SOLVER, key=KEY, pool=SlowPool(0, 1)
    )
    continued = []
    for robots in (2, 2, 1):
        before = len(policy.told)
        executor.reset(observe(np.zeros((robots, 1))))
        continued.append([told is not None for told in policy.told[before:]])
    assert continued == [[False, True], [False], [False, True]]
    assert policy.told[1].actions.shape == (2, 10, 1) and executor.starved == 0


def test_a_robot_waits_when_a_prediction_takes_longer_than_its_chunk():
    executor = Background(
        CountingPolicy(horizon=4),
        ExecutorConfig(kind="async", execute=2),
        solver=SOLVER,
        key=KEY,
        keeps=[True],
        pool=SlowPool(0, 5),
    )
    got = drive(executor, 8)
    # Asked at step 2 (where it is at 2), there at step 7: its sixth action would be next, but it has four.
    np.testing.assert_array_equal(got[0, :, 0], [1, 2, 3, 4, 4, 4, 4, 4])
    assert executor.starved == 4


def test_an_error_of_the_policy_reaches_the_robots_loop():
    class Broken(CountingPolicy):
        def act(self, observation, key, **how):
            if self.calls:
                raise FloatingPointError("not finite")
            return super().act(observation, key, **how)

    config = ExecutorConfig(kind="async", execute=1)
    executor = Background(Broken(), config, solver=SOLVER, key=KEY, pool=SlowPool(1))
    with pytest.raises(FloatingPointError, match="not finite"):
        drive(executor, 3)


def test_a_real_thread_never_stops_the_robot():
    """While a prediction is under way every step returns; the robot goes on with the old chunk, then switches."""
    gate = threading.Event()

    class Gated(CountingPolicy):
        def act(self, observation, key, **how):
            if self.calls:
                assert gate.wait(30)
            return super().act(observation, key, **how)

    with Background(
        Gated(horizon=64), ExecutorConfig(kind="async", execute=3), solver=SOLVER, key=KEY
    ) as executor:
        position, executed = np.zeros((1, 1)), []
        executor.reset(observe(position))
        for _ in range(20):  # the thread hangs, the robot moves
            position = executor.step(observe(position))
            executed.append(float(position[0, 0]))
        assert not executor.delays
        gate.set()
        executor._pending.result(timeout=30)
        position = executor.step(observe(position))
        executed.append(float(position[0, 0]))
    assert executor.delays[0] >= 17 and executor.starved == 0
    assert executed == list(range(1, len(executed) + 1))


def test_only_asynchronous_kinds_run_in_the_background():
    with pytest.raises(ValueError, match="use one of async, rtc"):
        Background(CountingPolicy(), ExecutorConfig(kind="receding"), solver=SOLVER, key=KEY)


def test_a_thread_keeps_what_it_was_asked_with():
    """The robot refills its buffers before the thread has its turn: asked at 3, the policy must not see 5."""

    class Later(SlowPool):
        """Computes the first chunk at once, everything else when it is told to."""

        waiting = None

        def submit(self, function, *arguments):
            if self._asked == 0:
                return super().submit(function, *arguments)
            self.waiting = lambda: function(*arguments)
            return Future()

    pool, buffers = Later(0), observe(np.zeros((2, 1)))
    executor = Background(
        CountingPolicy(), ExecutorConfig(kind="async", execute=1), solver=SOLVER, key=KEY, pool=pool
    )
    executor.reset(buffers)
    executor.step(buffers)
    buffers.state[:] = 3
    executor.step(buffers)
    buffers.state[:] = 5
    np.testing.assert_array_equal(pool.waiting()[:, 0], [[4], [4]])  # the policy counts on from what it sees


def test_the_returned_action_may_be_written_to():
    executor = Background(
        CountingPolicy(horizon=4), ExecutorConfig(kind="async", execute=4), solver=SOLVER, key=KEY, keeps=[True],
        pool=SlowPool(0, 99),
    )  # fmt: skip
    executor.reset(observe(np.zeros((1, 1))))
    first = [executor.step(observe(np.zeros((1, 1)))) for _ in range(4)][-1]
    first[:] = 99
    assert executor.step(observe(np.zeros((1, 1)))) == 4  # it waits with the action that was run


def test_after_actions_that_are_not_finite_the_old_chunk_goes_on():
    policy = DrawingPolicy(horizon=6, broken=1)
    config = ExecutorConfig(kind="async", execute=2)
    executor = Background(policy, config, solver=SOLVER, key=KEY, pool=SlowPool(0, 1))
    observation = observe(np.zeros((2, 1)))
    executor.reset(observation)
    chunk = executor._chunk.copy()
    got = [executor.step(observation) for _ in range(3)]  # at step 2 it asks
    with pytest.raises(FloatingPointError, match="robot 1"):
        executor.step(observation)
    got.append(executor.step(observation))  # the same period, from the old chunk; asks again
    np.testing.assert_array_equal(np.stack(got, axis=1), chunk[:, :4])
    assert np.isfinite(executor.step(observation)).all() and executor.starved == 0


def test_a_failed_reset_leaves_no_chunk_to_run():
    policy = DrawingPolicy(horizon=6, broken=1)
    executor = Background(policy, ExecutorConfig(kind="async"), solver=SOLVER, key=KEY, pool=SlowPool(0))
    observation = observe(np.zeros((1, 1)))
    executor.reset(observation)
    with pytest.raises(FloatingPointError):
        executor.reset(observation)
    with pytest.raises(ValueError, match="call reset"):
        executor.step(observation)
