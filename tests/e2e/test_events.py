"""KV events as a router sees them: over vLLM's own ZeroMQ publisher."""

import itertools
import time

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from engine import free_port
from models import random_llama
from prompts import tokens

LENGTH = 700
BLOCKS = LENGTH // 32


class Router:
    """Subscribes to an engine and keeps which blocks each medium has."""

    def __init__(self, endpoint: str):
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
        self.blocks: dict[str, set] = {}

    def receive(self) -> None:
        """Takes the events that are there."""
        while self.socket.poll(100):
            for event in self.decoder.decode(self.socket.recv_multipart()[-1]).events:
                if isinstance(event, BlockStored):
                    self.blocks.setdefault(event.medium, set()).update(event.block_hashes)
                elif isinstance(event, BlockRemoved):
                    self.blocks.setdefault(event.medium, set()).difference_update(event.block_hashes)
                elif isinstance(event, AllBlocksCleared):  # names no medium: vLLM speaks of its own cache
                    self.of("GPU").clear()

    def of(self, medium: str) -> set:
        return self.blocks.setdefault(medium, set())


@pytest.fixture(scope="module")
def engine(stage):
    stage.start_daemon()
    port = free_port()
    engine = stage.engine(
        random_llama(),
        kv_events_config={
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{port}",
            "replay_endpoint": None,
            "topic": "kv",
        },
    ).wait_started()
    engine.endpoint = f"tcp://127.0.0.1:{port}"
    return engine


@pytest.fixture(scope="module")
def router(engine):
    router = Router(engine.endpoint)
    yield router
    router.socket.close(linger=0)


def wait_until(engine, router, wanted, seconds: float = 60) -> None:
    """Events travel with the engine's steps: lets it work until wanted() holds."""
    deadline = time.monotonic() + seconds
    for i in itertools.count():
        router.receive()
        if wanted():
            return
        assert time.monotonic() < deadline, {medium: len(blocks) for medium, blocks in router.blocks.items()}
        engine.generate(tokens("step", i, length=20), max_tokens=1)


def test_what_the_store_has_is_announced_and_withdrawn(stage, engine, router):
    text = tokens("events", length=LENGTH)
    cold = engine.generate(text)
    wait_until(engine, router, lambda: len(router.of("CPU")) >= BLOCKS)
    assert router.of("CPU") <= router.of("GPU"), "names must be those that vLLM gives the same blocks"

    engine.forget_kv()
    wait_until(engine, router, lambda: not router.of("GPU") & router.of("CPU"))
    assert len(router.of("CPU")) >= BLOCKS, "resetting vLLM's own cache leaves the store as it is"
    assert engine.generate(text).tokens == cold.tokens

    stage.daemon.ctl("flush", "--all")
    wait_until(engine, router, lambda: not router.of("CPU"))


def test_after_a_reconnect_a_snapshot_tells_what_is_left(stage, engine, router):
    engine.generate(tokens("snapshot", length=LENGTH))
    wait_until(engine, router, lambda: len(router.of("CPU")) >= BLOCKS)
    stage.daemon.kill()
    stage.daemon.start()  # this daemon keeps nothing over a restart
    wait_until(engine, router, lambda: not router.of("CPU"))
