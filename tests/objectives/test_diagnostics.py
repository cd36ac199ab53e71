"""The comparison of gradients against each loss's gradient computed by itself, on one device and on eight.

python -m tests.objectives.test_diagnostics runs a network on simulated devices and prints one JSON object.
"""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.models import small
from tests.objectives import toy
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.diagnostics import as_metrics, diagnose, group_of
from vla_jax.objectives.objective import Objective
from vla_jax.objectives.terms import LossByTime
from vla_jax.objectives.weighting import (
    GradientRatio,
    PCGrad,
    WeightingConfig,
    combine,
    per_loss,
    trunk,
)
from vla_jax.sharding import MeshConfig, activate, batch_sharding, make_mesh, replicated
from vla_jax.train.optim import make_optimizer
from vla_jax.train.prefetch import to_device
from vla_jax.train.state import TrainState
from vla_jax.train.step import make_train_step
from vla_jax.train.weigh import policy_of

BINS = 3
PROCESS = make_process(ProcessConfig())
OBJECTIVE = ObjectiveConfig(insulation=0.5)


def by_hand(text, actions, share, weights):
    """Every number of a report in numpy float64, from each loss's gradient {path: array}; actions by bin."""

    def compare(pairs):
        t, a = (np.concatenate([x[i].ravel() for x in pairs]) for i in range(2))
        norms = np.linalg.norm(t), np.linalg.norm(a)
        cosine = t @ a / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
        ratio = weights["action"] * norms[1] / (weights["text"] * norms[0]) if norms[0] else np.nan
        return np.array([*norms, ratio, cosine, np.mean(t * a < 0)])

    text = {name: np.asarray(x, np.float64) for name, x in text.items()}
    actions = [{name: np.asarray(x, np.float64) for name, x in a.items()} for a in actions]
    whole = {name: sum(s * a[name] for s, a in zip(share, actions)) for name in text}

    def report(action):
        layers, groups = {}, {}
        for name in text:
            group, stacked = group_of(name)
            groups.setdefault(group, (stacked, []))[1].append((text[name], action[name]))
        for group, (stacked, pairs) in groups.items():
            rows = range(pairs[0][0].shape[0]) if stacked else None
            found = (
                compare(pairs) if rows is None else [compare([(t[i], a[i]) for t, a in pairs]) for i in rows]
            )
            layers[group] = np.array(found)
        return compare([(text[name], action[name]) for name in text]), layers

    def unknown(found):  # of a bin into which no t fell
        return found[0] * np.nan, {group: value * np.nan for group, value in found[1].items()}

    return report(whole), [report(a) if s else unknown(report(a)) for s, a in zip(share, actions)]


def two(action, text=1.0):
    return {"text": text, "action": action}


def numbers(comparison):
    """Both norms, ratio, cosine and conflict."""
    return [comparison.norms["text"], comparison.norms["action"], *comparison.pairs["text", "action"]]


def difference(report, hand, conflicts=0.0) -> float:
    """The largest difference, relative to the largest value of its kind; `conflicts` may differ by that much more."""
    (whole, layers), bins = hand
    pairs = [(report.whole, whole)]
    pairs += [(report.layers[g], v) for g, v in layers.items()]
    pairs += [(report.by_time["action"], np.stack([b[0] for b in bins]))]
    by_layer = report.layers_by_time["action"]
    pairs += [(by_layer[g], np.stack([b[1][g] for b in bins])) for g in layers]
    assert report.layers.keys() == layers.keys() == by_layer.keys()
    largest = 0.0
    for got, want in pairs:
        got = np.stack([np.asarray(x) for x in numbers(got)], axis=-1)
        assert got.shape == want.shape
        for i in range(5):
            finite = np.isfinite(want[..., i]) & np.isfinite(got[..., i])
            # Without a text gradient both are not finite.
            assert (np.isfinite(got[..., i]) == np.isfinite(want[..., i])).all()
            gap = np.abs(got[..., i] - want[..., i])[finite]
            size = np.abs(want[..., i])[finite].max(initial=1.0)
            gap = np.maximum(gap - conflicts, 0) if i == 4 else gap
            largest = max(largest, float(gap.max(initial=0.0) / size))
    return largest


