import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.checkpoint import Checkpoints
from vla_jax.data.observations import take
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.models.vla import VLA
from vla_jax.serve.policy import Policy
from vla_jax.types import Given

SOLVER = SolverConfig(num_steps=3)
KEY = jax.random.key(3)


def make(kind="flow", batch_size=8, **objective) -> Policy:
    cfg = toy.config(kind, **objective)
    return Policy(
        config=cfg, bundle=toy.bundle(), params=toy.random_params(cfg), step=0, batch_size=batch_size
    )


def uncached(policy: Policy, batch, x, t, visible: bool):
    """The prediction by a fresh pass through backbone and expert."""
    model, variables = VLA(policy.config.model), {"params": policy.params}
    cache, _ = model.apply(variables, batch, jnp.full(len(t), visible), method="prefill")
    return model.apply(variables, cache, Given(state=batch.state), x, t, method="denoise")


@pytest.mark.parametrize("plan_visible", [False, True])
def test_act_is_an_euler_loop_over_full_passes(plan_visible):
    policy, observation = make(), toy.observe(8)
    texts = ["pass left of the obstacle, then grasp the red cup"] * 8 if plan_visible else None
    got = policy.act(observation, KEY, solver=SOLVER, plan=texts, plan_visible=plan_visible)

    batch = jax.tree.map(jnp.asarray, policy.bundle.observation_batch(observation, texts))
    x = np.stack(
        [jax.random.normal(jax.random.fold_in(jax.random.split(KEY)[1], r), (8, 3)) for r in range(8)]
    )
    predict = jax.jit(lambda x, t: uncached(policy, batch, x, t, plan_visible))
    for i in range(SOLVER.num_steps):
        x = x + predict(x, jnp.full(8, i / SOLVER.num_steps)) / SOLVER.num_steps
    statistics = policy.bundle.normalize.statistics[""].action
    want = np.asarray(x) * np.asarray(statistics.std) + np.asarray(statistics.mean)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_plan_changes_the_actions_and_the_decoded_one_is_the_default():
    policy, observation = make(), toy.observe(3)

    def act(**how):
        return policy.act(observation, KEY, solver=SOLVER, **how)

    left = act(plan=["pass left of the obstacle, then grasp the red cup"] * 3, plan_visible=True)
    right = act(plan=["pass right of the obstacle, then grasp the red cup"] * 3, plan_visible=True)
    assert np.abs(left - right).max() > 1e-3
    texts = policy.plan(observation, KEY)  # random ones, which are much longer when they are read
    np.testing.assert_array_equal(act(plan=texts, plan_visible=True), act(plan_visible=True))


@pytest.mark.parametrize(
    ("process", "solver"),
    [
        (ProcessConfig(), SOLVER),
        (
            ProcessConfig(kind="ddpm", path="ddpm_cosine", clip=1.0),
            SolverConfig(method="ancestral", num_steps=2),
        ),
        (ProcessConfig(kind="regression"), SOLVER),
    ],
    ids=["flow", "ddpm", "regression"],
)
def test_robots_do_not_see_one_another_whatever_the_slices(process, solver):
    """Nor one another's noise: a robot's actions are those of its own key, alone, in any batch and any order."""
    observation, keys = toy.observe(5), jax.random.split(KEY, 5)
    how = {"solver": solver, "samples": 2}
    config = dataclasses.replace(toy.config(), process=process)
    policy, sliced = (dataclasses.replace(make(batch_size=size), config=config) for size in (8, 2))
    whole = policy.act(observation, keys, **how)
    np.testing.assert_allclose(sliced.act(observation, keys, **how), whole, atol=1e-5)
    shared = policy.act(observation, KEY, **how)
    np.testing.assert_allclose(sliced.act(observation, KEY, **how), shared, atol=1e-5)
    order = np.array([4, 0])
    np.testing.assert_allclose(
        sliced.act(take(observation, order), keys[order], **how), whole[order], atol=1e-5
    )
    one = sliced.act(take(observation, [4]), keys[4], **how)
    np.testing.assert_allclose(one, whole[4:], atol=1e-5)
    assert (np.abs(whole - shared).max() > 1e-3) == (process.kind != "regression")
    with pytest.raises(
        ValueError, match=r"key has shape \[5\]: give one key, or one for each of the 2 robots"
    ):
        policy.act(take(observation, order), keys, **how)


