"""Every public function of the library under jit, vmap and grad, in float64 and bfloat16.

A walk over the package compares its public functions with the table below, so that a new one must be added: either
with a case, or to HOST, the functions of plain Python values that never see a traced array. A case is a function of
x [4 3]; it is compiled once with its vmap and its gradient, which is compared with a central difference.
"""

import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vla_jax.flow
from tests.flow.conftest import ALL, name, normal
from vla_jax.flow import (
    base,
    couplings,
    guidance,
    likelihood,
    masked,
    meanflow,
    metrics,
    predictions,
    transform,
)
from vla_jax.flow.adaptive import integrate_adaptive
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.paths import AffinePath, align
from vla_jax.flow.processes import Flow, Regression
from vla_jax.flow.schedules import VP, CondOT, Cosine, Schedule
from vla_jax.flow.solvers import integrate, time_grid
from vla_jax.flow.step_schedules import CosineSteps
from vla_jax.flow.times import Beta, LogitNormal, TimeSampler, Uniform

HOST = {
    "config.require", "config.check", "config.check_diffusion", "couplings.exact_pairs", "diffusion.Diffusion.grid",
    "paths.time_dtype", "predictions.undefined", "processes.make_process", "processes.make_schedule",
    "processes.make_times", "solvers.stage_times", "solvers.time_grid", "step_schedules.StepSchedule.betas",
    "step_schedules.StepSchedule.log_alpha_bar", "step_schedules.LinearSteps.betas",
    "step_schedules.CosineSteps.betas", "stop_early.StopEarly.adapt_step_size",
}  # fmt: skip

KEY = jax.random.key(0)
T = np.linspace(0.1, 0.9, 4)
EULER = SolverConfig(num_steps=2)
ENDS = np.array([0.0, 1.0])


def times(x):
    return jnp.asarray(T, jnp.promote_types(x.dtype, jnp.float32))


def field(x, t):
    return jnp.tanh(x) * (1 + align(t, x)).astype(x.dtype)


def conditional(x, t, c):
    return field(x + c, t)


def interval_field(x, t, s):
    return field(x, t) * align(jnp.cos(s), x).astype(x.dtype)


def mixture(x):
    """Of two bumps that `x` moves, asked at x: every method at once."""
    g = GaussianMixture(weights=jnp.array([0.4, 0.6], x.dtype), means=x[:2], stds=jnp.abs(x[2:]) + 0.5)
    t = times(x)
    asked = ("log_posterior", "eps", "velocity", "divergence")  # these call the others
    return [getattr(g, f)(x, t) for f in asked] + [g.sample(KEY, 3)]


def process(p):
    """corrupt, loss and sample."""

    def run(x):
        c = p.corrupt(KEY, x)
        solver = SolverConfig(method="ddim", num_steps=2) if isinstance(p, Diffusion) else EULER
        start = {} if isinstance(p, Regression) else {"noise": x}
        return (
            c,
            p.loss(field(c.x_t, c.t), c.target),
            p.sample(field, KEY, x.shape, solver, dtype=x.dtype, **start).x,
        )

    return run


def diffusion_methods(x):
    p = Diffusion(schedule=VP(), prediction="v", clip=1.0)
    samples = [
        p.sample(field, KEY, x.shape, SolverConfig(method=m, num_steps=2), noise=x).x
        for m in ("sde", "midpoint")
    ]
    return samples, p.data_and_noise(field, x, times(x))


def conversions(x):
    kinds, t = typing.get_args(predictions.Kind), times(x)
    pair = predictions.data_and_noise(Cosine(), "velocity", x, x + 1, t)
    targets = [predictions.from_data_and_noise(Cosine(), k, *pair, t) for k in kinds]
    return targets, [
        predictions.convert(Cosine(), a, b, x, x + 1, t) for a, b in zip(kinds, kinds[1:] + kinds[:1])
    ]


def mean_flow(x):
    p = meanflow.MeanFlow()
    c = p.corrupt(KEY, x)
    return c, p.loss(interval_field, c), p.sample(interval_field, KEY, x.shape, num_steps=2, noise=x).x


def masked_loss(x):
    p = masked.MaskedProcess(vocabulary=3)
    c = p.corrupt(KEY, jnp.array([0, 2, 1, 1]), t=jnp.asarray(T))
    logits = lambda tokens, t: x + 0 * tokens[..., None]  # noqa: E731
    return p.loss(x, c), p.sample(logits, KEY, (4,), 2)


