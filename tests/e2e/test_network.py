"""Other hosts: network namespaces, joined by a veth pair. An engine on one, with its own IPC and UTS namespaces, control
over ZeroMQ with CURVE keys and data over UCX TCP; and a remote tier on one, whose network is cut."""

import os
import shutil
import subprocess
import time

import pytest

from daemon import Daemon, binary
from engine import difference, kvern_transfer
from models import random_llama
from prompts import tokens

DAEMON_ADDRESS, OTHER_ADDRESS = "10.203.0.1", "10.203.0.2"
PORT, UCX_PORT, REDIS_PORT = 7070, 7071, 6379
DEVICES = ("kvern-d", "kvern-e")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def hosts():
    """Names of two network namespaces, with one of DEVICES each."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"kvern-e2e-{os.getpid()}-{end}" for end in ("d", "e")]
    devices = list(DEVICES)
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, (DAEMON_ADDRESS, OTHER_ADDRESS)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_an_engine_on_another_host_stores_and_restores(hosts, stage):
    daemon_host, engine_host = hosts
    for name in ("daemon", "tenant"):
        subprocess.run([binary("kvernctl"), "keygen", "--directory", stage.folder, "--name", name], check=True)
    clients = stage.folder / "clients"
    public = (stage.folder / "tenant.pub").read_text().split("public = ")[1].strip()
    clients.write_text(f"tenant {public}\n")
    stage.start_daemon(
        {
            "server.tcp_listen": f"{DAEMON_ADDRESS}:{PORT}",
            "server.server_key_file": str(stage.folder / "daemon.key"),
            "server.allowed_clients_file": str(clients),
            "server.ucx_listen": DAEMON_ADDRESS,
            "server.ucx_port": UCX_PORT,
        },
        namespace=daemon_host,
    )
    transfer = kvern_transfer(
        f"tcp://{DAEMON_ADDRESS}:{PORT}",
        server_key_file=str(stage.folder / "daemon.pub"),
        client_key_file=str(stage.folder / "tenant.key"),
    )
    text = tokens("network", length=1000)

    def start():
        return stage.engine(
            random_llama(), transfer=transfer, prefix=["ip", "netns", "exec", engine_host, "unshare", "-i", "-u"]
        ).wait_started()

    engine = start()
    cold = engine.generate(text)
    engine.forget_kv()
    restored = engine.generate(text)
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()
    stage.daemon.wait_sessions(0)

    engine = start()
    restored = engine.generate(text)
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)
    assert stage.daemon.metric("kvern_sessions", data_plane="ucx") == 2  # scheduler and worker
    engine.stop()


def test_a_network_that_is_cut_costs_the_remote_tiers_hits_alone(hosts, stage, tmp_path):
    """What waits for the tier ends in time, all else goes on, and the tier serves again afterwards."""
    here, there = hosts
    inside = ["ip", "netns", "exec", there]
    server = subprocess.Popen(
        [*inside, shutil.which("redis-server"), "--bind", OTHER_ADDRESS, "--protected-mode", "no", "--save", ""],
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
    )

    def keys() -> int:
        command = [*inside, "redis-cli", "-h", OTHER_ADDRESS, "dbsize"]
        return int(subprocess.run(command, capture_output=True, text=True).stdout.strip() or -1)

    tier = {"redis.nodes": f"{OTHER_ADDRESS}:{REDIS_PORT}"}
    daemon = Daemon(tmp_path, tier, namespace=here)
    try:
        deadline = time.monotonic() + 30
        while keys() < 0:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        daemon.start()
        engine = stage.engine(random_llama(), transfer=kvern_transfer(daemon.address)).wait_started()
        before, during, after = (tokens("cut", i, length=500) for i in range(3))

        def stored_and_restored(text: list[int]) -> None:
            cold = engine.generate(text)
            assert cold.cached_tokens == 0
            restored_again(text, cold)

        def restored_again(text: list[int], cold) -> None:
            engine.forget_kv()
            restored = engine.generate(text)
            assert restored.cached_tokens == 480
            assert restored.tokens == cold.tokens, difference(restored, cold)

        known = engine.generate(before)
        daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0)
        stored = keys()
        assert stored > 0
        ip("-n", there, "link", "set", DEVICES[1], "down")
        restored_again(before, known)
        stored_and_restored(during)
        for i in range(4):
            assert engine.generate(tokens("look-ups of nothing", i, length=300)).cached_tokens == 0
        daemon.wait_metric("kvern_tier_breaker_state", lambda value: value > 0)
        restored_again(before, known)
        ip("-n", there, "link", "set", DEVICES[1], "up")
        deadline = time.monotonic() + 60
        while daemon.metric("kvern_tier_breaker_state") > 0:  # a look-up that misses everywhere is a probe
            assert time.monotonic() < deadline
            engine.generate(tokens("probe", str(time.monotonic()), length=100), max_tokens=1)
        reached = keys()
        stored_and_restored(after)
        daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0)
        assert keys() > reached >= stored
        engine.stop()
    finally:
        daemon.destroy()
        server.kill()
        server.wait()
