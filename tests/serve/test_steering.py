"""Guidance by language and continuing a running chunk, at the level of a policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.guidance import soft_weights
from vla_jax.models.vla import VLA
from vla_jax.serve.executors import Running
from vla_jax.serve.policy import Policy
from vla_jax.types import Given

SOLVER = SolverConfig(num_steps=3)


def noise_of(robots: int) -> np.ndarray:
    """What `act` draws for each robot, by the row that it has."""
    keys = [jax.random.fold_in(jax.random.split(KEY)[1], row) for row in range(robots)]
    return np.stack([jax.random.normal(key, (8, 3)) for key in keys])


KEY = jax.random.key(3)
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def make(kind="flow", **objective) -> Policy:
    cfg = toy.config(kind, **objective)
    return Policy(config=cfg, bundle=toy.bundle(), params=toy.random_params(cfg), step=0, batch_size=4)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make(prompt_dropout=0.1, rtc_prefix=4)


@pytest.fixture(scope="module")
def observation():
    return toy.observe(3)


def silenced(observation):
    return dataclasses.replace(observation, instruction=("",) * len(observation.instruction))


@pytest.fixture(scope="module")
def swept(policy, observation):
    """Chunks for every weight, and how many programs that compiled."""
    before = len(policy.runner.compiler.shapes)
    chunks = {w: policy.act(observation, KEY, solver=SOLVER, guidance=w) for w in WEIGHTS}
    return chunks, policy.runner.compiler.shapes[before:]


def test_sweeping_the_weight_compiles_once(swept):
    """One program of two prompts for all weights but 0 and 1, which are the plain one's: a single evaluation."""
    chunks, compiled = swept
    assert sorted(shape.guided for shape in compiled) == [False, True]
    assert all(np.abs(chunks[w] - chunks[1.0]).max() > 1e-4 for w in WEIGHTS if w != 1)


def test_weight_one_is_the_plain_policy_bit_for_bit(policy, observation, swept):
    np.testing.assert_array_equal(swept[0][1.0], policy.act(observation, KEY, solver=SOLVER))


def test_weight_zero_is_the_null_prompt(policy, observation, swept):
    """The masked prompt is the empty one: the same to rounding as asking for nothing."""
    null = policy.act(silenced(observation), KEY, solver=SOLVER)
    np.testing.assert_allclose(swept[0][0.0], null, rtol=1e-5, atol=1e-6)
    assert np.abs(null - policy.act(observation, KEY, solver=SOLVER)).max() > 1e-3


def test_other_weights_follow_the_formula_step_by_step(policy, observation, swept):
    model, variables = VLA(policy.config.model), {"params": policy.params}
    batches = [policy._piece(o, range(3), 4, None) for o in (observation, silenced(observation))]

    @jax.jit
    def loop(x, batches):
        caches = [model.apply(variables, batch, None, method="prefill")[0] for batch in batches]
        for i in range(3):
            f_c, f_u = (
                model.apply(
                    variables, cache, Given(state=batches[0].state), x, jnp.full(4, i / 3), method="denoise"
                )
                for cache in caches
            )
            x = x + (f_u + 5 * (f_c - f_u)) / 3
        return x

    x = loop(noise_of(4), batches)
    want = policy.bundle.robot_actions(np.asarray(x[:3]), observation)
    np.testing.assert_allclose(swept[0][5.0], want, rtol=1e-3, atol=1e-4)


def test_guidance_goes_together_with_samples_and_plans(policy, observation):
    plan = ["pass left of the obstacle, then grasp the red cup"] * 3
    how = {"solver": SOLVER, "samples": 2, "plan": plan, "plan_visible": True}
    guided, plain = (policy.act(observation, KEY, guidance=w, **how) for w in (3.0, None))
    assert guided.shape == plain.shape == (3, 2, 8, 3)
    assert np.abs(guided - plain).max() > 1e-3
    # The null prompt has no plan: another plan changes nothing at w = 0.
    other = how | {"plan": ["pass right of the obstacle, then grasp the blue ball"] * 3}
    first, second = (policy.act(observation, KEY, guidance=0.0, **h) for h in (how, other))
    np.testing.assert_array_equal(first, second)