def test_slices_cover_every_robot_once_and_come_in_few_sizes():
    policy = make(batch_size=32)
    for robots in range(1, 100):
        slices = list(policy._slices(robots))
        assert [row for rows, _ in slices for row in rows] == list(range(robots))
        assert all(len(rows) <= size and size in (1, 8, 32) for rows, size in slices)


def test_samples_differ_for_flow_and_not_for_regression():
    for kind, different in (("flow", True), ("regression", False)):
        chunks = make(kind).act(toy.observe(2), KEY, solver=SOLVER, samples=4)
        assert chunks.shape == (2, 4, 8, 3)
        assert (np.ptp(chunks, axis=1).max() > 1e-3) == different


def test_noise_is_a_function_of_the_key():
    policy, observation = make(), toy.observe(2)
    first, second = (policy.act(observation, KEY, solver=SOLVER) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = policy.act(observation, jax.random.key(4), solver=SOLVER)
    assert np.abs(first - other).max() > 1e-3


def test_greedy_plan_equals_decoding_without_a_cache():
    policy, observation = make(), toy.observe(2)
    data = policy.bundle
    got = policy.plan(observation, KEY)
    batch = data.observation_batch(observation)
    model, variables = VLA(policy.config.model), {"params": policy.params}
    # Room behind the longest prompt for what is decoded.
    rows = (batch.tokens, batch.token_mask, batch.token_causal)
    tokens, mask, causal = (np.pad(x, ((0, 0), (0, 24))) for x in rows)
    causal[:] = False
    ends = mask.sum(axis=1)

    @jax.jit
    def logits_of(tokens, mask, causal):
        full = batch.replace(tokens=tokens, token_mask=mask, token_causal=causal, token_loss=causal)
        _, hidden = model.apply(variables, full, method="prefill")
        return model.apply(variables, hidden, method="logits")

    ids = [[], []]
    for i in range(policy.config.data.max_target_tokens):
        logits = np.asarray(logits_of(tokens, mask, causal))
        for row in range(2):
            ids[row].append(int(logits[row, ends[row] + i - 1].argmax()))
            tokens[row, ends[row] + i], mask[row, ends[row] + i] = ids[row][-1], True
            causal[row, ends[row] + i] = True
    for text, row in zip(got, ids):
        assert data.tokenizer.decode(row).startswith(text) and len(text) > 0


def test_temperature_makes_plans_random():
    policy, observation = make(), toy.observe(2)
    greedy = policy.plan(observation, KEY)
    assert policy.plan(observation, jax.random.key(9)) == greedy
    sampled = policy.plan(observation, KEY, temperature=2.0)
    assert sampled != policy.plan(observation, jax.random.key(9), 2.0)


def test_a_sampled_plan_does_not_depend_on_the_others():
    policy, observation, keys = make(), toy.observe(3), jax.random.split(KEY, 3)
    together = policy.plan(observation, keys, temperature=2.0)
    assert len(set(together)) == 3
    order = [2, 0]
    assert policy.plan(take(observation, order), keys[np.array(order)], 2.0) == [together[2], together[0]]
    assert policy.plan(take(observation, [1]), keys[1], 2.0) == [together[1]]


def test_load_needs_only_the_path(tmp_path):
    cfg = toy.config()
    params, averages = toy.save(tmp_path / "run", cfg)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "7"):
        policy = Policy.load(path)
        assert (policy.step, policy.config) == (7, cfg)
        jax.tree.map(np.testing.assert_array_equal, policy.params, averages)
    raw = Policy.load(tmp_path / "run", weights="params")
    jax.tree.map(np.testing.assert_array_equal, raw.params, params)
    observation = toy.observe(1)
    direct = Policy(config=cfg, bundle=toy.bundle(), params=averages, step=7)
    np.testing.assert_array_equal(
        policy.act(observation, KEY, solver=SOLVER), direct.act(observation, KEY, solver=SOLVER)
    )


