"""A policy of random parameters with real transforms: what a benchmark needs of a model that nobody has trained."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.config import TrainConfig, prompt_form
from vla_jax.data import transforms as tf
from vla_jax.data.bundle import DataBundle
from vla_jax.data.normalize import Normalize
from vla_jax.data.prompt_forms import Prompt
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.statistics import FieldStatistics, Statistics
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.models.config import VLAConfig
from vla_jax.models.vla import VLA
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation, PyTree

PROMPT = "pick up the red cup and put it on the blue plate"
"""15 tokens with begin and separator."""


def random_policy(
    base: TrainConfig,
    *,
    cameras: int,
    seed: int = 0,
    text_tokens: int | None = None,
    batch_size: int = 32,
    host: bool = False,
) -> Policy:
    """A policy of the configured model; sizes left to the data set become π0's (32 dimensions).

    The model gets `cameras` cameras. Where the expert has no state token the prompt tells the state (π0.5), which takes
    some 140 tokens of openpi's 200. Parameters are normal of variance 1/fan-in, biases and scales small but not zero,
    so that no rewrite can hide behind a zero; with `host` they lie in the host's memory (`Policy.on_host`).
    """
    expert = base.model.expert
    dims = (expert.state_dim or 32, expert.action_dim or 32)
    names = (*base.model.cameras, *(f"camera{i}" for i in range(cameras)))[:cameras]
    prompt = Prompt(form="paligemma" if expert.reads_state else prompt_form(base.model))
    data = dataclasses.replace(
        base.data,
        image_size=base.model.backbone.image_size,
        prompt=prompt.form,
        ignore_state=False,
        max_text_tokens=text_tokens or (200 if prompt.uses_state else base.data.max_text_tokens),
    )
    bundle = _bundle(names, *dims, data.image_size, data.max_text_tokens, prompt)
    model = dataclasses.replace(base.model, cameras=names)
    config = dataclasses.replace(base, model=model, data=data).resolve(
        cameras=names, state_dim=dims[0], action_dim=dims[1], vocab=bundle.tokenizer.vocab_size
    )
    params = random_params(config.model, bundle, seed, host=host)
    return Policy(config=config, bundle=bundle, params=params, step=0, batch_size=batch_size)


def random_params(model: VLAConfig, bundle: DataBundle, seed: int, *, host: bool = False) -> PyTree:
    """Parameters by shape and name alone. `host`: each leaves the device as soon as it is drawn."""
    batch = bundle.observation_batch(observe(bundle, 1, seed=0))
    noise = jnp.zeros((1, model.expert.horizon, model.expert.action_dim))
    shapes = nn.meta.unbox(
        jax.eval_shape(VLA(model).init, jax.random.key(0), batch, noise, jnp.zeros(1))["params"]
    )
    key = jax.random.key(seed)

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        draw = jax.random.fold_in(key, hash_of(name))
        if name.endswith(("'bias']", "'scale']")):
            return 0.02 * jax.random.normal(draw, leaf.shape)
        contracted = {
            "q_einsum": leaf.shape[-2:-1],
            "kv_einsum": leaf.shape[-2:-1],
            "attn_vec": leaf.shape[-3:-1],
        }
        inputs = next((axes for part, axes in contracted.items() if part in name), leaf.shape[-2:-1])
        if "MultiHead" in name:
            inputs = leaf.shape[1:-1] if "'out'" in name else leaf.shape[1:2]
        elif "embedding']['kernel" in name:
            inputs = leaf.shape[:-1]
        elif "input_embedding" in name:
            inputs = leaf.shape[-1:]
        return jax.random.normal(draw, leaf.shape) * float(np.prod(inputs)) ** -0.5

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
        return np.asarray(make(path, leaf)) if host else make(path, leaf)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process."""
    return int.from_bytes(name.encode()[-64:], "little") % (2**31 - 1)


def observe(bundle: DataBundle, robots: int, *, seed: int, cameras: int | None = None) -> Observation:
    """Random pictures from the first so many cameras (default: all), random states, one prompt."""
    rng = np.random.default_rng(seed)
    names = tuple(bundle.sources.values())[:cameras]
    prompt = next(iter(bundle.normalize.task_of), PROMPT)
    statistics = next(iter(bundle.normalize.statistics.values())).state
    state = rng.normal(statistics.mean, statistics.std, (robots, len(bundle.schema.state_names)))
    return Observation(
        images={
            name: rng.integers(0, 256, (robots, *bundle.schema.cameras[name], 3), dtype=np.uint8)
            for name in names
        }
        | dict.fromkeys(tuple(bundle.sources.values())[len(names) :]),
        state=state.astype(np.float32),
        instruction=(prompt,) * robots,
    )


def _bundle(
    cameras: tuple[str, ...], state: int, action: int, image: int, text_tokens: int, prompt: Prompt
) -> DataBundle:
    schema = DatasetSchema(
        name="random",
        robot="random",
        cameras={camera: (image, image) for camera in cameras},
        state_names=tuple(f"q{i}" for i in range(state)),
        action_names=tuple(f"v{i}" for i in range(action)),
        control_hz=50.0,
    )

    def field(dims: int) -> FieldStatistics:
        return FieldStatistics(
            mean=(0.1,) * dims, std=(0.5,) * dims, min=(-2.0,) * dims, max=(2.0,) * dims,
            q01=(-1.0,) * dims, q99=(1.0,) * dims, count=100,
        )  # fmt: skip

    statistics = Statistics(state=field(state), action=field(action))
    tokenizer = train_tokenizer(tuple(prompt.training_texts([PROMPT], state)), 384)
    transforms = (
        tf.SelectCameras(dict(schema.cameras)),
        tf.ResizeImages(image, image),
        Normalize(method="zscore", group="dataset", statistics={"": statistics}),
        tf.Tokenize(tokenizer, text_tokens, min(24, text_tokens), prompt),
        tf.PadDims(state_dim=state, action_dim=action, robot_action_dim=action),
    )
    return DataBundle(schema=schema, transforms=transforms)
