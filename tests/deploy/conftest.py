import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent.parent / "deploy" / "grafana")]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """What the image's last stage is."""
    from image import unpack

    return unpack(tmp_path_factory.mktemp("image") / "root")
