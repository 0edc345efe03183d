"""An engine on another host: network namespaces with their own IPC and UTS namespaces, joined by a veth pair. Control
over ZeroMQ with CURVE keys, data over UCX TCP."""

import os
import subprocess

import pytest

from daemon import binary
from engine import difference, kvern_transfer
from models import random_llama
from prompts import tokens

DAEMON_ADDRESS, ENGINE_ADDRESS = "10.203.0.1", "10.203.0.2"
PORT, UCX_PORT = 7070, 7071


@pytest.fixture(scope="module")
def hosts():
    """Names of two network namespaces."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"kvern-e2e-{os.getpid()}-{end}" for end in ("d", "e")]
    devices = [f"kv{os.getpid() % 100000}{end}" for end in ("d", "e")]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, (DAEMON_ADDRESS, ENGINE_ADDRESS)):
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