def test_load_without_averages_and_with_other_parameters(tmp_path):
    cfg = toy.config()
    toy.save(tmp_path / "raw", cfg, ema=False)
    assert Policy.load(tmp_path / "raw").step == 7
    with pytest.raises(ValueError, match="no 'ema'"):
        Policy.load(tmp_path / "raw", weights="ema")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Policy.load(tmp_path / "nothing")
    checkpoints = Checkpoints(tmp_path / "other", keep=1)
    checkpoints.save(1, {"params": {"w": jnp.zeros(2)}}, {"config": {}})
    checkpoints.close()
    with pytest.raises(ValueError, match="no data: it is not a policy"):
        Policy.load(tmp_path / "other")


def test_parameters_of_another_model_are_named():
    policy = make()
    params = jax.tree.map(lambda x: x, policy.params)
    params["expert"]["action_out_proj"]["kernel"] = jnp.zeros((16, 5))
    wrong = dataclasses.replace(policy, params=params)
    with pytest.raises(ValueError, match=r"expert/action_out_proj/kernel has shape \(16, 5\).*\(16, 3\)"):
        wrong.check_params("here")


@pytest.mark.parametrize(
    ("objective", "how", "message"),
    [
        ({}, {"plan": ["a"]}, "plan_visible is False"),
        ({}, {"plan": ["a", "b"], "plan_visible": True}, "2 plans for 1 robots"),
        ({}, {"samples": 0}, "samples=0"),
        ({"plan_visible": 0.0}, {"plan_visible": True}, "plan_visible=0"),
        ({"action_weight": 0.0}, {}, "has no actions"),
        ({"text": False}, {"plan_visible": True}, "cannot write plans"),
    ],
)
def test_impossible_requests_are_refused(objective, how, message):
    with pytest.raises(ValueError, match=message):
        make(**objective).act(toy.observe(1), KEY, solver=SOLVER, **how)


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="token"):
        make().act(toy.observe(1), KEY, solver=SOLVER, plan=["left " * 60], plan_visible=True)


def test_padded_action_dims_are_masked_and_cut_off():
    """A model with more action dims than the robot: what is in the padded ones must not matter."""
    cfg = toy.config()
    expert = dataclasses.replace(cfg.model.expert, action_dim=5)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, expert=expert))
    transforms = tuple(
        dataclasses.replace(t, action_dim=5) if type(t).__name__ == "PadDims" else t
        for t in toy.bundle().transforms
    )
    bundle = dataclasses.replace(toy.bundle(), transforms=transforms)
    params = toy.random_params(cfg)
    policy = Policy(config=cfg, bundle=bundle, params=params, step=0)
    actions = policy.act(toy.observe(2), KEY, solver=SOLVER)
    assert actions.shape == (2, 8, 3)
    params["expert"]["action_in_proj"]["kernel"] = (
        params["expert"]["action_in_proj"]["kernel"].at[3:].add(9.0)
    )
    changed = Policy(config=cfg, bundle=bundle, params=params, step=0)
    np.testing.assert_allclose(changed.act(toy.observe(2), KEY, solver=SOLVER), actions, atol=1e-5)


def test_dimensions_that_never_change_are_not_in_scale(monkeypatch):
    monkeypatch.setattr(Policy, "action_scale", np.array([2.0, 0.0, 0.5]))
    np.testing.assert_array_equal(make().in_scale(np.ones((1, 1, 3))), [[[0.5, 2.0]]])
