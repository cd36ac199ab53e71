"""MetaWorld: the protocol, seeding, freezing and experts, against metaworld and mujoco used directly."""

import os
import subprocess
import sys

import numpy as np
import pytest

from vla_jax.sim.metaworld import GROUPS, TASKS, MetaWorldEnv, demonstrate, find_task, headless, render
from vla_jax.sim.metaworld.demos import EXTRA_FRAMES, Disturbance
from vla_jax.sim.metaworld.simulator import MAX_STEPS, Simulator

pytest.importorskip("metaworld", reason="the extra `sim` is not installed")
try:
    headless.prepare()
except OSError as _error:
    pytest.skip(f"no headless OpenGL here: {_error}", allow_module_level=True)

MT3 = ("reach-v3", "button-press-v3", "drawer-open-v3")


@pytest.fixture(scope="module")
def env():
    """One environment for all tests: each starts with a reset, which must forget the episode before."""
    env = MetaWorldEnv(MT3)
    yield env
    env.close()


@pytest.fixture(scope="module")
def simulators():
    return {name: Simulator(name) for name in MT3}


def some_actions(k, seed=0, b=3):
    return np.random.default_rng(seed).uniform(-1, 1, (b, k, 4))


def bare_env(task, seed):
    """metaworld without our wrapper, seeded as its source code says."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task]()
    env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
    env.seed(seed)
    return env


def test_task_table_is_metaworlds():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS)
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in GROUPS] == [28, 11, 6, 5]
    instructions = {task.instruction for task in TASKS.values()}
    assert len(instructions) == 50  # or two tasks could not be told apart
    assert all(2 <= len(text.split()) <= 12 for text in instructions)
    with pytest.raises(ValueError, match="did you mean 'reach-v3'"):
        find_task("reach-v2")


def test_same_seed_same_episode_other_seed_another(env):
    first = env.reset([5, 5, 5])
    later = env.advance(some_actions(20))
    other = env.reset([6, 6, 6])
    again = env.reset([5, 5, 5])
    later_again = env.advance(some_actions(20))
    for one, two in ((first, again), (later, later_again)):
        np.testing.assert_array_equal(one.state, two.state)
        np.testing.assert_array_equal(one.images["corner2"], two.images["corner2"])
    for i in range(3):
        assert (first.images["corner2"][i] != other.images["corner2"][i]).any()


def test_state_is_the_first_four_observations(env):
    seeds = (11, 12, 13)
    observation = env.reset(seeds)
    actions = some_actions(30, seed=1)
    after = env.advance(actions)
    for i, (task, seed) in enumerate(zip(MT3, seeds)):
        bare = bare_env(task, seed)
        first, _ = bare.reset()
        np.testing.assert_allclose(observation.state[i], first[:4], atol=1e-7)
        for action in actions[i]:
            last, *_ = bare.step(action)
        np.testing.assert_allclose(after.state[i], last[:4], atol=1e-7)
    assert observation.state.dtype == np.float32


REFERENCE = """
import sys, numpy as np, mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
env = ALL_V3_ENVIRONMENTS[sys.argv[1]]()
env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
env.seed(int(sys.argv[2]))
index = [env.model.cam(i).name for i in range(env.model.ncam)].index("corner2")
env.model.cam_pos[index] = [0.75, 0.075, 0.7]
env.reset()
mujoco.mj_forward(env.model, env.data)
env.model.vis.quality.offsamples = 0
renderer = mujoco.Renderer(env.model, 192, 192)
renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
renderer.update_scene(env.data, camera="corner2")
image = np.flip(renderer.render(), (0, 1)).astype(float)
np.save(sys.argv[3], image.reshape(64, 3, 64, 3, 3).mean((1, 3)))
"""


@pytest.mark.parametrize("i", [0, 1])
def test_picture_is_the_flipped_one_of_the_moved_camera(env, tmp_path, i):
    """In a process of its own, so that the reference has an OpenGL context to itself."""
    file = tmp_path / "reference.npy"
    subprocess.run(
        [sys.executable, "-c", REFERENCE, MT3[i], "21", str(file)], check=True, capture_output=True
    )
    expected = np.load(file)
    picture = env.reset([21, 21, 21]).images["corner2"][i].astype(float)
    assert np.abs(picture - expected).max() <= 1
    assert np.abs(picture[:, ::-1] - expected).mean() > 5  # the comparison would notice a missing flip
    assert np.abs(picture[::-1] - expected).mean() > 5


def test_tasks_do_not_disturb_each_others_pictures(env):
    together = env.reset([3, 3, 3]).images["corner2"]
    for i, task in enumerate(MT3):
        alone = MetaWorldEnv([task])
        np.testing.assert_array_equal(alone.reset([3]).images["corner2"][0], together[i])
        alone.close()


def test_shared_renderer_shows_each_simulation():
    """Two episodes of one task share textures, but each picture is of its own simulation."""
    both = MetaWorldEnv(["button-press-v3", "button-press-v3"])
    a = both.reset([1, 2]).images["corner2"]
    b = both.reset([2, 1]).images["corner2"]
    both.close()
    np.testing.assert_array_equal(a, b[::-1])
    assert (a[0] != a[1]).any()


def test_done_episodes_are_frozen(env, simulators):
    demos = [demonstrate(simulators[task], None, 7, noisy=False) for task in MT3]
    ends = [demo.success_step for demo in demos]
    actions = np.zeros((3, max(ends) + 40, 4))
    for i, demo in enumerate(demos):
        actions[i, : ends[i]] = demo.actions[: ends[i]]
        actions[i, ends[i] :] = 1.0  # would move the hand far away
    env.reset([7, 7, 7])
    before = None
    for k in range(0, actions.shape[1], 10):
        observation = env.advance(actions[:, k : k + 10])
        if before is not None:
            for i in np.flatnonzero(done):
                np.testing.assert_array_equal(observation.state[i], before.state[i])
                np.testing.assert_array_equal(observation.images["corner2"][i], before.images["corner2"][i])
        before, done = observation, env.done
    assert done.all()
    for i, result in enumerate(env.results()):
        assert result == {
            "task": MT3[i],
            "group": "easy",
            "seed": 7,
            "success": True,
            "steps": ends[i],
            "time_s": ends[i] / 80,
        }


def test_time_runs_out_after_500_steps(env, monkeypatch):
    env.reset([1, 2, 3])
    pictures = []
    picture = render.Renderer.picture
    monkeypatch.setattr(render.Renderer, "picture", lambda *args: pictures.append(args[1]) or picture(*args))
    env.advance(np.zeros((3, MAX_STEPS - 1, 4)))
    assert not env.done.any()
    env.advance(np.zeros((3, 50, 4)))
    assert env.done.all()
    assert [(r["steps"], r["success"]) for r in env.results()] == [(MAX_STEPS, False)] * 3
    assert len(pictures) == 6  # one per episode and chunk, however long the chunk


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("task", MT3)
def test_experts_succeed(simulators, task, noisy):
    for seed in range(4):
        demo = demonstrate(simulators[task], None, seed, noisy)
        assert demo is not None
        assert len(demo.actions) == len(demo.state) == demo.success_step + EXTRA_FRAMES
        assert np.abs(demo.actions).max() <= 1


def test_replayed_demonstration_is_the_demonstration(env, simulators):
    renderer = render.Renderer(64)
    simulator = simulators["drawer-open-v3"]
    renderer.add_model("drawer-open-v3", simulator.model)
    demo = demonstrate(simulator, renderer, 4, noisy=False)
    renderer.close()
    observation = env.reset([0, 0, 4])
    for t, action in enumerate(demo.actions[: demo.success_step]):
        np.testing.assert_allclose(observation.state[2], demo.state[t], atol=1e-6)
        np.testing.assert_array_equal(observation.images["corner2"][2], demo.images[t])
        assert not env.results()[2]["success"]
        observation = env.advance(np.tile(action, (3, 1, 1)))
    assert env.results()[2]["success"]


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_noise_disturbs_what_is_executed_and_not_the_label(simulators):
    """The label is the expert's answer to the recorded state, which the noise has led astray."""
    simulator = simulators["reach-v3"]
    clean, noisy = (demonstrate(simulator, None, 2, noisy) for noisy in (False, True))
    np.testing.assert_array_equal(clean.actions[0], noisy.actions[0])
    assert np.abs(clean.state[5] - noisy.state[5]).max() > 1e-3
    disturb = Disturbance(2)
    simulator.reset(2)
    expert = simulator.expert()
    for t in range(len(noisy.actions)):
        wanted = np.clip(expert.get_action(simulator.observation), -1, 1)
        np.testing.assert_allclose(noisy.actions[t], wanted, atol=1e-6)
        simulator.step(disturb(wanted))


