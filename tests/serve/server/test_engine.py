"""Served actions are the policy's own, bit for bit, whoever shares the batch; nothing compiles after the start."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from benchmarks import _serve_policies
from tests.serve.server.harness import serving
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.backends import SERVED
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.request import parse
from vla_jax.types import Observation

SOLVER = SolverConfig(num_steps=3)
ONE_LENGTH = dataclasses.replace(SERVED, prompts=(32,))
"""Of texts: fewer programs."""


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> dict[str, Policy]:
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for shape in ("tabletop", "pi0"):
        _serve_policies.save(folder / shape, shape, prompt_dropout=0.1 if shape == "tabletop" else 0.0)
        found[shape] = Policy.load(folder / shape)
    return found


@pytest.fixture(scope="module")
def engines(policies) -> dict[str, Engine]:
    return {
        "tabletop": Engine(
            policies["tabletop"],
            solver=SOLVER,
            buckets=(1, 4),
            samples=(1, 2),
            guidance=False,
            compiled=ONE_LENGTH,
        ),
        "guided": Engine(policies["tabletop"], solver=SOLVER, buckets=(1, 4), compiled=ONE_LENGTH),
        "pi0": Engine(policies["pi0"], solver=SOLVER, buckets=(1, 4)),
    }


def messages(engine: Engine, count: int, seed: int = 0) -> list[dict]:
    rng, metadata = np.random.default_rng(seed), engine.spec.metadata()
    return [_serve_policies.observe(rng, metadata) for _ in range(count)]


def rows(engine: Engine, wire: list[dict]) -> list:
    requests = [parse(message, engine.spec, {})[0][0] for message in wire]
    return [engine.prepare(request, seed) for seed, request in enumerate(requests)]


def observed(message: dict) -> Observation:
    """The same as a policy is given it directly."""
    cameras = {
        k.removeprefix("observation/"): None if v is None else v[None]
        for k, v in message.items()
        if v is None or getattr(v, "ndim", 0) == 3
    }
    return Observation(
        images=cameras, state=message["observation/state"][None], instruction=(message["prompt"],)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "tabletop",
            [
                {}, {"samples": 2}, {"write_plan": True}, {"plan_visible": True},
                {"plan": _serve_policies.PLANS[1], "samples": 2, "seed": 3},
            ],
        ),
        ("guided", [{"guidance": w, "plan_visible": see} for w in (0, 1, 3.0) for see in (False, True)]),
    ],
)  # fmt: skip
def test_nothing_compiles_after_the_warm_up(engines, name, options):
    engine, metrics = engines[name], Metrics()
    engine.warm_up()
    before = metrics.value("vla_compilations_total")
    jax.jit(lambda x: len(name) * x)(np.ones(7))
    compiled = metrics.value("vla_compilations_total")
    assert compiled > before, "compilations are seen"
    with serving(engine, metrics=metrics) as server, server.client() as client:
        for option, count in itertools.product(options, (1, 2, 3, 4)):
            wire = messages(engine, count)
            for reply in client.infer_batch(wire, [option] * count):
                assert reply["actions"].shape == (2, 8, 3)[option.get("samples", 1) == 1 :]
        client.infer({**wire[0], "observation/top": None})
    assert metrics.value("vla_compilations_total") == compiled


def test_short_prompts_are_warm_where_the_usual_one_is_long(policies, monkeypatch):
    engine, metrics = Engine(policies["pi0"], solver=SOLVER, buckets=(2,)), Metrics()
    monkeypatch.setattr(engine, "_any_prompt", lambda: "pick up the red cup " * 4)
    assert engine.warm_up() == len(engine.policy.runner.lengths) > 1
    before = metrics.value("vla_compilations_total")
    short = rows(engine, messages(engine, 2))
    assert short[0].program.length == min(engine.policy.runner.lengths)
    engine.run(short)
    assert metrics.value("vla_compilations_total") == before


def test_plans_are_written_with_the_parameters_that_act(engines):
    """There is one set of them, on the device."""
    engine = engines["tabletop"]
    leaves = jax.tree.leaves(engine.policy.params)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert engine.policy.runner.compiler.params is engine.policy.params
    assert all(planner.params is engine.policy.params for planner in engine._planners.values())


@pytest.mark.parametrize("shape", ["tabletop", "pi0"])
def test_a_request_alone_gets_exactly_the_policys_actions(policies, engines, shape):
    """Those of the compiled policy to the bit, and those of the plain one up to rounding."""
    engine, policy = engines[shape], policies[shape]
    for seed, (message, row) in enumerate(zip(messages(engine, 3), rows(engine, messages(engine, 3)))):
        (answer,) = engine.run([row])
        direct = engine.policy.act(observed(message), jax.random.key(seed), solver=SOLVER)
        assert answer.bucket == 1 and answer.actions.dtype == direct.dtype == np.float32
        np.testing.assert_array_equal(answer.actions, direct[0])
        plain = policy.act(observed(message), jax.random.key(seed), solver=SOLVER)
        np.testing.assert_allclose(answer.actions, plain[0], atol=2e-5)


@pytest.mark.parametrize("shape", ["tabletop", "pi0"])
def test_what_else_is_in_the_batch_and_where_does_not_matter_to_the_bit(engines, shape):
    engine = engines[shape]
    prepared = rows(engine, messages(engine, 12))
    alone = [engine.run([row], bucket=4)[0].actions for row in prepared]
    rng = np.random.default_rng(1)
    for size in (2, 3, 4, 4, 4, 4):
        chosen = rng.permutation(12)[:size]
        for index, answer in zip(chosen, engine.run([prepared[i] for i in chosen], bucket=4)):
            assert answer.bucket == 4
            np.testing.assert_array_equal(answer.actions, alone[index])
    for row, expected in zip(prepared, alone):  # another bucket: the same function, rounded otherwise
        np.testing.assert_allclose(engine.run([row])[0].actions, expected, atol=1e-4)


SIZES = [(16, 16), (24, 32), (480, 640), (50, 20), (1, 1)]


@pytest.fixture(scope="module")
def resizing(policies) -> Engine:
    """Of a policy that was trained on frames of 24 × 32, which it sees at 16 × 16."""
    policy = policies["tabletop"]
    schema = dataclasses.replace(policy.bundle.schema, cameras={"top": (24, 32), "wrist": (24, 32)})
    policy = dataclasses.replace(policy, bundle=dataclasses.replace(policy.bundle, schema=schema))
    engine = Engine(policy, solver=SOLVER, buckets=(1,), guidance=False, compiled=ONE_LENGTH)
    engine.warm_up()
    return engine


@pytest.mark.parametrize("name", ["small", "trained_larger"])
def test_images_of_any_size_are_resized_as_in_training_and_compile_nothing(engines, resizing, name):
    engine, metrics, rng = (
        engines["tabletop"] if name == "small" else resizing,
        Metrics(),
        np.random.default_rng(3),
    )
    policy = engine.policy
    engine.warm_up()
    for size in SIZES:
        message = messages(engine, 1)[0]
        for camera in ("top", "wrist"):
            message[f"observation/{camera}"] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        before = metrics.value("vla_compilations_total")
        (row,) = rows(engine, [message | {"options": {"write_plan": True}}])
        assert all(image.shape == (1, 16, 16, 3) for image in row.observation.images.values())
        (answer,) = engine.run([row])
        assert metrics.value("vla_compilations_total") == before
        trained = policy.bundle.observation_batch(observed(message))  # what training makes of such an image
        for camera, image in row.encoded.images.items():
            np.testing.assert_array_equal(image, trained.images[camera][0])
        np.testing.assert_array_equal(
            answer.actions, engine.policy.act(observed(message), jax.random.key(0), solver=SOLVER)[0]
        )
        plain = policy.act(observed(message), jax.random.key(0), solver=SOLVER)
        np.testing.assert_allclose(answer.actions, plain[0], atol=2e-5)
        assert [answer.plan] == policy.plan(observed(message), jax.random.key(0))


def test_other_sizes_can_be_refused(policies, resizing):
    engine = Engine(policies["tabletop"], solver=SOLVER, buckets=(1,), plans=False, max_pixels=0)
    (message,) = messages(engine, 1)
    rows(engine, [message])
    with pytest.raises(
        Refused, match=r"observation/top is uint8\[480, 640, 3\]; uint8\[16, 16, 3\] is expected"
    ):
        rows(engine, [message | {"observation/top": np.zeros((480, 640, 3), np.uint8)}])
    assert engine.policy.serving.resize == "device" and resizing.policy.serving.resize == "host"
    (message,) = messages(resizing, 1)
    with pytest.raises(Refused, match="image size is over 921600 pixels"):
        rows(resizing, [message | {"observation/top": np.zeros((1080, 1920, 3), np.uint8)}])
    with pytest.raises(ValueError, match="max_pixels=-1"):
        Engine(policies["tabletop"], solver=SOLVER, max_pixels=-1)


@pytest.mark.parametrize("value", [3e38, -3.4e38, 1e30])
def test_a_state_that_no_sensor_gives_is_invalid_and_not_a_failure(engines, value):
    engine = engines["tabletop"]
    (message,) = messages(engine, 1)
    message["observation/state"] = np.array([0, value, 0], np.float32)
    with serving(engine) as server:
        said = server.ask(message)
    assert said.startswith("invalid: state[0, 1] (q1) is") and "\n" not in said


def test_seeds_are_the_rows_own(engines):
    engine = engines["tabletop"]
    (row,) = rows(engine, messages(engine, 1))
    same, other, again = engine.run([row, row._replace(seed=1), row])
    assert np.abs(same.actions - other.actions).max() > 1e-3
    np.testing.assert_array_equal(same.actions, again.actions)
    message = messages(engine, 1)[0] | {"options": {"seed": 2**31 - 1}}
    assert engine.prepare(parse(message, engine.spec, {})[0][0], 0).seed == 2**31 - 1


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"samples": 2}, {"samples": 2}),
        ({"plan": _serve_policies.PLANS[0]}, {"plan": [_serve_policies.PLANS[0]], "plan_visible": True}),
        ({"plan_visible": True}, {"plan_visible": True}),
        ({"guidance": 0.0}, {"guidance": 0.0}),
        ({"guidance": 1}, {}),
        ({"guidance": 2.5}, {"guidance": 2.5}),
        ({"guidance": 3, "plan_visible": True}, {"guidance": 3.0, "plan_visible": True}),
        ({"guidance": 0, "plan_visible": True}, {"guidance": 0.0, "plan_visible": True}),
    ],
)
def test_options_are_the_policys_own(policies, engines, options, how):
    engine, policy = engines["guided" if "guidance" in options else "tabletop"], policies["tabletop"]
    (message,) = messages(engine, 1)
    (row,) = rows(engine, [message | {"options": options}])
    (answer,) = engine.run([row])
    direct = engine.policy.act(observed(message), jax.random.key(0), solver=SOLVER, **how)
    np.testing.assert_allclose(answer.actions, direct[0], atol=2e-5)  # plans: another text length
    if "plan_visible" in options:
        assert [answer.plan] == policy.plan(observed(message), jax.random.key(9)) and answer.plan


def test_every_row_has_its_own_guidance(engines):
    """Rows of different weights share a call, and each gets what it gets alone."""
    engine = engines["guided"]
    (message,) = messages(engine, 1)
    weights = (1.5, 4.0, 2.0)
    prepared = rows(engine, [message | {"options": {"guidance": w, "seed": 5}} for w in weights])
    assert len({row.program for row in prepared}) == 1
    together = [answer.actions for answer in engine.run(prepared, bucket=4)]
    for row, actions in zip(prepared, together):
        np.testing.assert_array_equal(engine.run([row], bucket=4)[0].actions, actions)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    for wrong in (-1.0, 1000.0, True, "2", float("nan")):
        with pytest.raises(Refused, match=r"options.guidance is .*; a number from 0 to 100"):
            rows(engine, [message | {"options": {"guidance": wrong}}])


def test_a_plan_can_be_written_without_being_followed(policies, engines):
    engine = engines["tabletop"]
    wire = messages(engine, 3)
    plain = engine.run(rows(engine, wire))
    for message, answer, without in zip(
        wire, engine.run(rows(engine, [m | {"options": {"write_plan": True}} for m in wire])), plain
    ):
        np.testing.assert_array_equal(answer.actions, without.actions)
        assert [answer.plan] == policies["tabletop"].plan(observed(message), jax.random.key(0))
        assert without.plan is None


def test_an_absent_camera_is_a_masked_one_or_has_a_program(policies, engines):
    engine = engines["tabletop"]
    (message,) = messages(engine, 1)
    (row,) = rows(engine, [message | {"observation/wrist": None}])
    blind = message | {"observation/wrist": None}
    direct = policies["tabletop"].act(observed(blind), jax.random.key(0), solver=SOLVER)
    np.testing.assert_allclose(engine.run([row])[0].actions, direct[0], atol=2e-5)
    how = {"plans": False, "guidance": False, "camera_sets": [("top",)]}
    known = Engine(policies["tabletop"], solver=SOLVER, buckets=(1,), **how)
    known.warm_up()
    compiled = known.policy.runner.compiler.shapes
    assert len(compiled) == 2 * 2  # camera sets, text lengths
    (row,) = rows(known, [message | {"observation/wrist": None}])
    np.testing.assert_array_equal(
        known.run([row])[0].actions,
        known.policy.act(observed(blind), jax.random.key(0), solver=SOLVER)[0],
    )
    assert known.policy.runner.compiler.shapes == compiled
    with pytest.raises(ValueError, match="camera set"):
        Engine(policies["tabletop"], solver=SOLVER, camera_sets=[("left",)])


def test_what_the_policy_cannot_take_is_refused_before_it_is_queued(engines):
    engine = engines["tabletop"]
    (message,) = messages(engine, 1)
    with pytest.raises(Refused, match=r"invalid: text of .* tokens is over the limit"):
        rows(engine, [message | {"prompt": "word " * 300}])
    (message,) = messages(engines["pi0"], 1)
    for option in ({"plan": "x"}, {"write_plan": True}, {"plan_visible": True}, {"guidance": 2.0}):
        with pytest.raises(Refused, match="unknown option"):
            rows(engines["pi0"], [message | {"options": option}])
    with pytest.raises(ValueError, match="largest bucket"):
        engine.run(rows(engine, messages(engine, 5)))


def test_actions_that_are_not_finite_never_reach_a_robot(policies):
    broken = jax.tree.map(lambda p: p * np.nan, policies["tabletop"].params)
    policy = Policy(
        config=policies["tabletop"].config, bundle=policies["tabletop"].bundle, params=broken, step=0
    )
    engine = Engine(policy, solver=SOLVER, buckets=(1,), plans=False)
    (answer,) = engine.run(rows(engine, messages(engine, 1)))
    assert isinstance(answer, FloatingPointError)
