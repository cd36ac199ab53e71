"""The compiled policy against the plain one where shapes, solvers and processes differ, and what it remembers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.cli.random_policy import random_params
from vla_jax.data.observations import take
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.layers.int8 import dequantize, quantize
from vla_jax.layers.linear import Matrix, multiply
from vla_jax.serve.compiled.config import CompileConfig, Rewrites, batch_bucket
from vla_jax.serve.compiled.parameters import size_bytes
from vla_jax.serve.compiled.runner import keys_of
from vla_jax.serve.executors.base import Running
from vla_jax.serve.policy import Policy

KEY = jax.random.key(3)
SOLVER = SolverConfig(num_steps=3)
ROOT = Path(__file__).parents[3]


def make(batch_size=2, **process) -> Policy:
    cfg = dataclasses.replace(toy.config(), process=ProcessConfig(**process))
    params = random_params(cfg.model, toy.bundle(), seed=0)
    return Policy(config=cfg, bundle=toy.bundle(), params=params, step=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make()


@pytest.fixture(scope="module")
def compiled(policy) -> Policy:
    return policy.compiled()


def same(policy, compiled, observation, atol=1e-5, **how):
    how = {"solver": SOLVER} | how
    expected = policy.act(observation, KEY, **how)
    found = compiled.act(observation, KEY, **how)
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=atol)
    return found


@pytest.mark.parametrize(
    "solver",
    [
        SolverConfig(method="rk4", num_steps=3, unroll=2),
        SolverConfig(method="heun", num_steps=2),
        SolverConfig(method="midpoint", num_steps=2),
        SolverConfig(method="midpoint", num_steps=3, grid="edm"),
    ],
    ids=lambda solver: f"{solver.method}-{solver.grid}",
)
def test_solvers(policy, compiled, solver):
    same(policy, compiled, toy.observe(2), solver=solver, atol=2e-5)


@pytest.mark.parametrize(
    ("process", "solver"),
    [
        ({"kind": "regression"}, SOLVER),
        ({"kind": "ddpm", "path": "ddpm_cosine", "clip": 1.0}, SolverConfig(method="ancestral", num_steps=3)),
    ],
    ids=["regression", "ancestral"],
)
def test_processes_and_rows_of_their_own(process, solver):
    """One key for all rows gives the plain policy's chunks; a key per row those of each robot alone."""
    policy = make(batch_size=2, **process)
    compiled = policy.compiled()
    observation = toy.observe(2)
    same(policy, compiled, observation, solver=solver)
    rows = compiled.runner.run(compiled.runner.encode(observation), keys_of([5, 6]), solver=solver)[:, 0]
    for row, seed in enumerate((5, 6)):
        alone = policy.act(take(observation, [row]), jax.random.key(seed), solver=solver)
        np.testing.assert_allclose(rows[row], alone[0], atol=1e-5)


def test_samples_plans_and_more_robots_than_a_bucket(policy, compiled):
    chunks = same(policy, compiled, toy.observe(2), samples=3)
    assert np.ptp(chunks, axis=1).max() > 1e-3
    same(policy, compiled, toy.observe(3))
    plans = ["pass left of the obstacle, then grasp the red cup", "pass right of the obstacle, then go"]
    seen = same(policy, compiled, toy.observe(2), plan=plans, plan_visible=True)
    assert np.abs(seen - compiled.act(toy.observe(2), KEY, solver=SOLVER)).max() > 1e-3
    same(policy, compiled, toy.observe(1), plan_visible=True)
    with pytest.raises(ValueError, match="samples=0"):
        compiled.act(toy.observe(1), KEY, solver=SOLVER, samples=0)
    with pytest.raises(ValueError, match="token"):
        compiled.act(toy.observe(1), KEY, solver=SOLVER, plan=["left " * 60], plan_visible=True)


def test_guidance_of_all_rows_and_of_each():
    """The weight is an input of one program; 1 is the unguided one to the bit, 0 that of the null prompt."""
    policy = make()
    objective = dataclasses.replace(policy.config.objective, prompt_dropout=0.1)
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, objective=objective))
    compiled = policy.compiled()
    observation = toy.observe(2)
    plain = same(policy, compiled, observation)
    one = compiled.act(observation, KEY, solver=SOLVER, guidance=1.0)
    np.testing.assert_array_equal(one, plain)
    before = len(compiled.runner.compiler.shapes)
    swept = [same(policy, compiled, observation, guidance=w, samples=2, atol=5e-5) for w in (1.5, 2.0, 4.0)]
    assert len(compiled.runner.compiler.shapes) == before + 1 and np.abs(swept[0] - swept[2]).max() > 1e-3
    nothing = same(policy, compiled, observation, guidance=0)
    assert np.abs(nothing - plain).max() > 1e-3
    rows = compiled.runner.encode(observation)
    each = compiled.runner.run(rows, keys_of([1, 2]), solver=SOLVER, guidance=[1.5, 4.0])
    for row, weight in enumerate((1.5, 4.0)):
        alone = compiled.runner.run(
            [rows[row]] * 2, keys_of([row + 1] * 2), solver=SOLVER, guidance=[weight] * 2
        )
        np.testing.assert_array_equal(each[row], alone[row])


