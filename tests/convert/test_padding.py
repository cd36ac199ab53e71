"""Robots with fewer action dims than the model: an imported policy reads noise in the others, as openpi's sampler does.

Compared with openpi's networks and sampler written out in numpy (`openpi_sampler`), with the robot's own dims.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.convert import layouts, openpi_sampler
from tests.serve.server.harness import serving
from vla_jax.checkpoint import Checkpoints, load, read_meta
from vla_jax.config import TrainConfig, from_meta, to_json
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.convert.sources import OrbaxSource, SafetensorsSource
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.executors.base import Running
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.backends import SERVED
from vla_jax.serve.server.engine import Engine
from vla_jax.train.init_from import adapted
from vla_jax.types import Observation

SOLVER = SolverConfig(method="euler", num_steps=10)
HORIZON, STATES, SEED = 4, 3, 3
CASES = [(kind, dims, of) for kind in ("pi0", "pi05") for dims, of in ((5, 8), (7, 32), (14, 32))]
PROMPT = "pick up the block"


def sizes_of(of):
    return dataclasses.replace(layouts.TINY, vocab=300, actions=of, states=of, vision_depth=1, depth=2)


@functools.cache
def statistics(dims):
    rng, found = np.random.default_rng(dims), {}
    for field, n in (("state", STATES), ("actions", dims)):
        low = rng.uniform(-2, -1, n)
        values = {"mean": rng.normal(size=n), "std": rng.uniform(0.5, 2, n), "q01": low, "q99": -low}
        found[field] = {name: value.tolist() for name, value in values.items()}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, dims, of) → openpi's arrays, and the folder of the run that they become; each is made once."""
    folder = tmp_path_factory.mktemp("padding")
    train_tokenizer([PROMPT, "Task: , State: 0123456789;"], 300).save(folder / "tokenizer")

    @functools.cache
    def make(kind, dims, of):
        theirs = folder / f"{kind}_{dims}_{of}"
        arrays = openpi_sampler.arrays(sizes_of(of), kind)
        layouts.save_openpi(theirs, arrays, value=True)
        file = theirs / "assets/lab/norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"norm_stats": statistics(dims)}))
        return arrays, imported(theirs, folder / f"{kind}_{dims}_{of}_ours", folder / "tokenizer")

    make.tokenizer = folder / "tokenizer"
    return make


def imported(theirs, out, tokenizer):
    options = Options(horizon=HORIZON, policy=PolicyOptions(tokenizer=tokenizer), cameras=("top",))
    convert(theirs, out, source="openpi", target="vla_jax", dtype="float32", options=options)
    return out


def float32(folder):
    policy = Policy.load(folder)
    model = dataclasses.replace(policy.config.model, dtype="float32")
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))


def observation():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    state = rng.uniform(-1, 1, (1, STATES)).astype(np.float32)
    return Observation(images={"top": image}, state=state, instruction=(PROMPT,))


def normalised(kind, actions, s):
    """openpi's formulas."""
    s = {name: np.asarray(values) for name, values in s.items()}
    if kind == "pi0":
        return (actions - s["mean"]) / (s["std"] + 1e-6)
    return (actions - s["q01"]) / (s["q99"] - s["q01"] + 1e-6) * 2 - 1


def theirs(arrays, kind, dims, of, policy, samples=1, **how):
    """openpi's chunks [S k a] of the robot's dims, from the noise that a policy draws for this key."""
    for_noise = jax.random.fold_in(jax.random.split(jax.random.key(SEED))[1], 0)
    noise = np.asarray(jax.random.normal(for_noise, (samples, HORIZON, of)))
    seen = observation()
    text = policy.bundle.observation_batch(seen)
    state = np.pad(normalised(kind, seen.state, statistics(dims)["state"]), ((0, 0), (0, of - STATES)))

    def repeat(x):
        return np.repeat(np.asarray(x), samples, axis=0)

    chunk = openpi_sampler.sample(
        arrays, sizes_of(of), kind,
        images=[repeat(seen.images["top"] / 255 * 2 - 1)], tokens=repeat(text.tokens),
        token_mask=repeat(text.token_mask), state=repeat(state), noise=noise, **how,
    )  # fmt: skip
    return chunk[..., :dims]