CASES = {
    ("oracle.GaussianMixture",): mixture,
    ("paths.AffinePath", "paths.align"): lambda x: AffinePath(Cosine()).sample(x, x[::-1], times(x)),
    ("base.noise_and_time", "base.start", "processes.Flow"): process(Flow()),
    ("base.normal", "base.split"): lambda x: x * base.normal(base.split(KEY, 2), x.shape, x.dtype),
    ("processes.Regression", "base.elementwise"): process(Regression(criterion="l1")),
    ("diffusion.Diffusion",): process(Diffusion(schedule=CosineSteps(20))),
    ("diffusion.Diffusion.data_and_noise",): diffusion_methods,
    ("predictions.convert", "predictions.data_and_noise", "predictions.from_data_and_noise"): conversions,
    ("meanflow.MeanFlow",): mean_flow,
    ("meanflow.mean_velocity_target",): lambda x: meanflow.mean_velocity_target(
        interval_field, meanflow.MeanFlow().corrupt(KEY, x)
    ),
    ("masked.MaskedProcess",): masked_loss,
    ("solvers.integrate",): lambda x: integrate(
        field, x, time_grid("edm", 3), method="heun", intermediates=True
    ),
    ("adaptive.integrate_adaptive",): lambda x: integrate_adaptive(
        field, x, np.array([0.0, 1.0]), rtol=1e-2, atol=1e-2
    ),
    ("base.solve",): lambda x: base.solve(field, x, SolverConfig(method="heun3", num_steps=2)).x,
    ("couplings.squared_cost", "couplings.sinkhorn_plan"): lambda x: couplings.sinkhorn_plan(
        couplings.squared_cost(x, x[::-1] + 1), epsilon=0.5, iterations=5
    ),
    ("couplings.condition_cost",): lambda x: couplings.condition_cost(x, 2.0),
    ("couplings.sinkhorn_pairs",): lambda x: x[couplings.sinkhorn_pairs(x, x[::-1] + 1, iterations=5)],
    ("guidance.classifier_free", "guidance.drop_condition"): lambda x: guidance.classifier_free(
        conditional,
        guidance.drop_condition(KEY, x[::-1], 0 * x[0], 0.5),
        0 * x[0],
        2.0,
        interval=(0.2, 1),
        zero_star=True,
    )(x, times(x)),
    ("guidance.autoguidance",): lambda x: guidance.autoguidance(field, lambda x, t: 0.5 * x, 2.0)(
        x, times(x)
    ),
    ("guidance.classifier",): lambda x: guidance.classifier(
        field, lambda x, t: -(x**2).sum(-1) * t.astype(x.dtype), 1.5, schedule=CondOT()
    )(x, times(x)),
    ("guidance.inpaint",): lambda x: guidance.inpaint(field, 2 * x, x > 0, x[::-1], CondOT())(x, times(x)),
    ("guidance.soft_inpaint",): lambda x: guidance.soft_inpaint(field, 2 * x, jnp.ones_like(x))(x, times(x)),
    ("guidance.mix",): lambda x: guidance.mix(x, jnp.tanh(x[::-1]), 2.0),
    ("guidance.soft_weights",): lambda x: guidance.soft_weights(len(x), 1, 3).astype(x.dtype)[:, None] * x,
    ("guidance.clean_prefix",): lambda x: guidance.clean_prefix(
        field, 2 * x[..., None], (jnp.arange(x.shape[1]) < 1)[None, :, None].repeat(len(x), 0)
    )(x[..., None], times(x)),
    ("likelihood.exact_divergence",): lambda x: likelihood.exact_divergence(
        field, x, times(x), jnp.ones(x.shape, bool)
    ),
    ("likelihood.hutchinson_divergence",): lambda x: likelihood.hutchinson_divergence(
        field, x, times(x), jnp.ones((2, *x.shape), x.dtype)
    ),
    ("likelihood.log_likelihood",): lambda x: likelihood.log_likelihood(field, x, EULER),
    ("metrics.straightness",): lambda x: metrics.straightness(
        jnp.stack([x, x[::-1], x + 1]), jnp.array([0, 0.4, 1], x.dtype)
    ),
    ("metrics.energy_distance",): lambda x: metrics.energy_distance(x, 2 * x[::-1] + 1),
    ("transform.change_schedule",): lambda x: transform.change_schedule(field, CondOT(), Cosine())(
        x, times(x)
    ),
    ("times.Uniform", "times.Beta", "times.LogitNormal", "times.TimeSampler"): lambda x: (
        [law.quantile(jax.nn.sigmoid(x)) for law in (Uniform(), Beta(), LogitNormal())]
        + [TimeSampler(law=Beta(), stratified=True)(KEY, 4) * x[:, 0]]
    ),
}


