"""What DRAM has no room for, and what outlives the daemon: NVMe, Redis, S3, and the warm restart."""

import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from daemon import Daemon
from engine import Process, difference, free_port, kvern_transfer
from models import random_llama
from prompts import tokens

LENGTH = 700
CACHED = 672  # whole blocks, without the last token's


class Redis(Process):
    """One server without a disk, on a port of its own."""

    def __init__(self, folder):
        super().__init__("redis", folder)
        self.port = free_port()
        self.folder = folder

    def start(self) -> "Redis":
        self.spawn(
            [shutil.which("redis-server"), "--port", str(self.port), "--save", "", "--dir", str(self.folder)],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while self.cli("ping") != "PONG":
            assert self.alive and time.monotonic() < deadline, self.log.read_text()
        return self

    def cli(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.thaw()
    server.kill()


class S3(Process):
    """A server with one bucket. It takes any signature, since it checks those of listings wrongly; the integration tests
    have those of all else checked."""

    BUCKET = "kvern-e2e"

    def __init__(self, folder):
        super().__init__("s3", folder)
        self.folder = folder

    def start(self) -> "S3":
        script = pathlib.Path(__file__).parents[1] / "integration" / "s3_server.py"
        self.spawn([sys.executable, str(script), self.BUCKET, "unchecked"], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (ready := [line for line in self.log.read_text().splitlines() if line.startswith("ready ")]):
            assert self.alive and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        _, self.port, access, secret, *_ = ready[0].split()
        (self.folder / "access").write_text(access)
        (self.folder / "secret").write_text(secret + "\n")
        return self


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def remotes(redis, s3) -> dict[str, dict]:
    return {
        "redis": {"redis.nodes": f"127.0.0.1:{redis.port}"},
        "s3": {
            "s3.bucket": S3.BUCKET,
            "s3.endpoint": f"http://127.0.0.1:{s3.port}",
            "s3.path_style": True,
            "s3.access_key_id_file": str(s3.folder / "access"),
            "s3.secret_access_key_file": str(s3.folder / "secret"),
        },
    }


DRAM = {"store.dram_bytes": "32MiB"}  # 8 KiB of KV per token: room for about 4,000 tokens


@pytest.fixture(scope="module")
def daemon(stage, remotes):
    nvme = {"nvme.files": str(stage.folder / "nvme"), "nvme.bytes": "1GiB"}
    return stage.start_daemon({**DRAM, **nvme, **remotes["redis"], **remotes["s3"]})


@pytest.fixture(scope="module")
def engine(stage, daemon):
    return stage.engine(random_llama(), kvern={"staging": "16MiB"}).wait_started()


@pytest.fixture(scope="module")
def texts():
    return [tokens("tiers", i, length=LENGTH) for i in range(12)]


@pytest.fixture(scope="module")
def cold(daemon, engine, texts):
    outputs = []
    for text in texts:
        outputs.append(engine.generate(text))
        # One prompt after the other: what a slow tier is behind with is given up, and found nowhere once DRAM needs room.
        assert engine.settle(limit=60)
        daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0, seconds=60)
    return outputs


def restore(engine, texts, cold, cached=CACHED):
    engine.forget_kv()
    for text, reference in zip(texts, cold):
        output = engine.generate(text)
        assert output.cached_tokens == cached
        assert output.tokens == reference.tokens, difference(output, reference)


def test_what_dram_evicted_comes_back_from_nvme(daemon, engine, texts, cold):
    assert daemon.evicted() > 0
    assert daemon.metric("kvern_unsaved_chunks_total") == 0
    restore(engine, texts, cold)
    assert daemon.metric("kvern_promoted_chunks_total", tier="nvme") > 0
    status = daemon.ctl("status")
    for tier in ("nvme", "redis", "s3"):
        assert re.search(rf"^{tier} .* in \d+ chunks, written through; ", status, re.MULTILINE), status


def test_a_prompt_that_nobody_has_waits_for_no_tier(engine):
    output = engine.generate(tokens("nobody", length=LENGTH))
    assert output.cached_tokens == 0


def test_nvme_outlives_a_killed_daemon(daemon, engine, texts, cold):
    daemon.kill()
    daemon.start()
    daemon.wait_sessions(2)
    engine.wait_connected()
    restore(engine, texts, cold)


@pytest.mark.parametrize("tier", ["redis", "s3"])
def test_another_daemon_finds_it_in_a_remote_tier(stage, daemon, remotes, tmp_path, texts, cold, tier):
    daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0, tier=tier, seconds=60)
    elsewhere = Daemon(tmp_path, {**DRAM, **remotes[tier], f"{tier}.find_timeout_ms": 60_000}).start()
    try:
        engine = stage.engine(random_llama(), transfer=kvern_transfer(elsewhere.address)).wait_started()
        restore(engine, texts[:3], cold[:3])
        assert elsewhere.metric("kvern_promoted_chunks_total", tier=tier) > 0
        engine.stop()
    finally:
        elsewhere.destroy()


def test_a_tier_that_hangs_or_dies_costs_its_hits_only(daemon, engine, redis):
    text = tokens("hang", length=LENGTH)
    redis.freeze()
    try:
        cold = engine.generate(text)
        assert cold.cached_tokens == 0
        engine.forget_kv()
        again = engine.generate(text)
        assert again.cached_tokens == CACHED, "DRAM has it"
        assert again.tokens == cold.tokens, difference(again, cold)
        for i in range(4):
            assert engine.generate(tokens("hanging", i, length=300)).cached_tokens == 0
        daemon.wait_metric("kvern_tier_breaker_state", lambda value: value > 0, tier="redis")
    finally:
        redis.thaw()


def test_a_flush_empties_every_tier(daemon, engine, redis, texts, cold):
    # The breaker lets a probe through after a while: a look-up that misses everywhere is one.
    deadline = time.monotonic() + 60
    while daemon.metric("kvern_tier_breaker_state", tier="redis") > 0:
        assert time.monotonic() < deadline
        engine.generate(tokens("probe", str(time.monotonic()), length=100), max_tokens=1)
    assert engine.settle(limit=60)
    daemon.ctl("flush", "--all")
    daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0)
    assert redis.cli("dbsize") == "0"
    restore(engine, texts[:2], cold[:2], cached=0)


def test_dram_outlives_a_killed_daemon(stage, tmp_path):
    kept = Daemon(tmp_path, {"store.warm_restart": True}).start()
    try:
        engine = stage.engine(random_llama(), transfer=kvern_transfer(kept.address)).wait_started()
        text = tokens("warm", length=LENGTH)
        cold = engine.generate(text)
        assert engine.settle(limit=60)
        for end in (kept.kill, kept.stop):
            end()
            kept.start()
            kept.wait_sessions(2)
            engine.wait_connected()
            restore(engine, [text], [cold])
        engine.stop()
    finally:
        kept.destroy()
