"""Shapes and dtypes that vla_jax's annotations promise are checked while its tests run: jaxtyping and beartype.

`check_shapes` has every function and dataclass of the listed packages decorated when it is imported. What is checked
are annotations that hold a jaxtyping shape, ``Float[Array, "b k a"]``; plain types are the static type checker's
business (pyproject.toml, [tool.pyright]), which sees more than the paths that tests run through, and costs the tests
nothing.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = (
    "vla_jax.flow", "vla_jax.data", "vla_jax.checkpoint", "vla_jax.sharding", "vla_jax.convert", "vla_jax.train",
    "vla_jax.aot", "vla_jax.lab", "vla_jax.sim", "vla_jax.toy", "vla_jax.cli",
)  # fmt: skip


LETS_WRONG_ONES_IN = {
    "vla_jax.data.schema.Episode.__init__",
    "vla_jax.sim.tabletop.env.TabletopEnv.advance",
    "vla_jax.sim.metaworld.env.MetaWorldEnv.advance",
}
"""What users give, and the library checks with errors of its own, which tests provoke."""


def check_shapes() -> None:
    """To be called before the first import of vla_jax."""
    install_import_hook(PACKAGES, "tests.shapes.checked")


def has_shape(annotation: Any) -> bool:
    """Whether a jaxtyping shape is part of an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(has_shape(part) for part in typing.get_args(annotation))


def widened(annotation: Any) -> Any:
    """The same where NumPy's arrays do for JAX's, as they do for JAX's functions: shapes and types are checked."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        if annotation.array_type is not jax.Array:
            return annotation
        return annotation.dtype[jax.Array | np.ndarray, annotation.dim_str]
    args = tuple(widened(part) if has_shape(part) else part for part in typing.get_args(annotation))
    if args == typing.get_args(annotation):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.Union[args]  # noqa: UP007
    return (
        annotation.copy_with(args)
        if hasattr(annotation, "copy_with")
        else typing.get_origin(annotation)[args]
    )


def checked(function: Callable) -> Callable:
    """The typechecker that jaxtyping calls: beartype, of those annotations that hold shapes."""
    from beartype import BeartypeConf, beartype

    kept = {name: widened(hint) for name, hint in function.__annotations__.items() if has_shape(hint)}
    if not kept or f"{function.__module__}.{function.__qualname__}" in LETS_WRONG_ONES_IN:
        return function
    function.__annotations__ = kept
    checking = beartype(function, conf=BeartypeConf(is_pep484_tower=True))
    if function.__name__ != "__init__":
        return checking

    @functools.wraps(function)
    def of_a_dataclass(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) if is_pytree(self) else checking(self, *args, **kwargs)

    return of_a_dataclass


def is_pytree(instance: Any) -> bool:
    """Whether JAX takes a class apart: then it also builds it, around shapes, shardings, or arrays of more axes."""
    import jax

    try:
        return jax.tree_util.default_registry.flatten_one_level(instance) is not None
    except AttributeError:  # it has no fields yet
        return True
