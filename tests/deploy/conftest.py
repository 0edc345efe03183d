import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent.parent / "deploy" / "grafana")]


def pytest_addoption(parser):
    parser.addoption("--run-full", action="store_true", help="run what takes long too")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long, not of the short run")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long: make test-full"))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """What the image's last stage is."""
    from image import unpack

    return unpack(tmp_path_factory.mktemp("image") / "root")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A kvernd with a second tier and a ladder."""
    from daemon import Daemon

    folder = tmp_path_factory.mktemp("kvernd")
    # Room for a few prompts of the load; the others step down, leave, and come back from the file.
    settings = {
        "store.dram_bytes": "64MiB",
        "nvme.files": str(folder / "nvme"),
        "nvme.bytes": "1GiB",
        "nvme.sync": False,
        "ladder.default": "balanced",
    }
    daemon = Daemon(folder, settings).start()
    yield daemon
    daemon.destroy()
