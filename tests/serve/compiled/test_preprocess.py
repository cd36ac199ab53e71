import jax
import numpy as np
import pytest

from vla_jax.data.normalize import Normalize
from vla_jax.data.sample import Sample
from vla_jax.data.statistics import FieldStatistics, Statistics
from vla_jax.data.transforms import ResizeImages
from vla_jax.serve.compiled import preprocess


@pytest.mark.parametrize("fit", ["exact", "openpi"])
@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((48, 64), (24, 24)),
        ((64, 48), (24, 24)),
        ((17, 90), (32, 16)),
        ((10, 7), (33, 40)),
        ((32, 64), (16, 32)),
        ((18, 9), (14, 14)),  # in floating point, 13 pixels high
    ],
)
def test_resizing_is_trainings_to_the_bit(size, out, fit):
    """Pillow on the host, integers on the device; smooth pictures, noise, and the extremes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    steps = np.where(rng.random((1, *size, 3)) < 0.5, 0, 255).astype(np.uint8)
    images = np.concatenate([noise, steps, np.full((1, *size, 3), 255, np.uint8)])
    resize = ResizeImages(*out, fit=fit)
    found = jax.jit(preprocess.resize_with_pad, static_argnums=1)(images, resize)
    np.testing.assert_array_equal(found, np.stack([resize.resize(image) for image in images]))


@pytest.mark.parametrize("method", ["zscore", "quantile"])
def test_state_and_actions_as_in_training_even_far_from_zero(method):
    rng = np.random.default_rng(0)

    def statistics(offset):
        x = offset + rng.normal(size=(100, 3)) * [1e-3, 1.0, 0.0]
        field = FieldStatistics(
            mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0),
            q01=np.quantile(x, 0.01, 0), q99=np.quantile(x, 0.99, 0), count=100,
        )  # fmt: skip
        return Statistics(state=field, action=field)

    normalize = Normalize(
        method=method,
        group="task",
        statistics={"a": statistics(0.1), "b": statistics(1000.3)},
        task_of={"do a": "a", "do b": "b"},
    )
    scaling = preprocess.scaling_of(_Bundle(normalize))
    assert scaling.groups == ("a", "b")
    state = np.stack([0.1 + 1e-3 * rng.normal(size=3), 1000.3 + 1e-3 * rng.normal(size=3)]).astype(np.float32)
    samples = [Sample(images={}, state=row, instruction=f"do {name}") for row, name in zip(state, "ab")]
    group = np.arange(2)
    expected = np.stack([normalize.inputs(sample).state for sample in samples])
    found = jax.jit(preprocess.normalize_state)(scaling.state, group, state)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)

    chunks = rng.normal(size=(2, 1, 4, 5)).astype(np.float32)
    expected = [
        normalize.outputs(sample.replace(actions=chunk[..., :3])).actions
        for sample, chunk in zip(samples, chunks)
    ]
    found = jax.jit(preprocess.robot_actions)(scaling.action, group, chunks)
    np.testing.assert_allclose(found, expected, rtol=2e-7)


class _Bundle:
    """Only what `scaling_of` reads."""

    def __init__(self, normalize: Normalize):
        self.normalize = normalize
        self.transforms = tuple(
            normalize if kind is Normalize else object.__new__(kind) for kind in preprocess.ORDER
        )
        object.__setattr__(self.transforms[1], "height", 8)
        object.__setattr__(self.transforms[1], "width", 8)


def test_transforms_that_have_no_compiled_form_are_refused():
    bundle = _Bundle(Normalize("zscore", "dataset", {"": Statistics(state=_FIELD, action=_FIELD)}))
    bundle.transforms = bundle.transforms[1:]
    with pytest.raises(ValueError, match=r"only SelectCameras, ResizeImages, .* can be compiled"):
        preprocess.scaling_of(bundle)


_FIELD = FieldStatistics(mean=[0.0], std=[1.0], min=[-1.0], max=[1.0], q01=[-1.0], q99=[1.0], count=9)