def test_disturbance_statistics():
    disturb = Disturbance(0)
    executed = np.stack([disturb(np.zeros(4)) for _ in range(20_000)])
    assert np.abs(executed).max() <= 1
    assert (executed[:, 3] == 0).all()
    steady = (np.diff(executed[:, :3], axis=0) == 0).all(axis=1)  # within a burst the push is held
    # Of 1/.015 free steps and a burst of 6 on average, 5 repeat the step before: 7 %.
    assert 0.055 < steady.mean() < 0.085
    free = executed[1:][~steady][:, :3]
    assert abs(free.mean()) < 0.01
    assert 0.29 < free.std() < 0.34


def test_instruction_of_another_task():
    env = MetaWorldEnv(MT3[:2], image_size=32, instruction="drawer-open-v3")
    assert env.reset([0, 0]).instruction == (TASKS["drawer-open-v3"].instruction,) * 2
    assert env.spec.cameras == {"corner2": (32, 32)}
    env.close()


def test_errors_in_one_line(env):
    with pytest.raises(ValueError, match="one seed per task"):
        env.reset([1, 2])
    env.reset([1, 2, 3])
    with pytest.raises(ValueError, match=r"expected \(3, k, 4\)"):
        env.advance(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        env.advance(np.full((3, 1, 4), np.nan))
    with pytest.raises(ValueError, match="did you mean"):
        MetaWorldEnv(["reach"])
    with pytest.raises(ValueError, match="image_size"):
        MetaWorldEnv(MT3, image_size=1000)


def test_import_is_lazy_and_a_missing_extra_is_named(monkeypatch):
    code = (
        "import sys, vla_jax.sim.metaworld; "
        "assert not {'mujoco', 'metaworld', 'gymnasium', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(headless.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="MetaWorld is not installed: pip install"):
        Simulator("reach-v3")


def test_backend_is_chosen_by_what_works(monkeypatch):
    tried = []

    def fake_run(command, env, **_):
        tried.append(env["MUJOCO_GL"])
        return subprocess.CompletedProcess(command, 0 if env["MUJOCO_GL"] == works else 1)

    monkeypatch.setattr(headless.subprocess, "run", fake_run)
    works = "osmesa"
    assert headless.choose_backend() == "osmesa"
    assert tried == ["egl", "osmesa"]
    works = None
    with pytest.raises(OSError, match="no headless OpenGL"):
        headless.choose_backend()
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa")


def test_broken_backend_is_named():
    """In a process of its own: a back end that fails to load leaves its traces."""
    code = (
        "import sys; sys.modules['OpenGL'] = None\n"  # makes the import of either back end fail
        "from vla_jax.sim.metaworld.simulator import Simulator\n"
        "try: Simulator('reach-v3')\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": "osmesa"}, capture_output=True, text=True
    )
    assert "mujoco cannot be imported with MUJOCO_GL=osmesa" in run.stdout, run.stderr
    assert run.stdout.count("\n") == 1


def test_area_average_is_the_rounded_mean():
    image = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    small = render.area_average(image, 3)
    for i in range(4):
        for j in range(3):
            mean = image[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].astype(float).mean((0, 1))
            assert np.abs(small[i, j] - mean).max() <= 0.5
    assert [render.render_scale(size) for size in (64, 96, 128, 224, 480)] == [3, 2, 2, 1, 1]
