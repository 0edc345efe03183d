"""`kvernctl top` in a terminal of 80 by 24 (tmux), beside a real kvernd under load."""

import pathlib
import shlex
import subprocess
import time
import uuid

import pytest

from daemon import Daemon, binary
from load import Load

PATIENCE_SECONDS = 30
TITLES = ("TIER", "CODEC", "ID    SESSION", "SLOWEST OPERATIONS")


@pytest.fixture(scope="module")
def load(daemon):
    load = Load(daemon.address, chunks=8)
    yield load
    load.close()


class Terminal:
    """A terminal of its own server of tmux, with one command in it.

    A shell writes down how the command ended: tmux 3.3 can see a terminal close and then never reap its process, so
    that it does not know the status.
    """

    def __init__(self, directory: pathlib.Path, *command: str, width: int = 80, height: int = 24):
        self._name = f"kvern-{uuid.uuid4().hex}"
        self._status = directory / f"{self._name}.status"
        script = f"{shlex.join(command)}; echo $? > {shlex.quote(str(self._status))}"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), script)
        self._tmux("set-option", "-g", "status", "off")
        self._tmux("set-option", "-g", "remain-on-exit", "on")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS).stdout

    def screen(self) -> list[str]:
        return self._tmux("capture-pane", "-p").splitlines()

    def keys(self, keys: str) -> None:
        self._tmux("send-keys", keys)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def ended_with(self) -> str:
        return self._status.read_text().strip() if self._status.exists() else ""

    def close(self) -> None:
        self._tmux("kill-server")

    def wait(self, holds, what: str, meanwhile=lambda: time.sleep(0.05)) -> list[str]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(screen := self.screen()):
            assert time.monotonic() < deadline, f"{what}; the screen:\n" + "\n".join(screen)
            meanwhile()
        return screen


def shows_all(screen: list[str]) -> bool:
    text = "\n".join(screen)
    return (
        all(any(line.startswith(title) for line in screen) for title in TITLES)
        and any(line.startswith("nvme ") for line in screen)
        and any(line.startswith("int8r") for line in screen)
        and "load scheduler, default" in text
        and "found 100 % of" in text
    )


def test_it_shows_tiers_codecs_sessions_and_slow_operations_at_80x24(daemon, load, tmp_path):
    terminal = Terminal(tmp_path, binary("kvernctl"), "--address", daemon.address, "top", "--interval", "2")
    try:
        prompts = iter(range(1_000_000))

        def work() -> None:
            prompt = next(prompts)
            load.store(prompt)
            assert load.load(prompt) > 0

        screen = terminal.wait(shows_all, "not everything is shown", work)
        assert len(screen) == 24 and all(len(line) <= 80 for line in screen)
        assert screen[0].startswith("kvernd ") and "running" in screen[0]
        terminal.resize(100, 30)
        work()
        screen = terminal.wait(lambda lines: len(lines) == 30 and shows_all(lines), "the larger window is used", work)
        terminal.keys("q")
        terminal.wait(lambda _: terminal.ended_with() == "0", "q ends it")
    finally:
        terminal.close()


def test_it_says_when_the_daemon_is_away_and_goes_on_when_it_is_back(tmp_path):
    daemon = Daemon(tmp_path).start()
    terminal = Terminal(
        tmp_path,
        binary("kvernctl"),
        *("--timeout-ms", "500", "--address", daemon.address),
        *("top", "--interval", "0.3"),
    )
    try:
        terminal.wait(lambda screen: "running" in screen[0], "it runs")
        daemon.kill()
        terminal.wait(lambda screen: screen[0].startswith("no answer"), "it says that nobody answers")
        daemon.start()
        terminal.wait(lambda screen: "running" in screen[0] and "up" in screen[0], "it goes on")
    finally:
        terminal.close()
        daemon.destroy()


def test_once_prints_one_screen_of_text(daemon, load):
    load.store(2_000_000)
    lines = daemon.ctl("top", "--once", "--interval", "0.2").splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 and line.isprintable() for line in lines)
    assert all(any(line.startswith(title) for line in lines) for title in TITLES)


def test_without_a_terminal_it_says_what_to_do(daemon):
    command = daemon.start_ctl("top")
    output, _ = command.communicate(timeout=PATIENCE_SECONDS)
    assert command.returncode == 2 and "--once" in output
