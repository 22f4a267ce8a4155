import pytest

import kdtoolkit
from tests.workflow._data import TINY, write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", (("train", 15), ("val", 4), ("test", 4)))


@pytest.fixture(scope="session")
def teacher(shapes, tmp_path_factory):
    """The folder of a finished run of `kd train`."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    kdtoolkit.train(TINY, shapes, out=out, steps=4, batch_size=4, weights="none", quiet=True)
    return out
