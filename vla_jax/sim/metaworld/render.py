"""Pictures of many simulations from one OpenGL context.

Two traps shape this file. A second OpenGL context in a process may come back black, so there is one, with one
`MjrContext` (textures, meshes) per model. And making an `MjrContext` rebinds the frame buffer behind the back
of the others, so the buffer is bound again before every picture.
"""

import atexit
import weakref
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vla_jax.sim.metaworld.headless import load_mujoco, make_context

CAMERA = "corner2"
CAMERA_POSITION_M = (0.75, 0.075, 0.7)
_MIN_RENDER = 192  # pixels; smaller is hardly faster and aliases two-pixel goals away


def render_scale(image_size: int) -> int:
    """How many rendered pixels are averaged into one, along each axis: at least 192 are rendered, about."""
    return max(1, round(_MIN_RENDER / image_size))


def area_average(image: UInt8[np.ndarray, "hs ws 3"], scale: int) -> UInt8[np.ndarray, "h w 3"]:
    """Means over scale × scale blocks, rounded to nearest."""
    h, w, _ = image.shape
    blocks = image.reshape(h // scale, scale, w // scale, scale, 3).astype(np.uint32)
    return ((blocks.sum((1, 3)) + scale * scale // 2) // (scale * scale)).astype(np.uint8)


class Renderer:
    """Renders any number of models, without shadows, reflections and multisampling (20 times faster)."""

    def __init__(self, image_size: int):
        mujoco = load_mujoco()
        self._mj = mujoco
        self._scale = render_scale(image_size)
        self._size = image_size * self._scale
        self._gl = make_context(self._size)
        self._rect = mujoco.MjrRect(0, 0, self._size, self._size)
        self._option, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._models: dict[str, tuple[Any, Any, Any, Any]] = {}
        # At exit, OpenGL must be freed before the bindings end EGL, which they do in an atexit handler of their
        # own: registered earlier, it runs later.
        self._free = weakref.finalize(self, _free, self._gl, self._models)
        self._free.atexit = False
        atexit.register(self._free)

    def add_model(self, name: str, model: Any) -> None:
        """Uploads a task's meshes and textures. Its `MjData` may come from any model of the same file."""
        mj = self._mj
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = self._size
        self._gl.make_current()
        try:
            context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_100.value)
        except mj.FatalError as error:
            raise OSError(f"OpenGL does not work: {error}; try MUJOCO_GL=egl or osmesa") from error
        scene = mj.MjvScene(model, 1000)
        scene.flags[mj.mjtRndFlag.mjRND_SHADOW] = 0
        scene.flags[mj.mjtRndFlag.mjRND_REFLECTION] = 0
        camera = mj.MjvCamera()
        camera.type, camera.fixedcamid = mj.mjtCamera.mjCAMERA_FIXED, model.camera(CAMERA).id
        self._models[name] = (model, context, scene, camera)

    def has_model(self, name: str) -> bool:
        """Whether `add_model` was called for `name`."""
        return name in self._models

    def picture(self, name: str, data: Any) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of one simulation as LeRobot shows it: the upright image flipped on both axes.

        OpenGL's rows come bottom first, which is the vertical flip already; the horizontal one is left.
        """
        mj = self._mj
        model, context, scene, camera = self._models[name]
        self._gl.make_current()
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN.value, context)
        every = mj.mjtCatBit.mjCAT_ALL.value
        mj.mjv_updateScene(model, data, self._option, self._perturbation, camera, every, scene)
        mj.mjr_render(self._rect, scene, context)
        pixels = np.empty((self._size, self._size, 3), np.uint8)
        mj.mjr_readPixels(pixels, None, self._rect, context)
        if pixels.min() == pixels.max():
            raise OSError(f"OpenGL returned a blank picture of {name}; try another MUJOCO_GL (egl or osmesa)")
        return area_average(pixels[:, ::-1], self._scale)

    def close(self) -> None:
        """Frees the OpenGL resources. The renderer can't be used afterwards."""
        self._free()


def _free(gl: Any, models: dict[str, tuple[Any, Any, Any, Any]]) -> None:
    gl.make_current()
    for _, context, _, _ in models.values():
        context.free()
    models.clear()
    gl.free()
