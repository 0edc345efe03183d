#!/usr/bin/env python3
"""Makes the pictures of the dashboards in docs/images: a real kvernd with three tiers under load, a real vLLM on it, and a
Prometheus that scrapes both; deploy/grafana/pictures.py draws what Prometheus recorded.

Usage: record_dashboards.py [MINUTES]
"""

import concurrent.futures
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e")]

import numpy as np  # noqa: E402

from daemon import Daemon  # noqa: E402
from engine import ROOT, Server, kvern_transfer  # noqa: E402
from load import Load  # noqa: E402
from models import smollm2  # noqa: E402
from prompts import prose  # noqa: E402
from prometheus_server import SCRAPE_SECONDS, Prometheus  # noqa: E402
from test_tiers import Redis  # noqa: E402

DRAWER = ROOT / "deploy/grafana"
VENV = ROOT / "build/pictures"

CLIENTS = 2
PROMPTS = 120  # of 8 chunks, more than DRAM and the file hold raw
POPULARITY = 1.1  # exponent of Zipf's law
PAUSE_SECONDS = 0.15  # between requests of a client, in the mean
BURST = (0.35, 0.6)  # of the period: no pauses
REDIS_STANDS = (0.7, 0.85)  # of the period: its breaker opens
CONVERSATIONS = 12  # that the engine has, of so many tokens
CONVERSATION_TOKENS = 600
FORGETS_EVERY = 4  # requests: vLLM's own prefix cache is emptied, or nothing would be loaded


class Period:
    def __init__(self, seconds_long: float):
        self._begin = time.monotonic()
        self._seconds = seconds_long

    @property
    def share(self) -> float:
        return (time.monotonic() - self._begin) / self._seconds

    def within(self, part: tuple[float, float]) -> bool:
        return part[0] <= self.share < part[1]


def play_client(address: str, period: Period, seed: int) -> None:
    """Finds and loads what is there of popular and less popular prompts, and stores what is not."""
    draw = np.random.default_rng(seed)
    weights = np.arange(1, PROMPTS + 1) ** -POPULARITY
    load = Load(address, chunks=8)
    while period.share < 1:
        prompt = int(draw.choice(PROMPTS, p=weights / weights.sum()))
        if load.load(prompt) < load.tokens:
            load.store(prompt, "raw | zstd" if prompt % 5 == 0 else "")
        if not period.within(BURST):
            time.sleep(draw.exponential(PAUSE_SECONDS))
    load.close()


def play_engine(server: Server, period: Period) -> None:
    draw = np.random.default_rng(CLIENTS)
    requests = 0
    while period.share < 1:
        server.complete(prose("dashboards", int(draw.integers(CONVERSATIONS)), length=CONVERSATION_TOKENS), max_tokens=8)
        requests += 1
        if requests % FORGETS_EVERY == 0:
            server.reset_prefix_cache()
        time.sleep(draw.exponential(PAUSE_SECONDS))


def python() -> str:
    """Of an environment of its own: nothing else needs matplotlib."""
    if not (VENV / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "-r", str(DRAWER / "requirements.txt")]
        subprocess.run(pip, check=True)
        (VENV / "ready").touch()
    return str(VENV / "bin/python")


def record(folder: pathlib.Path, minutes: float) -> None:
    drawer = [python(), str(DRAWER / "pictures.py")]
    redis = Redis(folder).start()
    settings = {
        "store.dram_bytes": "256MiB",
        "nvme.files": str(folder / "nvme"),
        "nvme.bytes": "512MiB",
        "redis.nodes": f"127.0.0.1:{redis.port}",
        "ladder.default": "balanced",
    }
    daemon = Daemon(folder, settings).start()
    server = Server(smollm2(), folder, transfer=kvern_transfer(daemon.address))
    prometheus = None
    try:
        server.wait_started()
        prometheus = Prometheus(folder, daemon.http_port, server.port).wait_ready()
        period = Period(minutes * 60)
        pool = concurrent.futures.ThreadPoolExecutor(CLIENTS + 1)
        players = [pool.submit(play_client, daemon.address, period, i) for i in range(CLIENTS)]
        players.append(pool.submit(play_engine, server, period))
        frozen = False
        while period.share < 1:
            if period.within(REDIS_STANDS) != frozen:
                frozen = not frozen
                redis.freeze() if frozen else redis.thaw()
            time.sleep(0.5)
        for each in players:
            each.result()
        drawer += ["--prometheus", f"http://{prometheus.address}", "--minutes", str(minutes)]
        drawer += ["--scrape-seconds", str(5 * SCRAPE_SECONDS), "--output", str(ROOT / "docs/images")]
        subprocess.run(drawer, check=True)
    finally:
        redis.thaw()
        if prometheus is not None:
            prometheus.kill()
        server.stop()
        daemon.destroy()
        redis.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kvern-pictures-") as made:
        record(pathlib.Path(made), float(sys.argv[1]) if len(sys.argv) > 1 else 4)