def test_quadratics_by_layer_and_time():
    """Gradients written down by hand: x - a for the text, c_n (x - b_n) for bin n of the actions."""
    rng = np.random.default_rng(0)
    shapes = {"net": {"layers": {"w": (3, 4), "v": (3, 2, 2)}, "head": {"w": (5,)}}, "expert": {"w": (2,)}}

    def random():
        return jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, a, b = random(), random(), [random() for _ in range(BINS)]
    scales, share = np.array([1.0, 3.0, 0.0], np.float32), np.array([0.5, 0.5, 0.0], np.float32)

    def half_square(x, y):
        return sum(0.5 * jnp.sum((p - q) ** 2) for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y)))

    def losses(p):
        actions = jnp.stack([c * half_square(p, y) for c, y in zip(scales, b)])
        return two(LossByTime(actions, jnp.asarray(share)), LossByTime(half_square(p, a), jnp.ones(())))

    inside = trunk.inside(params, ("net",), "trunk")
    weights = two(3.0, text=0.5)
    report = jax.jit(lambda p: diagnose(losses, p, inside, weights))(params)
    text = trunk.chosen(jax.tree.map(jnp.subtract, params, a), inside)
    actions = [
        trunk.chosen(jax.tree.map(lambda p, q: c * (p - q), params, y), inside) for c, y in zip(scales, b)
    ]
    assert set(report.layers) == {"net/layers", "net/head/w"}
    by_layer, pair = report.layers_by_time["action"], ("text", "action")
    assert by_layer["net/layers"].pairs[pair].cosine.shape == (BINS, 3)
    assert difference(report, by_hand(text, actions, share, weights)) < 1e-6
    for found in (report.by_time["action"], by_layer["net/head/w"]):  # a bin that was not drawn
        assert np.isnan(found.pairs[pair].cosine[2]) and np.isnan(found.norms["action"][2])


def test_every_two_of_several_losses():
    """A loss without a time and two with one: pairs, bins beside whole losses, and their names in the log."""
    rng = np.random.default_rng(2)
    x = {"net": {"w": jnp.asarray(rng.normal(size=7), jnp.float32)}}
    points = {
        "text": rng.normal(size=(1, 7)),
        "action": rng.normal(size=(2, 7)),
        "depth": rng.normal(size=(2, 7)),
    }
    shares = {"action": np.array([0.25, 0.75]), "depth": np.array([0.5, 0.5])}

    def losses(p):
        means = {n: jnp.sum((p["net"]["w"] - jnp.float32(a)) ** 2, axis=1) / 2 for n, a in points.items()}
        timed = {n: LossByTime(means[n], jnp.float32(shares[n])) for n in shares}
        return timed | {"text": LossByTime(means["text"][0], jnp.ones(()))}

    weights = {"text": 1.0, "action": 3.0, "depth": 0.5}
    report = jax.jit(lambda p: diagnose(losses, p, trunk.inside(p, ("net",), "trunk"), weights))(x)
    bins = {n: np.asarray(x["net"]["w"], np.float64) - a for n, a in points.items()}
    whole = {n: shares.get(n, np.ones(1)) @ g for n, g in bins.items()}

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    for pair, beside in report.whole.pairs.items():
        a, b = (whole[n] for n in pair)
        ratio = weights[pair[1]] * np.linalg.norm(b) / (weights[pair[0]] * np.linalg.norm(a))
        np.testing.assert_allclose(beside, [ratio, cosine(a, b), np.mean(a * b < 0)], rtol=1e-5)
    assert set(report.whole.pairs) == {("text", "action"), ("text", "depth"), ("action", "depth")}
    logged = as_metrics(report)
    for name, (first, second) in (
        ("cosine", ("text", "action")),
        ("cosine_action_depth", ("action", "depth")),
    ):
        want = [cosine(whole[first], g) for g in bins[second]]
        np.testing.assert_allclose(logged[f"diagnostics/{name}_by_time"], want, rtol=1e-5)
    np.testing.assert_allclose(
        logged["diagnostics/action_norm_by_time"], np.linalg.norm(bins["action"], axis=1), rtol=1e-5
    )
    assert set(report.by_time["action"].pairs) == {("text", "action")}


def of(model) -> Objective:
    return Objective(model=model, process=PROCESS, config=OBJECTIVE)