def test_guidance_is_refused_where_it_was_not_trained(observation):
    with pytest.raises(ValueError, match="prompt_dropout=0"):
        make().act(observation, KEY, solver=SOLVER, guidance=2.0)
    with pytest.raises(ValueError, match="finite"):
        make(prompt_dropout=0.1).act(observation, KEY, solver=SOLVER, guidance=float("nan"))
    np.testing.assert_array_equal(
        make().act(observation, KEY, solver=SOLVER, guidance=1.0), make().act(observation, KEY, solver=SOLVER)
    )


@pytest.fixture(scope="module")
def chunk(policy, observation):
    return policy.act(observation, jax.random.key(8), solver=SOLVER)


def running(chunk, how, delay=3, end=6, bound=5.0) -> Running:
    return Running(actions=chunk, delay=delay, end=end, how=how, bound=bound)


@pytest.mark.parametrize("how", ["vjp", "jacobian_free"])
def test_without_weight_nothing_is_continued(policy, observation, chunk, how):
    plain = policy.act(observation, KEY, solver=SOLVER)
    free = policy.act(observation, KEY, solver=SOLVER, running=running(chunk, how, delay=0, end=0))
    np.testing.assert_allclose(free, plain, rtol=1e-6, atol=1e-6)


def test_a_continued_chunk_is_nearer_to_the_running_one_where_it_is_held(policy, observation, chunk):
    solver = SolverConfig(num_steps=10)

    def apart(how):
        told = {} if how is None else {"running": running(chunk, how)}
        made = policy.act(observation, KEY, solver=solver, **told)
        return np.abs(made - chunk).mean(axis=(0, 2))

    free, vjp, jacobian_free, prefix = map(apart, (None, "vjp", "jacobian_free", "prefix"))
    assert (jacobian_free[:3] < 0.2 * free[:3]).all()
    assert vjp[:3].mean() < 0.6 * free[:3].mean()
    np.testing.assert_allclose(prefix[:3], 0, atol=1e-5)
    assert (prefix[3:] > 1e-2).all()  # the rest is its own


def test_true_and_jacobian_free_forms_equal_the_written_out_loop(policy, observation, chunk):
    """x += (v + g J^T W (Y - x1)) / N with the policy's own network, in its own units."""
    model, variables = VLA(policy.config.model), {"params": policy.params}
    batch = policy._piece(observation, range(3), 4, None)
    known = jnp.asarray(policy._piece(observation, range(3), 4, None, chunk).actions)
    weight = soft_weights(8, 3, 6)[None, :, None]

    @functools.partial(jax.jit, static_argnums=2)
    def loop(x, batch, jacobian):
        cache, _ = model.apply(variables, batch, jnp.zeros(4, bool), method="prefill")
        for i in range(3):
            t = i / 3

            def data(x, t=t):
                v = model.apply(
                    variables, cache, Given(state=batch.state), x, jnp.full(4, t), method="denoise"
                )
                return x + (1 - t) * v, v

            x1, pull, v = jax.vjp(data, x, has_aux=True)
            error = weight * (known - x1)
            strength = 5.0 if i == 0 else min(5.0, (t**2 + (1 - t) ** 2) / (t * (1 - t)))
            x = x + (v + strength * (pull(error)[0] if jacobian else error)) / 3
        return x

    for how in ("vjp", "jacobian_free"):
        noise = noise_of(4)
        x = loop(noise, batch, how == "vjp")
        got = policy.act(observation, KEY, solver=SOLVER, running=running(chunk, how))
        want = policy.bundle.robot_actions(np.asarray(x[:3]), observation)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_delays_and_horizons_compile_once(policy, observation, chunk):
    before = len(policy.runner.compiler.shapes)
    for delay, end, bound in ((0, 4, 5.0), (2, 6, 5.0), (3, 3, 10.0)):
        policy.act(
            observation,
            KEY,
            solver=SolverConfig(num_steps=2),
            running=running(chunk, "vjp", delay, end, bound),
        )
    assert len(policy.runner.compiler.shapes) == before + 1


def test_continuing_is_refused_where_it_cannot_be(observation, chunk, policy):
    with pytest.raises(ValueError, match=r"process\.kind=flow"):
        make("regression").act(observation, KEY, solver=SOLVER, running=running(chunk, "vjp"))
    with pytest.raises(ValueError, match=r"objective\.rtc_prefix=4; use rtc"):
        policy.act(observation, KEY, solver=SOLVER, running=running(chunk, "prefix", delay=5))
