"""What tests of whole runs share."""

import pytest

from vla_jax.data.loader import Loader
from vla_jax.train.run import train


@pytest.fixture
def train_until_a_crash(monkeypatch):
    """Trains until reading the batch of a step fails; the next call of `train` reads as ever."""

    def until(step, config, run_dir):
        batch = Loader.batch

        def fails(self, index):
            if index == step:
                raise OSError("the disk went away")
            return batch(self, index)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk went away"):
            patch.setattr(Loader, "batch", fails)
            train(config, run_dir)

    return until
