"""The embedded daemon, with a stand-in for the program kvernd: what matters here is who starts and stops it, and when."""

import fcntl
import os
import pathlib
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from kvern import embedded, programs
from kvern.config import Options
from kvern.groups import Refused

STAND_IN = """\
#!{python}
import os, socket, sys
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
path = options["server.socket"]
with open(os.path.dirname(path) + "/starts", "a") as file:
    file.write(str(os.getpid()) + " " + options["store.dram_bytes"] + "\\n")
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(64)
while True:
    listener.accept()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # Socket paths are short by nature.
    base = pathlib.Path(f"/tmp/kvern-test-{os.getpid()}-{time.monotonic_ns() % 10**9}")
    base.mkdir(mode=0o700)
    program = base / "kvernd-stand-in"
    program.write_text(textwrap.dedent(STAND_IN.format(python=sys.executable)))
    program.chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(embedded.__file__).parent.parent))
    monkeypatch.setattr(programs, "find", lambda name: str(program))
    yield base / "kvern"
    for descriptor in embedded._presence.values():
        os.close(descriptor)
    embedded._presence.clear()
    for line in starts(base / "kvern"):
        try:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            pass
    subprocess.run(["rm", "-rf", str(base)], check=True)


def starts(folder) -> list[str]:
    path = folder / "starts"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_the_first_engine_starts_it_and_others_join(folder):
    addresses = []
    threads = [threading.Thread(target=lambda: addresses.append(embedded.start_or_join(Options()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(addresses) == {f"unix://{folder}/kvernd.sock"}
    assert len(starts(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_outlives_what_stops_the_engine_and_shares_its_session(folder):
    embedded.start_or_join(Options())
    (line,) = starts(folder)
    daemon = int(line.split()[0])
    assert os.getpgid(daemon) != os.getpgid(0)
    assert os.getsid(daemon) == os.getsid(0), "Linux may let other sessions starve"


def test_it_takes_at_most_half_of_the_free_shared_memory(folder, monkeypatch):
    embedded.start_or_join(Options(embedded_dram=1 << 50))
    free = os.statvfs("/dev/shm")
    assert int(starts(folder)[0].split()[1]) <= free.f_blocks * free.f_frsize // 2


def test_too_little_shared_memory_is_told(folder, monkeypatch):
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(Refused, match="/dev/shm"):
        embedded.start_or_join(Options())


def test_a_folder_of_others_is_not_used(folder):
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(Refused, match="kvern.address"):
        embedded.start_or_join(Options())


def test_a_missing_program_is_told(folder, monkeypatch):
    monkeypatch.setattr(programs, "find", lambda name: None)
    with pytest.raises(Refused, match="pip install"):
        embedded.start_or_join(Options())


def keeper_of(folder, idle: float) -> subprocess.Popen:
    program = folder.parent / "kvernd-stand-in"
    arguments = f"pathlib.Path({str(folder)!r}), {str(program)!r}, 1 << 26, {idle}, 0.05"
    code = f"import pathlib, kvern.embedded as e; e.keep({arguments})"
    return subprocess.Popen([sys.executable, "-c", code])


def test_it_stays_while_an_engine_lives_and_ends_when_nobody_comes_back(folder):
    folder.mkdir(mode=0o700)
    user = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(user, fcntl.LOCK_SH)
    keeper = keeper_of(folder, idle=0.1)
    wait_for(lambda: embedded.answers(folder / "kvernd.sock"))
    with pytest.raises(subprocess.TimeoutExpired):
        keeper.wait(1)  # ten times the idle time
    os.close(user)  # the engine is gone, however it ended
    assert keeper.wait(30) == 0
    assert not embedded.answers(folder / "kvernd.sock")


def test_it_stays_as_long_after_the_last_of_several_engines(folder):
    folder.mkdir(mode=0o700)
    keeper = keeper_of(folder, idle=3)
    wait_for(lambda: embedded.answers(folder / "kvernd.sock"))
    began = time.monotonic()
    time.sleep(1)
    with embedded._locked(folder / "users.lock", fcntl.LOCK_SH):
        time.sleep(1)
    with pytest.raises(subprocess.TimeoutExpired):
        keeper.wait(2)  # four seconds after the start, two after the last use
    assert keeper.wait(30) == 0
    assert time.monotonic() - began > 4.8


def test_the_keeper_ends_with_a_daemon_that_ends_while_engines_use_it(folder):
    folder.mkdir(mode=0o700)
    with embedded._locked(folder / "users.lock", fcntl.LOCK_SH):
        keeper = keeper_of(folder, idle=60)
        wait_for(lambda: starts(folder))
        os.kill(int(starts(folder)[0].split()[0]), signal.SIGKILL)
        assert keeper.wait(30) == 0


def test_the_keepers_end_ends_the_daemon(folder):
    folder.mkdir(mode=0o700)
    keeper = keeper_of(folder, idle=60)
    wait_for(lambda: embedded.answers(folder / "kvernd.sock"))
    keeper.terminate()
    keeper.wait(30)
    wait_for(lambda: not embedded.answers(folder / "kvernd.sock"))


def test_console_scripts_do_not_find_themselves(tmp_path, monkeypatch):
    script = tmp_path / "kvernctl"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_FOLDER", tmp_path / "nowhere")
    assert programs.find("kvernctl") is None
