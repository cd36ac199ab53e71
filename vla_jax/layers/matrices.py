"""Which axes of a parameter are a matrix: that cannot be seen from its shape; the names say it."""

from typing import NamedTuple


class MatrixAxes(NamedTuple):
    """Input and output axes, counted from behind; all axes before them are batches of matrices (layers, k and v)."""

    into: tuple[int, ...]
    outof: tuple[int, ...]


AXES: tuple[tuple[str, MatrixAxes], ...] = (
    ("q_einsum/w", MatrixAxes((-2,), (-3, -1))),  # layers n d e
    ("kv_einsum/w", MatrixAxes((-2,), (-3, -1))),  # layers 2 m d e
    ("attn_vec_einsum/w", MatrixAxes((-3, -2), (-1,))),  # layers n e d
    ("query/kernel", MatrixAxes((-3,), (-2, -1))),  # layers d n e
    ("key/kernel", MatrixAxes((-3,), (-2, -1))),
    ("value/kernel", MatrixAxes((-3,), (-2, -1))),
    ("out/kernel", MatrixAxes((-3, -2), (-1,))),  # layers n e d
    ("embedding/kernel", MatrixAxes((-4, -3, -2), (-1,))),  # patch patch channels d
    ("gating_einsum", MatrixAxes((-2,), (-1,))),  # layers 2 d f
    ("linear", MatrixAxes((-2,), (-1,))),  # layers f d
    ("kernel", MatrixAxes((-2,), (-1,))),
)
"""By the end of a parameter's path; the first that fits."""


def matrix_axes(name: str) -> MatrixAxes | None:
    """The axes of the parameter at path `name` (``backbone/llm/…``); None where it is no matrix."""
    return next((axes for ending, axes in AXES if f"/{name}".endswith(f"/{ending}")), None)