def schedule_case(schedule):
    """Every method of a schedule, at times strictly between the ends (of a table: between its steps)."""
    methods = [m for m in vars(Schedule) if not m.startswith("_") and inspect.isfunction(vars(Schedule)[m])]
    methods = [m for m in methods if m not in ("inverse_log_snr", "pair_of_velocity")]
    methods += [m for m in ("variance", "integral", "snap") if hasattr(schedule, m)]

    def run(x):
        t = (0.503 + 0.3 * jnp.tanh(x)).astype(jnp.promote_types(x.dtype, jnp.float32))
        values = [getattr(schedule, m)(t) for m in methods]
        return values, schedule.inverse_log_snr(t - 0.5), schedule.pair_of_velocity(x, x + 1, t)

    return run


SCHEDULES = {name(s): schedule_case(s) for s in ALL}


def public():
    """Dotted names of public functions, and of the public methods that classes define themselves."""
    found = {}
    for info in pkgutil.iter_modules(vla_jax.flow.__path__):
        module = importlib.import_module(f"vla_jax.flow.{info.name}")
        for key, value in vars(module).items():
            if key.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value):
                methods = {
                    k: v for k, v in vars(value).items() if inspect.isfunction(v) and not k.startswith("_")
                }
                found |= {f"{info.name}.{key}.{k}": v for k, v in methods.items()}
            elif inspect.isfunction(value):
                found[f"{info.name}.{key}"] = value
    return found


def test_every_public_function_is_here():
    """A name in the table stands for a function, or for all methods of a class that are not named themselves."""
    covered = {entry for names in CASES for entry in names} | HOST
    classes = {f"{type(s).__module__.split('.')[-1]}.{c.__name__}" for s in ALL for c in type(s).__mro__}
    classes |= {"schedules.Schedule", "schedules.VariancePreserving", "step_schedules.StepSchedule"}
    classes |= {c for c in covered if c.count(".") == 1 and c.split(".")[1][0].isupper()}
    missing = {f for f in public() if f not in covered and f.rpartition(".")[0] not in classes}
    assert not missing
    assert {c for c in covered if c.count(".") == 2} <= set(public())


@pytest.mark.parametrize("function", public().values(), ids=public())
def test_signatures_and_docstrings(function):
    """Shapes in every signature, and a docstring."""
    inner = inspect.unwrap(function)
    hints = {p: v.annotation for p, v in inspect.signature(inner).parameters.items() if p != "self"}
    assert inspect.getdoc(inner)
    assert inspect.Parameter.empty not in hints.values()
    assert inspect.signature(inner).return_annotation is not inspect.Signature.empty


IDS = [*(names[0] for names in CASES), *SCHEDULES]
STOPPED = (
    "meanflow.MeanFlow",
    "meanflow.mean_velocity_target",
)  # part of the gradient is held back on purpose


@pytest.mark.parametrize(("label", "case"), [*zip(IDS, [*CASES.values(), *SCHEDULES.values()])], ids=IDS)
def test_jit_vmap_grad(label, case):
    """vmap = one by one; gradient = central difference; in bfloat16 everything is finite and keeps its dtype."""
    x, direction = 0.3 * normal(0, (4, 3)) + 0.4, normal(1, (4, 3))
    xs = jnp.stack([x, x + 1e-5 * direction, x - 1e-5 * direction])

    def floats(x):
        return [y for y in jax.tree.leaves(case(x)) if jnp.issubdtype(y.dtype, jnp.floating)]

    def total(x):
        values = floats(x)
        return sum(jnp.sum(y.astype(jnp.promote_types(y.dtype, jnp.float32))) for y in values), values

    @jax.jit
    def run(xs, half):
        gradient, values = jax.grad(total, has_aux=True)(xs[0])
        return gradient, values, jax.vmap(floats)(xs), jax.grad(total, has_aux=True)(half)

    gradient, values, rows, (half, half_values) = jax.device_get(run(xs, x.astype(jnp.bfloat16)))
    for value, row in zip(values, rows):
        np.testing.assert_allclose(row[0], value, rtol=1e-9, atol=1e-12)
    for value in (gradient, half, *values, *half_values):
        assert np.isfinite(value.astype(np.float64)).all()
    assert half.dtype == jnp.bfloat16
    if label not in STOPPED:
        up, down = (sum(row[i].sum() for row in rows) for i in (1, 2))
        np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-4, atol=1e-6)