def naive(model, params, data, draws):
    """Each gradient from a forward and a backward pass of its own: other bins' samples are masked."""

    def loss(p, mask, weights):
        masked = data.replace(action_mask=mask)
        objective = of(model)
        counts = objective.counts(masked, draws)
        return objective.losses(p, masked, draws, counts, weights=two(weights[1], weights[0])).total

    gradient = jax.jit(jax.grad(loss))
    bins = np.minimum((np.asarray(draws.terms["action"].t)[:, 0] * BINS).astype(int), BINS - 1)
    masks = [data.action_mask & (bins == i)[:, None, None] for i in range(BINS)]
    share = [float(mask.sum() / data.action_mask.sum()) for mask in masks]
    actions = [gradient(params, mask, jnp.array([0.0, 1.0])) for mask in masks]
    return gradient(params, data.action_mask, jnp.array([1.0, 0.0])), actions, share


def test_real_model_has_the_gradients_of_separate_passes():
    cfg = small.config()
    data = small.batch(cfg, b=6)
    model, params = small.init(cfg, data)
    draws = of(model).draw(jax.random.key(5), data)
    inside = trunk.inside(params, ("backbone",), "trunk")
    weights = two(10.0)

    @jax.jit
    def report_of(p):
        return diagnose(lambda p: of(model).by_time(p, data, draws, bins=BINS), p, inside, weights)

    report = report_of(params)
    text, actions, share = naive(model, params, data, draws)
    chosen = [trunk.chosen(g, inside) for g in (text, *actions)]
    # Keys' biases have no gradient but rounding errors, whose signs are anyone's: a few conflicts more or less.
    hand = by_hand(chosen[0], chosen[1:], share, weights)
    assert difference(report, hand, conflicts=0.05) < 1e-6
    beside = report.whole.pairs["text", "action"]
    assert 0 < beside.conflict < 1 and beside.ratio > 0
    assert set(report.layers) == {
        "backbone/llm/layers", "backbone/llm/embedder", "backbone/llm/final_norm", "backbone/img/embedding",
        "backbone/img/Transformer", "backbone/img/Transformer/encoderblock", "backbone/img/head",
        "backbone/img/pos_embedding",
    }  # fmt: skip
    logged = as_metrics(report)
    assert logged["diagnostics/backbone/llm/layers/cosine"].shape == (2,)
    assert logged["diagnostics/t1/backbone/llm/layers/cosine"].shape == (2,)
    assert logged["diagnostics/cosine_by_time"].shape == (BINS,)
    assert all(value.ndim < 2 for value in logged.values())


MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2)}


