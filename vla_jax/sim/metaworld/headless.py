"""A working headless OpenGL, or one clear error.

A back end that fails to load leaves its traces in the process, so candidates are tried in a short-lived child
process. mujoco itself reads ``MUJOCO_GL`` only when it is first imported, which may have happened before; so the
back end is imported by its name.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

_CANDIDATES = ("egl", "osmesa")
_PROBE = "from mujoco.gl_context import GLContext; c = GLContext(8, 8); c.make_current(); c.free()"


def prepare() -> None:
    """Makes sure that metaworld can be imported and will render, without importing it.

    Sets ``MUJOCO_GL`` (child processes inherit it) where it is unset on Linux; elsewhere mujoco's own default
    needs no display. Raises OSError if the extra is not installed or nothing can render.
    """
    if importlib.util.find_spec("metaworld") is None:
        raise OSError("MetaWorld is not installed: pip install -e '.[sim]'")
    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = choose_backend()


def load_mujoco() -> ModuleType:
    """The mujoco package, after `prepare`. Raises OSError if the ``MUJOCO_GL`` that the user set does not work."""
    prepare()
    try:
        return importlib.import_module("mujoco")
    except Exception as error:  # the back ends raise whatever their bindings raise
        chosen = os.environ.get("MUJOCO_GL")
        raise OSError(f"mujoco cannot be imported with MUJOCO_GL={chosen}: {error}; unset it") from error


def make_context(size: int) -> Any:
    """An OpenGL context for pictures of up to size × size pixels; call `load_mujoco` first. Raises OSError."""
    backend = os.environ.get("MUJOCO_GL", "").lower()
    module = f"mujoco.{backend}" if backend in _CANDIDATES else "mujoco.gl_context"
    try:
        context = importlib.import_module(module).GLContext(size, size)
        context.make_current()
    except Exception as error:
        raise OSError(f"cannot make an OpenGL context: {error}; try MUJOCO_GL=egl or osmesa") from error
    return context


def choose_backend() -> str:
    """``egl`` or ``osmesa``: the first in which a child process gets an OpenGL context. Raises OSError."""
    for name in _CANDIDATES:
        environment = os.environ | {"MUJOCO_GL": name}
        environment.pop("PYOPENGL_PLATFORM", None)
        child = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=120, check=False
        )
        if child.returncode == 0:
            return name
    raise OSError(
        "no headless OpenGL: neither MUJOCO_GL=egl nor osmesa works; install Mesa (libegl1 or libosmesa6)"
    )
