"""Starts, watches, kills and restarts a real kvernd."""

import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import requests

from engine import BUILD, Process, free_port, tail

READY_SECONDS = 20
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def entered(namespace: str | None):
    """Moves this thread into a network namespace for a while."""
    if namespace is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(target) -> None:
        if libc.setns(target.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"could not enter {target.name}")

    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        enter(there)
        try:
            yield
        finally:
            enter(home)


def binary(name: str) -> str:
    path = BUILD / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make build")
    return str(path)


class Daemon(Process):
    """One kvernd whose files all lie in one folder. Its address stays the same over restarts. Settings are keys of the
    configuration file, such as {"store.dram_bytes": "64MiB"}."""

    def __init__(self, folder: pathlib.Path, settings: dict | None = None, namespace: str | None = None):
        super().__init__("kvernd", folder)
        self.namespace = namespace
        self.prefix = ["ip", "netns", "exec", namespace] if namespace else []
        self.http_port = free_port()
        self.socket = folder / "kvernd.sock"
        self.run_folder = pathlib.Path(f"/dev/shm/kvern-e2e-{os.getpid()}-{self.http_port}")
        self.config = folder / "kvernd.toml"
        self.settings = {
            "server.socket": str(self.socket),
            "server.run_dir": str(self.run_folder),
            "store.dram_bytes": "512MiB",
            "store.warm_restart": False,  # a test that ends looks at what is left behind
            "metrics.listen": f"127.0.0.1:{self.http_port}",
            **(settings or {}),
        }
        sections: dict[str, list[str]] = {}
        for key, value in self.settings.items():
            section, name = key.split(".")
            sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
        self.config.write_text("\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items()) + "\n")

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> "Daemon":
        assert not self.alive
        self.spawn([*self.prefix, binary("kvernd"), "--config", str(self.config)], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert self.alive, f"kvernd ended with {self.child.returncode}; {self.log}:\n{tail(self.log)}"
            try:
                if self.get("/readyz").ok:
                    return self
            except requests.ConnectionError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"kvernd was not ready after {READY_SECONDS} s; {self.log}:\n{tail(self.log)}")

    def get(self, path: str) -> requests.Response:
        with entered(self.namespace):
            return requests.get(f"http://127.0.0.1:{self.http_port}{path}", timeout=10)

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        samples = []
        for line in self.get("/metrics").text.splitlines():
            match = SAMPLE.match(line)
            if match:
                samples.append((match[1], dict(LABEL.findall(match[2] or "")), float(match[3])))
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name that carry the labels."""
        return sum(
            value
            for sample, its_labels, value in self.metrics()
            if sample == name and all(its_labels.get(key) == wanted for key, wanted in labels.items())
        )

    def start_ctl(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.prefix, binary("kvernctl"), "--address", self.address, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ctl(self, *arguments: str) -> str:
        """Runs kvernctl on this daemon; it must succeed."""
        command = self.start_ctl(*arguments)
        output, _ = command.communicate(timeout=60)
        assert command.returncode == 0, f"kvernctl {' '.join(arguments)} ended with {command.returncode}: {output}"
        return output

    def wait_metric(self, name: str, wanted, seconds: float = 30, **labels: str) -> float:
        """Waits until wanted(value) holds."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.metric(name, **labels)
            if wanted(value):
                return value
            assert time.monotonic() < deadline, f"{name}{labels or ''} is {value} after {seconds:.0f} s\n{tail(self.log)}"
            time.sleep(0.05)

    def stop(self, seconds: float = 30) -> None:
        """A graceful stop; what it leaves behind is looked at by the caller."""
        if self.alive:
            os.kill(self.child.pid, signal.SIGTERM)
            try:
                assert self.child.wait(seconds) == 0, f"kvernd ended with {self.child.returncode}\n{tail(self.log)}"
            finally:
                self.kill()

    def destroy(self) -> None:
        """Kills it if it still runs, and removes what a killed one leaves in shared memory."""
        self.kill()
        shutil.rmtree(self.run_folder, ignore_errors=True)

    # ---- what the metrics say

    def wait_sessions(self, number: int) -> None:
        self.wait_metric("kvern_sessions", lambda value: value == number)

    def wait_quiet(self) -> None:
        """Nobody holds staging, leases or reservations, and nothing waits to be encoded."""
        for name in (
            "kvern_reservations",
            "kvern_in_flight_shards",
            "kvern_encode_queue_length",
            "kvern_staging_used_bytes",
            "kvern_leases",
            "kvern_pinned_chunks",
        ):
            self.wait_metric(name, lambda value: value == 0)

    def wait_expired(self, number: int) -> None:
        self.wait_metric("kvern_sessions_ended_total", lambda value: value >= number, reason="expired")

    def quarantined(self) -> float:
        return self.metric("kvern_removed_chunks_total", reason="quarantined")

    def evicted(self) -> float:
        return self.metric("kvern_removed_chunks_total", reason="evicted")

    def used_bytes(self) -> float:
        return self.metric("kvern_tier_used_bytes")

    def bytes_stored(self) -> tuple[float, float]:
        """Bytes before and after encoding of all that was stored since the start."""
        return self.metric("kvern_stored_raw_bytes_total"), self.metric("kvern_stored_encoded_bytes_total")

    # ---- malice

    def damage_store(self, damage: str) -> None:
        """Changes bytes in the slab, as a bad memory module would: one bit of each 64 KiB, or everything to ones."""
        with open(self.run_folder / "slab", "r+b") as file, mmap.mmap(file.fileno(), 0) as slab:
            for offset in range(0, len(slab), 65536):
                if slab[offset : offset + 65536].count(0) == 65536:
                    continue
                if damage == "one bit":
                    slab[offset + 40000] ^= 1
                else:
                    slab[offset : offset + 65536] = b"\xff" * 65536
