"""Runs every benchmark against its rival or limit and writes build/bench/results.json.

Usage: run.py [--only transfer|rivals|kernels|index|nvme|redis|replay|e2e|compact ...]   (make bench runs all)

Everything in one flat JSON object; what each key means is in docs/benchmarks.md. Figures are ratios taken inside one
round wherever the machine's own speed would drown them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from compact_caches import measure as measure_compact  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Engine, free_port, kvern_transfer  # noqa: E402
from models import smollm2  # noqa: E402
from prompts import tokens  # noqa: E402
from redis_rates import measure as measure_redis  # noqa: E402

BUILD = pathlib.Path(os.environ.get("KVERN_BUILD", ROOT / "build" / "release"))
OUT = ROOT / "build" / "bench"
RIVAL_REQUIREMENTS = ROOT / "bench" / "requirements-rivals.txt"
E2E_PROMPT_TOKENS = 7168
E2E_REPEATS = 3


def say(text: str) -> None:
    print(f"bench: {text}", flush=True)


def run_json(command: list[str], **options) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)
    return json.loads(done.stdout)


@contextlib.contextmanager
def daemon(settings: dict):
    with tempfile.TemporaryDirectory(prefix="kvern-bench-") as folder:
        running = Daemon(pathlib.Path(folder), settings).start()
        try:
            yield running
        finally:
            running.stop()


def transfer() -> dict:
    """Through shared memory, then through UCX over loopback TCP."""
    program = str(BUILD / "bin" / "transfer_bench")
    say("transfers through shared memory")
    # Objects that are stored and loaded once would be the first to leave under a policy that learns from reuse.
    store = {"store.dram_bytes": "3GiB", "store.eviction": "lru"}
    with daemon(store) as running:
        results = run_json([program, "--address", running.address, "--plane", "local"])
    say("transfers through UCX over loopback TCP")
    port, ucx_port = free_port(), free_port()
    settings = {
        **store,
        "server.tcp_listen": f"127.0.0.1:{port}",
        "server.insecure": True,
        "server.ucx_listen": "127.0.0.1",
        "server.ucx_port": ucx_port,
        "server.ucx_devices": "lo",
        "server.ucx_transports": "tcp",
    }
    environment = {**os.environ, "UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp"}
    with daemon(settings):
        command = [program, "--address", f"tcp://127.0.0.1:{port}", "--plane", "tcp", "--insecure"]
        results |= run_json(command, env=environment)
    return results


def rivals() -> dict:
    """In an environment of their own, so that their libraries meet none of ours."""
    venv = OUT / "rivals"
    if not (venv / "ready").exists():
        say("installing the rivals (once)")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(RIVAL_REQUIREMENTS)]
        subprocess.run(pip, check=True)
        (venv / "ready").touch()
    say("rivals: mooncake_shm, mooncake_tcp, redis_tcp")
    environment = {**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    return run_json([str(venv / "bin" / "python"), str(ROOT / "bench" / "rivals.py")], env=environment)


def run_lines(command: list[str]) -> dict:
    """Of a program that prints lines of a key and a number, and comments."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in lines}


def kernels() -> dict:
    """Each step beside memcpy, and beside torch on one thread, too. A step that prints "ms" is the same layer as
    torch's; the others are compared by raw bytes a second."""
    results = {}
    for program in sorted((BUILD / "bin").glob("kernels*_bench")):
        say(f"{program.name}, beside memcpy")
        results |= run_lines([str(program)])
    say("the same in torch, eager and compiled (some minutes)")
    for step, torch in run_json([sys.executable, str(ROOT / "bench" / "torch_kernels.py")]).items():
        name = f"kernels.{step}"
        results[f"{name}.torch_ms"] = torch["ms"]
        if f"{name}.ms" in results:
            results[f"{name}.over_torch"] = torch["ms"] / results[f"{name}.ms"]
        elif f"{name}.gb_per_s" in results:
            results[f"{name}.over_torch"] = results[f"{name}.gb_per_s"] / torch["gb_per_s"]
    return results


def index() -> dict:
    """Bookkeeping of the DRAM store: memory, look-ups, and the warm restart."""
    say("the index of the DRAM tier, and its warm restart")
    return run_lines([str(BUILD / "bin" / "store_index_bench")])