def test_eight_devices_find_the_same():
    """A sharded network in a process of its own: the comparison, and policies whose weights come from gradients."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.objectives.test_diagnostics"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("λ on eight devices") < 1e-4
    assert found.keys() == MESHES.keys()
    for mesh, values in found.items():
        assert values["difference"] < 1e-6, mesh
        assert values["weighed"] < 1e-6, mesh
    assert found["2x2x2"]["shard"] * 4 == found["1"]["shard"]


def network():
    """A trunk of three stacked layers with two heads, data, and losses as a mean over the batch, by time."""
    rng = np.random.default_rng(1)

    def random(*shape, scale=0.4):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    params = {
        "backbone": {"layers": {"w": random(3, 16, 16)}, "head": {"w": random(16, 8)}},
        "expert": {"w": random(16, 8)},
    }
    data = {
        "x": random(16, 16, scale=1),
        "text": random(16, 8),
        "action": random(16, 8),
        "t": np.arange(16) % BINS,
    }

    def losses(p, d):
        h = d["x"]
        for i in range(3):
            h = nn.with_logical_constraint(
                jnp.tanh(h @ p["backbone"]["layers"]["w"][i]), ("batch", "act_embed")
            )
        member = jax.nn.one_hot(d["t"], BINS)
        error = jnp.mean((h @ p["expert"]["w"] - d["action"]) ** 2, axis=1)
        text = jnp.mean((h @ p["backbone"]["head"]["w"] - d["text"]) ** 2)
        return two(LossByTime(error @ member / member.sum(0), member.mean(0)), LossByTime(text, jnp.ones(())))

    return params, data, losses


POLICIES = [
    ObjectiveConfig(action_weight=3.0, text_reduction="sum", action_reduction="sum", insulation=0.5),
    ObjectiveConfig(action_weight=0.3, weighting=WeightingConfig(policy="uncertainty")),
    ObjectiveConfig(action_weight=0.3, weighting=WeightingConfig(policy="gradnorm"), action_reduction="sum"),
]


def trained(mesh, accumulate, data):
    """What two steps of each policy leave: losses, weights, λ's own state."""
    found = []
    for objective in POLICIES:
        cfg = toy.config(objective, accumulate=accumulate)
        tx = make_optimizer(cfg.optim, cfg.train.steps)
        step = jax.jit(
            make_train_step(toy.Toy(), toy.Process(), cfg, tx),
            in_shardings=(replicated(mesh), batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        params = toy.params_of()
        state = TrainState(
            step=jnp.int32(0),
            params=params,
            ema=None,
            opt_state=tx.init(params),
            weighting=policy_of(cfg).init(),
        )
        for _ in range(2):
            state, metrics = step(state, to_device(data, batch_sharding(mesh)))
        names = ("loss", "text_loss", "action_loss", "grad_norm", "text_weight", "action_weight")
        found.append(([metrics[name] for name in names], state.weighting))
    return jax.tree.map(np.asarray, found)


def main() -> None:
    """On each mesh: the report against numpy, λ of the gradient ratio, and the gradient that it makes. And training
    with 12 samples on one device, with 4 empty ones on eight, there in two microbatches."""
    params, data, losses = network()
    inside = trunk.inside(params, ("backbone",), "trunk")
    policies = GradientRatio(two(2.0)), PCGrad(two(2.0))
    text, *actions = (
        jax.jit(
            jax.grad(
                lambda p, i=i: jnp.append(losses(p, data)["action"].mean, losses(p, data)["text"].mean)[i]
            )
        )(params)
        for i in (BINS, *range(BINS))
    )
    chosen = [trunk.chosen(g, inside) for g in (text, *actions)]
    hand = by_hand(chosen[0], chosen[1:], np.asarray(losses(params, data)["action"].share), two(2.0))
    places = {
        "backbone": {"layers": {"w": P(None, "fsdp", "tensor")}, "head": {"w": P("fsdp", "tensor")}},
        "expert": {"w": P("fsdp", "tensor")},
    }
    out = {}
    for name, shape in MESHES.items():
        config = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape)))
        mesh = make_mesh(config, jax.devices()[: int(np.prod(shape))])
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)
        placed, batch = jax.device_put(params, shardings), to_device(data, batch_sharding(mesh))

        def weighed(p, d):
            def means(p):
                return {n: jnp.sum(x.share * x.mean) for n, x in losses(p, d).items()}, None

            gradients, _ = per_loss(means, p)
            gram = trunk.gram_matrix(gradients, ("text", "action"), inside)
            weights = [policy.weights(0, policy.init(), gram) for policy in policies]
            return weights, [combine(w, gradients, inside) for w in weights]

        with activate(mesh):
            report = jax.jit(lambda p, d: diagnose(lambda p: losses(p, d), p, inside, two(2.0)))(
                placed, batch
            )
            found = jax.tree.map(np.asarray, jax.jit(weighed)(placed, batch))
        if name == "1":
            first = found
        gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, first)
        shards = placed["backbone"]["layers"]["w"].addressable_shards[0].data.size
        out[name] = {
            "difference": difference(report, hand),
            "weighed": max(jax.tree.leaves(gaps)),
            "shard": shards,
        }
    samples = jax.tree.map(np.asarray, toy.batch_of(12))
    padded = jax.tree.map(lambda x: np.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1)), samples)
    one = trained(make_mesh(MeshConfig(), jax.devices()[:1]), 1, samples)
    eight = trained(make_mesh(MeshConfig(), jax.devices()), 2, padded)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b) / (np.abs(a) + 1e-3)), one, eight)
    out["λ on eight devices"] = max(jax.tree.leaves(gaps))
    json.dump(out, sys.stdout)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"every": -1}, "every=-1"), ({"time_bins": 0}, "time_bins=0"), ({"stride": 0}, "stride=0")],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        DiagnosticsConfig(**values)


if __name__ == "__main__":
    main()
