"""Pictures against a supersampled reference that only knows what is inside of what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.sim.tabletop import TabletopConfig, render
from vla_jax.sim.tabletop.world import COLOURS, initial_state, sample_scene

CONFIG = TabletopConfig()


def reference(scene, position, opening, centre, window, samples=12):
    """Paints points on a grid finer by `samples`, one thing over the other, then averages."""
    n = CONFIG.image_size * samples
    offsets = (np.arange(n) + 0.5 - n / 2) * window / n
    x, y = np.meshgrid(centre[0] + offsets, centre[1] - offsets)
    image = np.empty((n, n, 3))
    image[:] = render.OUTSIDE
    image[(x > 0) & (x < CONFIG.table_m) & (y > 0) & (y < CONFIG.table_m)] = render.TABLE

    def within(middle, radius):
        return (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2

    image[within(scene.obstacle, scene.obstacle_radius)] = render.OBSTACLE
    for middle, colour, shape in zip(scene.objects, scene.colours, scene.shapes):
        paint = np.array(render.PALETTE[COLOURS[colour]], float)
        if shape == 0:
            image[np.maximum(abs(x - middle[0]), abs(y - middle[1])) < render.BLOCK_HALF_M] = paint
        elif shape == 1:
            image[within(middle, render.CUP_RADIUS_M) & ~within(middle, render.CUP_HOLE_M)] = paint
        else:
            image[within(middle, render.BALL_RADIUS_M)] = paint
            spot = middle + render.SHINE_OFFSET_M * np.array([-1, 1])
            image[within(spot, render.SHINE_RADIUS_M)] = paint + render.SHINE_OPACITY * (255 - paint)
    image[within(position, CONFIG.gripper_radius_m + render.GRIPPER_EDGE_M)] = render.OUTLINE
    core = np.array(render.GRIPPER_OPEN) * opening + np.array(render.GRIPPER_CLOSED) * (1 - opening)
    image[within(position, CONFIG.gripper_radius_m - render.GRIPPER_EDGE_M / 2)] = core
    return image.reshape(CONFIG.image_size, samples, CONFIG.image_size, samples, 3).mean((1, 3))


def a_scene(seed):
    return sample_scene(CONFIG, jax.random.key(seed), jnp.array(seed % 3))


def pictures(scene, state):
    return render.to_images(jax.jit(render.render, static_argnums=0)(CONFIG, scene, state))


@pytest.mark.parametrize("seed", range(4))
def test_both_cameras_against_supersampling(seed):
    rng = np.random.default_rng(seed)
    scene = a_scene(seed)
    position, opening = rng.uniform(0.05, 0.6, 2).astype(np.float32), np.float32(rng.uniform())
    state = dataclasses.replace(
        initial_state(scene), position=jnp.asarray(position), opening=jnp.asarray(opening)
    )
    host = jax.tree.map(np.asarray, scene)
    images = pictures(scene, state)
    views = {"top": ((0.32, 0.32), CONFIG.table_m), "wrist": (position, CONFIG.wrist_window_m)}
    for name, (centre, window) in views.items():
        image = images[name]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        error = np.abs(image - reference(host, position, opening, centre, window)).max(-1)
        assert error.mean() < 0.6 and np.quantile(error, 0.99) < 12 and error.max() < 45, name


def test_far_is_up_and_left_is_left():
    scene = a_scene(0)
    state = dataclasses.replace(initial_state(scene), position=jnp.array([0.055, 0.045]))
    top = pictures(scene, state)["top"]
    assert (top[59, 5] == 255).all(), "the gripper's white core is at the lower left"


def test_a_closed_gripper_looks_different_in_both_cameras():
    scene = a_scene(1)
    opened = initial_state(scene)
    closed = dataclasses.replace(opened, opening=jnp.zeros(()))
    before, after = pictures(scene, opened), pictures(scene, closed)
    for name, pixels in (("top", 4), ("wrist", 50)):
        changed = np.abs(before[name].astype(int) - after[name]).max(-1) > 100
        assert changed.sum() >= pixels