def nvme() -> dict:
    """The NVMe tier beside fio on the same disk, the time of recovery, and the index."""
    say("the NVMe tier, beside fio")
    with tempfile.TemporaryDirectory(prefix="kvern-bench-", dir="/var/tmp") as folder:  # /tmp may be in memory
        return run_lines([str(BUILD / "bin" / "nvme_bench"), "--folder", folder])


def load_seconds(engine: Engine) -> float:
    """What Kvern's loads have taken so far, as vLLM's own metrics tell it."""
    return engine.metrics().get("vllm:kvern_load_seconds_sum", 0.0)


def e2e() -> dict:
    """First token of a long prompt: cold, after a hit in vLLM's own prefix cache, restored by Kvern."""
    say(f"first token of {E2E_PROMPT_TOKENS} tokens in a real engine (the cold start takes half a minute)")
    prompt = tokens("bench", length=E2E_PROMPT_TOKENS)
    warm_up = tokens("bench warm-up", length=256)
    with daemon({"store.dram_bytes": "1GiB"}) as running, tempfile.TemporaryDirectory() as folder:
        engine = Engine(smollm2("bfloat16"), pathlib.Path(folder), transfer=kvern_transfer(running.address), threads=2,
                        dtype="bfloat16", max_model_len=8192)
        try:
            engine.wait_started()
            engine.generate(warm_up, max_tokens=4)
            cold = engine.generate(prompt, max_tokens=4)
            hits, restored, added = [], [], []
            for _ in range(E2E_REPEATS):
                hits.append(engine.generate(prompt, max_tokens=4).ttft)
                engine.forget_kv()
                before = load_seconds(engine)
                output = engine.generate(prompt, max_tokens=4)
                assert output.cached_tokens >= E2E_PROMPT_TOKENS - 256, f"only {output.cached_tokens} tokens restored"
                restored.append(output.ttft)
                added.append(load_seconds(engine) - before)
        finally:
            engine.stop()
    return {
        "e2e.ttft_cold_s": cold.ttft,
        "e2e.ttft_prefix_hit_s": statistics.median(hits),
        "e2e.ttft_restored_s": statistics.median(restored),
        "e2e.ttft_cold_over_restored": cold.ttft / statistics.median(restored),
        "e2e.restored_over_prefix_hit": statistics.median(r / h for r, h in zip(restored, hits)),
        "e2e.kvern_ms": statistics.median(added) * 1e3,
    }


def compact() -> dict:
    say("compact caches in a real engine: slots, decode steps, hand-over, capacity (half an hour)")
    with daemon({"store.dram_bytes": "6GiB"}) as running:
        return measure_compact(running.address)


def redis() -> dict:
    say("the redis tier, beside redis-benchmark")
    return measure_redis(BUILD)


def replay() -> dict:
    """Traces through the real policies and ladders, in Mooncake's format: KVERN_TRACES is the folder that has them."""
    folder = pathlib.Path(os.environ.get("KVERN_TRACES", ROOT.parent / "shared" / "traces"))
    traces = sorted(folder.glob("*_trace.jsonl"))
    if not traces:
        say(f"no trace in {folder}: the replay is left out (KVERN_TRACES names another folder)")
        return {}
    say("replays of " + ", ".join(trace.name for trace in traces))
    return run_lines([str(BUILD / "bin" / "replay_bench"), *map(str, traces)])


PARTS = {"transfer": transfer, "rivals": rivals, "kernels": kernels, "index": index, "nvme": nvme,
         "redis": redis, "replay": replay, "e2e": e2e, "compact": compact}


def machine() -> dict:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return {"machine.cpu": model or platform.machine(), "machine.cores": os.cpu_count(),
            "machine.load_at_start": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}


def print_table(results: dict) -> None:
    width = max(map(len, results))
    for key in sorted(results):
        value = results[key]
        print(f"{key:<{width}}  {value:.3f}" if isinstance(value, float) else f"{key:<{width}}  {value}")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    only = arguments.parse_args().only
    OUT.mkdir(parents=True, exist_ok=True)
    target = OUT / "results.json"
    results = json.loads(target.read_text()) if target.exists() and len(only) < len(PARTS) else {}
    results |= machine()
    for name in only:
        results |= PARTS[name]()
        target.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print_table(results)
    say(f"written to {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
