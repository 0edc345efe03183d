"""No address configured: the first engine starts a kvernd for this machine, later ones join it."""

import os
import pathlib
import signal
import time

import pytest

from engine import Engine, difference, kvern_transfer
from models import random_llama
from prompts import tokens


def processes_of(folder: pathlib.Path) -> list[int]:
    """Keeper and daemon: they carry the folder in their arguments."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        mine = str(folder).encode() in command
        if mine and (b"--server.socket=" in command or b"kvern.embedded" in command):
            found.append(int(entry.name))
    return found


@pytest.fixture
def runtime(tmp_path):
    """A folder of its own for this test's daemon, which is ended with the test."""
    yield tmp_path
    deadline = time.monotonic() + 30
    while left := processes_of(tmp_path):
        for pid in left:
            os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.2)


def test_engines_start_and_join_a_daemon_of_their_own(runtime):
    def start() -> Engine:
        return Engine(
            random_llama(),
            runtime,
            transfer=kvern_transfer(None, embedded_dram="128MiB"),
            environment={"XDG_RUNTIME_DIR": str(runtime)},
        ).wait_started()

    text = tokens("embedded", length=1000)
    first = start()
    try:
        cold = first.generate(text)
    finally:
        first.stop()
    assert len(processes_of(runtime)) == 2, "keeper and daemon must outlive the engine, so that its cache is found again"
    second = start()
    try:
        restored = second.generate(text)
    finally:
        second.stop()
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)
    assert len(processes_of(runtime)) == 2
