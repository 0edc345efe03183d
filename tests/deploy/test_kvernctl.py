"""kvernctl on a real kvernd: what an operator's slip may cost."""

import pytest

from daemon import Daemon
from load import Load


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    made = Daemon(tmp_path_factory.mktemp("kvernctl")).start()
    load = Load(made.address, chunks=2)
    load.store(0)
    load.close()
    yield made
    made.destroy()


@pytest.mark.parametrize(
    "scope",
    [
        ("--namespace", ""),
        ("--tenant", ""),
        ("--prefix", ""),
        ("--namespace", "", "--prefix", "00ff"),
        ("--all", "--tenant", "default"),
        (),
    ],
    ids=str,
)
def test_a_flush_of_nothing_named_drops_nothing(daemon, scope):
    flush = daemon.start_ctl("flush", *scope)
    assert flush.wait(30) != 0
    assert "2 chunks" in daemon.ctl("inspect")


def test_a_flush_that_is_named_drops_it(daemon):
    assert "dropped 2 chunks" in daemon.ctl("flush", "--tenant", "default")
