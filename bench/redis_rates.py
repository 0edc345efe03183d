"""The redis tier beside redis-benchmark: same server, same value size, turn by turn in one run."""

import contextlib
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time

VALUE_BYTES = 1 << 20
OBJECTS = 64
READS = 1500
ROUNDS = 5
# redis-benchmark's connections and depth of pipelining: the best of these is what the tier is compared to.
SHAPES = [(1, 8), (2, 8), (16, 1)]


@contextlib.contextmanager
def server():
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="kvern-bench-") as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        running = subprocess.Popen(["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", folder,
                                    "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            yield port
        finally:
            running.terminate()
            running.wait()


def benchmark_gb_per_s(port: int, shape: tuple[int, int], test: str, requests: int) -> float:
    connections, depth = shape
    done = subprocess.run(["redis-benchmark", "-p", str(port), "-t", test, "-d", str(VALUE_BYTES), "-r", str(OBJECTS),
                           "-n", str(requests), "-c", str(connections), "-P", str(depth), "--csv"],
                          stdout=subprocess.PIPE, text=True, check=True)
    requests_per_s = float(done.stdout.splitlines()[-1].split(",")[1].strip('"'))
    return requests_per_s * VALUE_BYTES / 1e9


def measure(build: pathlib.Path) -> dict:
    ratios, gets, rivals = [], [], []
    with server() as port:
        command = [str(build / "bin" / "redis_bench"), "--node", f"127.0.0.1:{port}", "--value-bytes",
                   str(VALUE_BYTES), "--objects", str(OBJECTS), "--reads", str(READS)]
        benchmark_gb_per_s(port, SHAPES[0], "set", OBJECTS * 8)  # so that all of its keys are there
        for _ in range(ROUNDS):
            rival = max(benchmark_gb_per_s(port, shape, "get", READS) for shape in SHAPES)
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout
            rates = dict(line.split() for line in lines.splitlines())
            gets.append(float(rates["get_gb_per_s"]))
            rivals.append(rival)
            ratios.append(gets[-1] / rival)
    return {
        "store.redis.get_gb_per_s": statistics.median(gets),
        "store.redis.benchmark_get_gb_per_s": statistics.median(rivals),
        "store.redis.get_over_benchmark": statistics.median(ratios),
    }


if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parent.parent
    for key, value in measure(pathlib.Path(os.environ.get("KVERN_BUILD", root / "build" / "release"))).items():
        print(f"{key} {value:.3f}")
