"""Other stores on the same machine, in the same minute, by the same ratio: put and get over one-thread memcpy.

Usage: rivals.py NAME...   with names mooncake_shm, mooncake_tcp, redis_tcp (run by bench/run.py in its own environment)

Prints progress on stderr and one flat JSON object on stdout (keys `rival.<name>.<size>.store_over_memcpy`,
`.load_over_memcpy`, `rival.<name>.match.<n>.p50_us`). Each rival gets what suits it best: Mooncake's shared-memory
client works in buffers of its own pool (an engine would have to copy its pages there and back, which is left out),
Redis is driven by the C client with pipelines.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

SIZES = {"256KiB": 256 << 10, "2MiB": 2 << 20, "8MiB": 8 << 20}
WORKING_SET = int(os.environ.get("KVERN_BENCH_WORKING_SET_MIB", "1024")) << 20
ROUNDS = int(os.environ.get("KVERN_BENCH_ROUNDS", "5"))
BATCH = 8
LEASE_MS = 500  # Mooncake refuses to remove a key for so long after it was read; short, so that rounds can clean up


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args[0]} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args[0]} does not listen on {port} after {seconds} s")


@contextlib.contextmanager
def server(*command: str, port: int, directory: str):
    """A rival's server in a process group of its own, so that wrappers take their children along when they end."""
    with open(pathlib.Path(directory) / f"{pathlib.Path(command[0]).name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, process_group=0)
    try:
        wait_for_port(port, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


class Memcpy:
    """One thread, one object at a time, over the whole working set."""

    def __init__(self) -> None:
        self.source = numpy.ones(WORKING_SET, numpy.uint8)
        self.target = numpy.zeros(WORKING_SET, numpy.uint8)

    def seconds(self, size: int) -> float:
        start = time.perf_counter()
        for at in range(0, WORKING_SET - size + 1, size):
            self.target[at : at + size] = self.source[at : at + size]
        return time.perf_counter() - start


class Mooncake:
    """Keys for bytes through Mooncake Store: a master, an owner of the memory, and this client."""

    def __init__(self, master: int, owner: int | None, pool_bytes: int) -> None:
        from mooncake.store import MooncakeDistributedStore

        self.store = MooncakeDistributedStore()
        if owner is not None:
            self.check(self.store.setup_dummy(pool_bytes, 64 << 20, f"127.0.0.1:{owner}"), "setup")
            self.address = self.store.alloc_from_mem_pool(WORKING_SET)
            self.check(self.store.register_buffer(self.address, WORKING_SET), "register_buffer")
        else:
            address = f"127.0.0.1:{free_port()}"
            self.check(
                self.store.setup(address, "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", f"127.0.0.1:{master}"), "setup"
            )
            self.memory = numpy.zeros(WORKING_SET, numpy.uint8)
            self.address = self.memory.ctypes.data
            self.check(self.store.register_buffer(self.address, WORKING_SET), "register_buffer")
        ctypes.memset(self.address, 1, WORKING_SET)

    @staticmethod
    def check(code: int, what: str) -> None:
        if code != 0:
            raise RuntimeError(f"mooncake: {what} gave {code}")

    def pass_over(self, keys: list[str], size: int, put: bool) -> float:
        move = self.store.batch_put_from if put else self.store.batch_get_into
        start = time.perf_counter()
        for at in range(0, len(keys), BATCH):
            part = keys[at : at + BATCH]
            codes = move(part, [self.address + (at + i) * size for i in range(len(part))], [size] * len(part))
            if any(code < 0 for code in codes):
                raise RuntimeError(f"mooncake: {'put' if put else 'get'} gave {codes}")
        return time.perf_counter() - start

    def exists(self, keys: list[str]) -> float:
        start = time.perf_counter()
        found = self.store.batch_is_exist(keys)
        seconds = time.perf_counter() - start
        if any(code != 1 for code in found):
            raise RuntimeError("mooncake: a stored key is not found")
        return seconds

    def forget(self, keys: list[str]) -> None:
        time.sleep(LEASE_MS / 1000 + 0.1)
        for key in keys:
            self.store.remove(key)

    def close(self) -> None:
        self.store.close()


class Redis:
    def __init__(self, port: int) -> None:
        import redis

        self.client = redis.Redis(port=port)  # the hiredis parser is used when it is installed
        self.memory = memoryview(numpy.ones(WORKING_SET, numpy.uint8))

    def pass_over(self, keys: list[str], size: int, put: bool) -> float:
        start = time.perf_counter()
        for at in range(0, len(keys), BATCH):
            part = keys[at : at + BATCH]
            if put:
                pipeline = self.client.pipeline(transaction=False)
                for i, key in enumerate(part):
                    pipeline.set(key, self.memory[(at + i) * size : (at + i + 1) * size])
                pipeline.execute()
            else:
                for i, value in enumerate(self.client.mget(part)):
                    self.memory[(at + i) * size : (at + i + 1) * size] = value
        return time.perf_counter() - start

    def exists(self, keys: list[str]) -> float:
        start = time.perf_counter()
        found = self.client.exists(*keys)
        seconds = time.perf_counter() - start
        if found != len(keys):
            raise RuntimeError("redis: a stored key is not found")
        return seconds

    def forget(self, keys: list[str]) -> None:
        for at in range(0, len(keys), 256):
            self.client.delete(*keys[at : at + 256])

    def close(self) -> None:
        self.client.close()


@contextlib.contextmanager
def mooncake(shared_memory: bool, directory: str):
    master, metrics, owner = free_port(), free_port(), free_port()
    segment = f"{2 * WORKING_SET // (1 << 30)} GB"
    with (
        server("mooncake_master", f"--rpc_port={master}", f"--metrics_port={metrics}",
               f"--default_kv_lease_ttl={LEASE_MS}", port=master, directory=directory),
        server(
            "mooncake_client", "--host=127.0.0.1", f"--port={owner}", f"--master_server_address=127.0.0.1:{master}",
            "--metadata_server=P2PHANDSHAKE", "--protocol=tcp", f"--global_segment_size={segment}",
            "--local_buffer_size=64 MB", "--threads=2", port=owner, directory=directory,
        ),
    ):
        client = Mooncake(master, owner if shared_memory else None, WORKING_SET + (256 << 20))
        try:
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def redis_tcp(directory: str):
    port = free_port()
    with server("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                port=port, directory=directory):
        client = Redis(port)
        try:
            yield client
        finally:
            client.close()


def measure(name: str, client, memcpy: Memcpy, results: dict) -> None:
    for label, size in SIZES.items():
        count = WORKING_SET // size
        stores, loads = [], []
        for turn in range(ROUNDS + 1):  # the first warms up
            keys = [f"{label}-{turn}-{i}" for i in range(count)]
            copy = memcpy.seconds(size)
            put = client.pass_over(keys, size, put=True)
            get = client.pass_over(keys, size, put=False)
            client.forget(keys)
            if turn:
                stores.append(copy / put)
                loads.append(copy / get)
        results[f"rival.{name}.{label}.store_over_memcpy"] = statistics.median(stores)
        results[f"rival.{name}.{label}.load_over_memcpy"] = statistics.median(loads)
        say(f"{name} {label}: put {statistics.median(stores):.2f}, get {statistics.median(loads):.2f} of memcpy")
    keys = [f"match-{i}" for i in range(1024)]
    for at in range(0, len(keys), BATCH):
        client.pass_over(keys[at : at + BATCH], 4096, put=True)
    for n in (1, 64, 1024):
        times = [client.exists(keys[:n]) for _ in range(200)]
        results[f"rival.{name}.match.{n}.p50_us"] = statistics.median(times) * 1e6


def main() -> int:
    rivals = {
        "mooncake_shm": lambda directory: mooncake(True, directory),
        "mooncake_tcp": lambda directory: mooncake(False, directory),
        "redis_tcp": redis_tcp,
    }
    memcpy, results = Memcpy(), {}
    for name in sys.argv[1:] or rivals:
        directory = tempfile.mkdtemp(prefix=f"rival-{name}-")
        try:
            with rivals[name](directory) as client:
                measure(name, client, memcpy, results)
        except Exception as error:  # one rival that does not run must not hide the others: it is reported and missing
            say(f"{name}: {error} (logs in {directory})")
        else:
            shutil.rmtree(directory)
    json.dump(results, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