def equals(kind, dims, actions, wanted):
    np.testing.assert_allclose(
        normalised(kind, actions, statistics(dims)["actions"]), wanted, rtol=0, atol=1e-5
    )
    assert 0.5 < np.sqrt(np.mean(wanted**2)) < 2


@pytest.mark.parametrize(("kind", "dims", "of"), CASES)
def test_an_imported_policy_acts_as_openpi_does(made, kind, dims, of):
    arrays, folder = made(kind, dims, of)
    policy = float32(folder)
    wanted = theirs(arrays, kind, dims, of, policy)
    for actor in (policy, policy.compiled(CompileConfig(buckets=(1,)))):
        equals(kind, dims, actor.act(observation(), jax.random.key(SEED), solver=SOLVER), wanted)


def test_served(made):
    """Through the websocket, where each row of a batch has a key of its own."""
    kind, dims, of = "pi05", 7, 32
    arrays, folder = made(kind, dims, of)
    policy = float32(folder)
    engine = Engine(
        policy, solver=SOLVER, buckets=(1,), compiled=dataclasses.replace(SERVED, prompts=(200,)), plans=False
    )
    seen = observation()
    message = {
        "observation/top": seen.images["top"][0], "observation/state": seen.state[0], "prompt": PROMPT,
        "options": {"seed": SEED},
    }  # fmt: skip
    with serving(engine) as server, server.client() as client:
        actions = client.infer(message)["actions"]
    equals(kind, dims, actions, theirs(arrays, kind, dims, of, policy)[0])


def test_samples_and_continued_chunks(made):
    """The noise of the padded dims is there in every sample, and in a chunk that continues the one that runs."""
    kind, dims, of = "pi0", 5, 8
    arrays, folder = made(kind, dims, of)
    policy = float32(folder)
    known = np.random.default_rng(4).normal(size=(1, HORIZON, dims)).astype(np.float32)
    running = Running(actions=known, delay=1, end=3, how="jacobian_free")
    target = np.pad(normalised(kind, known, statistics(dims)["actions"]), ((0, 0), (0, 0), (0, of - dims)))
    c = 2 / 3  # of step 1: (end - 1) / (end - delay + 1); of step 2 half of that
    weight = np.array([1, *(x * np.expm1(x) / np.expm1(1) for x in (c, c / 2)), 0])[:, None] * (
        np.arange(of) < dims
    )

    def correct(
        x, time, v
    ):  # real-time chunking on openpi's clock: v = noise - data, x - time · v is the chunk foreseen
        strength = 5.0 if time == 1 else min(5.0, (time**2 + (1 - time) ** 2) / (time * (1 - time)))
        return v - strength * weight * (target - (x - time * v))

    plain = theirs(arrays, kind, dims, of, policy, samples=2)
    continued = theirs(arrays, kind, dims, of, policy, samples=2, correct=correct)
    assert np.abs(continued - plain).max() > 0.1
    how = {"solver": SOLVER, "samples": 2}
    equals(kind, dims, policy.act(observation(), jax.random.key(SEED), **how)[0], plain)
    for actor in (policy, policy.compiled(CompileConfig(buckets=(1,)))):
        equals(
            kind, dims, actor.act(observation(), jax.random.key(SEED), running=running, **how)[0], continued
        )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_export_and_import_change_nothing(made, tmp_path, kind):
    arrays, folder = made(kind, 5, 8)
    report = convert(folder, tmp_path / "out", source="vla_jax", target="openpi")
    assert report.silenced == 0
    found = OrbaxSource(tmp_path / "out/params")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.read(f"params/{name}/value"), array, err_msg=name)
    again = imported(tmp_path / "out", tmp_path / "again", made.tokenizer)
    assert read_meta(again)["config"] == read_meta(folder)["config"]
    chunks = [float32(run).act(observation(), jax.random.key(SEED), solver=SOLVER) for run in (folder, again)]
    np.testing.assert_array_equal(*chunks)