@pytest.mark.parametrize("how", ["vjp", "jacobian_free", "prefix"])
def test_chunks_continue_the_running_ones(how):
    """As the plain policy's do, in one program whose delay is an input."""
    policy, cheap = make(), how == "jacobian_free"
    objective = dataclasses.replace(policy.config.objective, rtc_prefix=4, prompt_dropout=0.1)
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, objective=objective))
    robots = 3 if cheap else 2  # more than a bucket, the rest padded
    compiled, observation = policy.compiled(CompileConfig(buckets=(2,))), toy.observe(robots)
    chunk = policy.action_scale * np.random.default_rng(1).normal(size=(robots, 8, 3))

    def found(delay, **options):
        running = Running(actions=chunk.astype(np.float32), delay=delay, end=6, how=how)
        return same(policy, compiled, observation, running=running, atol=1e-4, **options)

    two, three = found(2), found(3)
    assert np.abs(two - three).max() > 1e-2
    assert [shape.continues for shape in compiled.runner.compiler.shapes] == [how]
    if how == "prefix":
        np.testing.assert_allclose(three[:, :3], chunk[:, :3], atol=1e-6)
    if cheap:
        assert found(2, guidance=2.0, samples=2).shape == (3, 2, 8, 3)


def test_images_of_another_size_and_absent_cameras(policy, compiled):
    observation = toy.observe(1)
    rng = np.random.default_rng(0)
    larger = {"top": rng.integers(0, 256, (1, 30, 40, 3), dtype=np.uint8), "wrist": None}
    found = same(policy, compiled, dataclasses.replace(observation, images=larger))
    assert np.abs(found - compiled.act(observation, KEY, solver=SOLVER)).max() > 1e-3
    # the same through the program of all cameras, as a server does that must not compile
    rows = compiled.runner.encode(
        dataclasses.replace(observation, images=observation.images | {"wrist": None})
    )
    masked = compiled.runner.run(rows, keys_of([3]), solver=SOLVER, cameras=("top", "wrist"))
    dropped = compiled.runner.run(rows, keys_of([3]), solver=SOLVER)
    np.testing.assert_allclose(masked, dropped, atol=1e-5)
    with pytest.raises(ValueError, match=r"images\['top'\] is missing"):
        compiled.act(dataclasses.replace(observation, images={}), KEY, solver=SOLVER)


def test_an_unchanged_prefix_is_used_again_and_a_changed_one_never(policy, compiled, monkeypatch):
    asked, run = [], type(compiled.runner.compiler).__call__

    def spy(compiler, shape, inputs, context=None):
        asked.append((shape.again, len(inputs.images)))
        return run(compiler, shape, inputs, context)

    monkeypatch.setattr(type(compiled.runner.compiler), "__call__", spy)
    first = toy.observe(1, seed=5)
    moved = dataclasses.replace(first, state=first.state + 0.1)
    image = first.images["wrist"].copy()
    image[0, 3, 4, 1] ^= 1
    one_pixel = dataclasses.replace(first, images=first.images | {"wrist": image})
    told = dataclasses.replace(first, instruction=("grab the red cup",))
    for observation, again in (
        (first, False), (first, True), (moved, True), (one_pixel, False), (first, False), (told, False), (told, True),
    ):  # fmt: skip
        same(policy, compiled, observation)
        assert asked[-1] == (again, 0 if again else 2)
    first.images["top"][:] = 0  # a camera driver that writes into the same memory
    same(policy, compiled, first)
    assert asked[-1] == (False, 2)


def test_warm_up_compiles_all_that_act_asks_for(policy):
    compiled = policy.compiled(CompileConfig(buckets=(1, 2), prompts=(32,)))
    assert compiled.runner.lengths == (32, 48)
    assert compiled.runner.warm_up(SOLVER) == 2 * (2 + 1)
    known = set(compiled.runner.compiler.shapes)
    for robots in (1, 2, 5, 1):
        compiled.act(toy.observe(robots), KEY, solver=SOLVER)
    assert set(compiled.runner.compiler.shapes) == known


