"""The daemon of those who configure none: one kvernd per user and machine, started by the first engine that needs it.

It outlives the engines, so that a restarted one finds its cache again, and ends when no engine has used it for a while.
The engines' presence is a shared lock on a file, which the kernel takes back however an engine ends. Between the
engines and kvernd stands a keeper process (this module's main), which looks for that lock every second and stops kvernd
when it has been free for long.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

from kvern import programs
from kvern.config import Options
from kvern.groups import Refused

logger = logging.getLogger("vllm.kvern")

SHM = "/dev/shm"
IDLE_SECONDS = 900
METRICS_ADDRESS = ("127.0.0.1", 9464)
# A smaller tier is of no use, so that a machine without shared memory is told at once.
MINIMUM_DRAM = 64 << 20
_STOP_SECONDS = 30
_LOOK_SECONDS = 1  # how often the keeper looks for users

_presence: dict[str, int] = {}  # folder -> descriptor with the shared lock, kept for the life of this process


def runtime_folder() -> pathlib.Path:
    """Where the socket lies: $XDG_RUNTIME_DIR/kvern or /run/kvern, as for kvernd and kvernctl, otherwise a folder in
    /tmp. Made if it is missing; refused if it belongs to somebody else."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        folder = pathlib.Path(base) / "kvern"
    elif os.access("/run", os.W_OK):
        folder = pathlib.Path("/run/kvern")
    else:
        folder = pathlib.Path(f"/tmp/kvern-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise Refused(f"{folder} is not a folder of this user alone; remove it, or set kvern.address")
    return folder


def answers(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
            return True
        except OSError:
            return False


def dram_bytes(wanted: int) -> int:
    """Half of what is free in shared memory at most."""
    found = os.statvfs(SHM)
    size = min(wanted, found.f_bavail * found.f_frsize // 2)
    if size < MINIMUM_DRAM:
        raise Refused(f"{SHM} has less than {2 * MINIMUM_DRAM >> 20} MiB free; enlarge it, or set kvern.address")
    return size


@contextlib.contextmanager
def _locked(path: pathlib.Path, operation: int):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def start_or_join(options: Options) -> str:
    """The address of the embedded daemon. Throws Refused."""
    folder = runtime_folder()
    path = folder / "kvernd.sock"
    if str(folder) not in _presence:
        descriptor = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _presence[str(folder)] = descriptor
    with _locked(folder / "start.lock", fcntl.LOCK_EX):
        if answers(path):
            logger.info("Kvern: joined the daemon at %s.", path)
            return f"unix://{path}"
        program = programs.find("kvernd")
        if program is None:
            raise Refused("the program kvernd is neither in the package nor in PATH; `pip install .` brings it")
        size = dram_bytes(options.embedded_dram)
        log_path = folder / "kvernd.log"
        with open(log_path, "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "kvern.embedded", str(folder), program, str(size)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=True,
            )
        # The next engine must find the socket rather than start a second daemon.
        deadline = time.monotonic() + 5
        while not answers(path) and time.monotonic() < deadline:
            time.sleep(0.02)
        logger.info("Kvern: started an embedded daemon at %s with %d MiB; its log is %s.", path, size >> 20, log_path)
    return f"unix://{path}"


def _free_or_zero(address: tuple[str, int]) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            return f"{address[0]}:{address[1]}"
        except OSError:
            return f"{address[0]}:0"


def _is_used(folder: pathlib.Path) -> bool:
    try:
        with _locked(folder / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def keep(
    folder: pathlib.Path,
    program: str,
    size: int,
    idle_seconds: float = IDLE_SECONDS,
    look_seconds: float = _LOOK_SECONDS,
) -> int:
    """Runs kvernd until it ends or nobody has needed it for a while."""
    daemon = None
    stopping = False

    def stop(*_) -> None:
        nonlocal stopping
        stopping = True
        if daemon is not None:
            daemon.terminate()

    signal.signal(signal.SIGTERM, stop)  # before there is a daemon that our death would leave behind
    daemon = subprocess.Popen(
        [
            program,
            f"--server.socket={folder / 'kvernd.sock'}",
            "--server.socket_mode=0600",
            f"--store.dram_bytes={size}",
            "--store.warm_restart=false",
            f"--metrics.listen={_free_or_zero(METRICS_ADDRESS)}",
        ]
    )
    if stopping:
        daemon.terminate()
    used_at = time.monotonic()
    while True:
        time.sleep(look_seconds)  # wait() with a time-out wakes up twenty times a second
        if daemon.poll() is not None:
            return daemon.returncode
        if _is_used(folder):
            used_at = time.monotonic()
        if time.monotonic() - used_at < idle_seconds:
            continue
        # start.lock first: an engine that starts now either has its shared lock already, or starts another daemon.
        with _locked(folder / "start.lock", fcntl.LOCK_EX):
            try:
                with _locked(folder / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    daemon.terminate()
                    try:
                        return daemon.wait(_STOP_SECONDS)
                    except subprocess.TimeoutExpired:
                        daemon.kill()
                        return daemon.wait()
            except BlockingIOError:
                used_at = time.monotonic()  # somebody came back


if __name__ == "__main__":
    # What stops the engine does not stop the daemon, which others may use by then. But no session of its own: Linux shares
    # the processors out by session (autogroup), and its version 6.18 lets other sessions wait for up to a minute while the
    # ranks of a tensor-parallel engine spin.
    os.setpgrp()
    sys.exit(keep(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
