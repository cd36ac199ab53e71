"""Exports of a policy whose padded action dims were zeros: they are made silent for samplers that put noise there.

openpi, LeRobot and transformers draw noise in all dims of the model. Ours with `expert.padding="zero"` has never seen
any in the dims that its robot lacks, so what multiplies them is as it was drawn, or of another robot. Zeros in the rows
of `action_in_proj` keep the noise from the network. Zeros in the columns of `action_out_proj` keep those dims
from following the others, which guidance of the whole chunk (real-time chunking) would turn back on them.
"""

import numpy as np

from vla_jax.convert.entry import ArraySource, Index
from vla_jax.convert.run import RunSource

AXES = {
    "expert/action_in_proj/kernel": 0,
    "expert/action_out_proj/kernel": 1,
    "expert/action_out_proj/bias": 0,
}
"""The axis of action dims in each array that has one."""


def padded_dims(run: RunSource) -> range:
    """The action dims that this run was never trained on; none where noise was there, or no robot is known."""
    expert, data = run.model.expert, run.meta.get("data")
    if not run.expert or expert.padding == "noise" or data is None:
        return range(0)
    return range(len(data["schema"]["action_names"]), expert.action_dim)


class Silenced:
    """The arrays of a run, with zeros for some of the action dims."""

    def __init__(self, run: ArraySource, dims: range):
        self.specs = run.specs
        self._run, self._dims = run, dims

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The part of an array, as of the run itself."""
        piece = self._run.read(name, index)
        if not self._dims or name not in AXES:
            return piece
        shape, axis = self.specs[name].shape, AXES[name]
        silent = np.isin(np.arange(shape[axis]), self._dims).reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
        return np.where(np.broadcast_to(silent, shape)[index], np.zeros((), piece.dtype), piece)