def test_keys_and_buckets():
    for seed in (0, 7, 2**31 - 1):
        np.testing.assert_array_equal(keys_of([seed])[0], jax.random.key_data(jax.random.key(seed)))
    assert [batch_bucket((1, 8, 32), rows) for rows in (1, 2, 8, 9)] == [1, 8, 8, 32]
    with pytest.raises(ValueError, match="33 rows"):
        batch_bucket((1, 8, 32), 33)
    with pytest.raises(ValueError, match="buckets"):
        CompileConfig(buckets=(0,))
    assert CompileConfig(prompts=(32, 48)).prompt_lengths(48) == (32, 48)
    with pytest.raises(ValueError, match="no text of this policy has more than 48 tokens"):
        CompileConfig(prompts=(16, 64)).prompt_lengths(48)


def test_configurations_survive_json():
    config = CompileConfig(rewrites=Rewrites(state=False), dtype="bfloat16", buckets=(2, 4), prompts=(32,))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert CompileConfig.from_dict(values) == config
    values["rewrites"]["fuse"] = True  # there was such a rewrite once: recordings name it
    assert CompileConfig.from_dict(values) == config


def test_int8_is_the_nearest_grid_and_bfloat16_and_int8_stay_close(policy):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(20, 3, 5)) * 10.0 ** rng.integers(-3, 3, (1, 3, 5)), jnp.float32)
    w = w.at[:, 0, 0].set(0)
    q = quantize(w, (0,))
    assert q.values.dtype == jnp.int8 and q.scale.shape == (3, 5)
    assert (jnp.abs(dequantize(q, (0,)) - w) <= 0.5001 * q.scale).all()
    assert (jnp.abs(q.values).max(0) == 127).sum() == 14  # every channel uses its whole range
    x = jnp.asarray(rng.normal(size=(4, 20)), jnp.float32)
    matrix = Matrix(q.values, scale=q.scale)
    np.testing.assert_allclose(
        multiply("bd,dne->bne", x, matrix), jnp.tensordot(x, dequantize(q, (0,)), 1), rtol=1e-5, atol=1e-4
    )

    expected = policy.act(toy.observe(2), KEY, solver=SOLVER)
    scale = np.sqrt(np.mean((expected / policy.action_scale) ** 2))
    for config, low, high in (
        (CompileConfig(weights="int8"), 1e-4, 0.1),
        (CompileConfig(dtype="bfloat16"), 1e-4, 0.1),
    ):
        found = policy.compiled(dataclasses.replace(config, buckets=(2,))).act(
            toy.observe(2), KEY, solver=SOLVER
        )
        error = np.sqrt(np.mean(((found - expected) / policy.action_scale) ** 2)) / scale
        assert low < error < high


def test_of_parameters_on_the_host_the_device_holds_the_rewritten_ones_alone(policy):
    config = CompileConfig(dtype="bfloat16", buckets=(2,))
    on_host = dataclasses.replace(policy, params=jax.tree.map(np.asarray, policy.params))
    before = {id(array) for array in jax.live_arrays()}
    compiled = on_host.compiled(config)
    made = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    parameters = size_bytes(compiled.params)
    assert parameters <= made < 1.1 * parameters < 0.9 * size_bytes(policy.params)
    expected = policy.compiled(config).act(toy.observe(2), KEY, solver=SOLVER)
    np.testing.assert_array_equal(compiled.act(toy.observe(2), KEY, solver=SOLVER), expected)


def test_a_second_process_reads_programs_in_place_of_compiling_them(tmp_path):
    """Even small ones, which JAX by itself would not keep."""
    code = """
import sys, jax
from vla_jax.serve.compiled.cache import keep_programs
counts = {"hits": 0, "misses": 0}
def count(event, **how):
    if event.startswith("/jax/compilation_cache/cache_"):
        counts[event.rpartition("_")[2]] += 1
jax.monitoring.register_event_listener(count)
keep_programs(sys.argv[1])
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.full((3, 3), 2.0))), counts["hits"], counts["misses"])
"""
    folder, printed = tmp_path / "programs", []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append((*done.stdout.split(), sum(path.name.endswith("-cache") for path in folder.iterdir())))
    (value, hits, misses, files), again = printed
    assert (value, hits, int(misses)) == ("108.0", "0", files) and files > 0
    assert again == ("108.0", misses, "0", files)


def test_on_a_mesh_the_actions_are_the_same():
    """Data 2 × tensor 2 of simulated devices, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.compiled.four"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gap"] < 1e-5 and found["int8_gap"] < 1e-5
    assert found["all_reduces"] > 0
    assert found["share"] < 0.75 and "not divisible" not in done.stderr
    assert "is not divisible by mesh.tensor=4" in found["refused"]


def test_rewrites_by_name():
    assert set(Rewrites.names()) == {"time", "state", "unstack", "cameras", "prompt", "reuse"}
    assert Rewrites.none(time=True).time and not any(dataclasses.asdict(Rewrites.none()).values())
