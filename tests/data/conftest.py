import pytest

from tests.data import toy


@pytest.fixture(scope="session")
def episodes():
    return toy.in_stored_order([toy.make_episode(seed) for seed in range(12)])


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A data set of 12 episodes in two tasks. Tests do not change it."""
    return toy.write(tmp_path_factory.mktemp("data") / "toy", [toy.make_episode(seed) for seed in range(12)])