def of_our_own(run, out):
    """The same arrays as a policy of ours that has never seen noise in the padded dims."""
    meta = read_meta(run)
    config = from_meta(meta)
    expert = dataclasses.replace(config.model.expert, padding="zero")
    model = dataclasses.replace(config.model, expert=expert)
    objective = dataclasses.replace(config.objective, padding_loss=False)
    config = dataclasses.replace(config, model=model, objective=objective)
    checkpoints = Checkpoints(out, keep=1)
    record = {"config": json.loads(to_json(config)), "data": meta["data"]}
    checkpoints.save(1, {"params": load(run, "params")}, record)
    checkpoints.close()
    return out


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_an_export_of_ours_is_deaf_to_noise_it_never_saw(made, tmp_path, kind):
    """Exact zeros where nothing was trained: openpi's sampler, noise in all dims, then does what our policy does."""
    dims, of = 5, 8
    arrays, folder = made(kind, dims, of)
    policy = float32(of_our_own(folder, tmp_path / "run"))
    report = convert(tmp_path / "run", tmp_path / "out", source="vla_jax", target="openpi")
    assert report.silenced == of - dims
    source = OrbaxSource(tmp_path / "out/params")
    found = {name: source.read(f"params/{name}/value") for name in arrays}
    assert not found["action_in_proj/kernel"][dims:].any()
    assert (
        not found["action_out_proj/kernel"][:, dims:].any() and not found["action_out_proj/bias"][dims:].any()
    )
    np.testing.assert_array_equal(
        found["action_in_proj/kernel"][:dims], arrays["action_in_proj/kernel"][:dims]
    )
    np.testing.assert_array_equal(
        found["action_out_proj/kernel"][:, :dims], arrays["action_out_proj/kernel"][:, :dims]
    )
    same = [name for name in arrays if not name.startswith(("action_in_proj/kernel", "action_out_proj"))]
    for name in same:
        np.testing.assert_array_equal(found[name], arrays[name], err_msg=name)
    ours = policy.act(observation(), jax.random.key(SEED), solver=SOLVER)
    equals(kind, dims, ours, theirs(found, kind, dims, of, policy))
    loud = theirs(arrays, kind, dims, of, policy)
    assert np.abs(normalised(kind, ours, statistics(dims)["actions"]) - loud).max() > 0.01
    back = float32(imported(tmp_path / "out", tmp_path / "back", made.tokenizer))
    assert back.config.model.expert.padding == "noise"
    np.testing.assert_allclose(back.act(observation(), jax.random.key(SEED), solver=SOLVER), ours, atol=2e-5)
    if kind == "pi0":
        convert(tmp_path / "run", tmp_path / "hf", source="vla_jax", target="pi0_hf")
        hf = SafetensorsSource(tmp_path / "hf")
        assert not hf.read("action_in_proj.weight")[:, dims:].any()
        assert (
            not hf.read("action_out_proj.weight")[dims:].any()
            and not hf.read("action_out_proj.bias")[dims:].any()
        )
        np.testing.assert_array_equal(hf.read("action_in_proj.weight").T, found["action_in_proj/kernel"])


def test_weights_converted_before_the_choice_was_saved_are_noise(made):
    meta = read_meta(made("pi0", 5, 8)[1])
    config = from_meta(meta)
    assert config.model.expert.padding == "noise" and config.objective.padding_loss
    old = json.loads(json.dumps(meta))
    del old["config"]["model"]["expert"]["padding"], old["config"]["objective"]["padding_loss"]
    assert from_meta(old) == config
    for trained in (old | {"converted": {"from": "big_vision"}}, {"config": old["config"]}):
        assert from_meta(trained).model.expert.padding == "zero"


def test_what_is_trained_from_it_takes_it_over(made):
    config = adapted(TrainConfig(), made("pi0", 5, 8)[1])
    assert config.model.expert.padding == "noise" and config.objective.padding_loss
    with pytest.raises(ValueError, match=r"padding_loss=True: with model.expert.padding=zero"):
        TrainConfig(objective=ObjectiveConfig(padding_loss=True))
    with pytest.raises(ValueError, match=r"expert.padding='none': use zero or noise"):
        VLAConfig(expert=JointConfig(padding="none"))
