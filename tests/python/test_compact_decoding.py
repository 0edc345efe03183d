"""How an engine learns what the layers of a ragged compact cache keep, wherever that was made."""

import types

import pytest

from kvern import compat
from kvern.compact_decoding import CompactDecoding
from kvern.config import RequestOptions
from kvern.handles import Handle
from kvern.metadata import KvernMetadata, RaggedSlots
from kvern.request_state import RequestState
from kvern.stats import Recorder

BLOCK = 32
LAYERS = (64, 128, 96)  # 96 on average


class Daemon:
    """What the scheduler side and the native client say."""

    def __init__(self):
        self.found = 96
        self.slots = list(LAYERS)
        self.looked_from: list[int] = []
        self.asked: list[tuple] = []
        self.session_count = 1

    def find(self, state, request, local_tokens, limit, now, patience_ms):
        assert patience_ms > 0, "it has nothing else than what is stored"
        self.looked_from.append(local_tokens)
        return True, min(self.found, limit), "" if self.found >= limit else "not stored"

    def layer_slots(self, namespace, group, block):
        assert self.looked_from, "the slots are asked about while a look-up holds them"
        self.asked.append((namespace, group, block))
        if isinstance(self.slots, str):
            raise RuntimeError(self.slots)
        return self.slots


@pytest.fixture
def daemon():
    return Daemon()


@pytest.fixture
def decoding(daemon, monkeypatch):
    monkeypatch.setattr(compat, "fail_request", lambda request, reason: setattr(request, "failed", reason))
    group = types.SimpleNamespace(block_tokens=BLOCK, group_layers=len(LAYERS))
    made = CompactDecoding(
        daemon,
        types.SimpleNamespace(groups=(group,), block_tokens=BLOCK),
        types.SimpleNamespace(layout=lambda layout, since: (True, "")),
        Recorder(),
        rewrites=False,
        hash_bytes=32,
        obstacle=lambda: "",
        ready=lambda: True,
        namespace=lambda lora: (True, types.SimpleNamespace(handle=7)),
        find=daemon.find,
        release=lambda state: None,
    )
    yield made
    made.shutdown()


def decode(decoding, handle, local_tokens=0):
    """(the last answer, the request's state)"""
    request = types.SimpleNamespace(request_id="r", lora_request=None, failed="")
    state = RequestState(request, RequestOptions(), 1)
    state.handle, state.decodes, state.joined = handle, True, (3, handle.slot_hashes(3, 32))
    answer = decoding.match(state, request, local_tokens)
    while answer[0] is None and not request.failed:
        state.asked.exception()
        answer = decoding.match(state, request, local_tokens)
    return answer, state


@pytest.fixture
def handle():
    return Handle.make(range(400), 96, 9_999_999_999, "pool")


def test_the_slots_are_looked_up_and_then_asked_about(decoding, daemon, handle):
    answer, state = decode(decoding, handle, local_tokens=32)
    assert answer == (64, True)
    assert state.ragged_slots == RaggedSlots("pool", 3, (2, 4, 3))
    assert daemon.asked == [(7, 0, handle.slot_hashes(1, 32))]
    assert set(daemon.looked_from) == {32}


def test_what_vllm_has_itself_is_looked_up_once(decoding, daemon, handle):
    for _ in range(3):
        answer, state = decode(decoding, handle, local_tokens=96)
        assert answer == (0, False) and state.ragged_slots.pages == (2, 4, 3)
    assert daemon.looked_from == [0] and len(daemon.asked) == 1


def test_what_is_not_stored_fails_and_is_not_asked_about(decoding, daemon, handle):
    daemon.found = 64
    answer, state = decode(decoding, handle)
    assert answer == (None, False) and "not stored, or not any more" in state.request.failed
    assert not daemon.asked


@pytest.mark.parametrize("slots", [[], [96, 96], [96, 96, 95], [128, 128, 128], [0, 192, 96]])
def test_chunks_that_say_nothing_or_nonsense_fail_the_request(decoding, daemon, handle, slots):
    daemon.slots = slots
    _, state = decode(decoding, handle)
    assert "do not say how many slots its layers keep" in state.request.failed


def test_a_daemon_that_does_not_answer_fails_the_request_and_is_asked_again(decoding, daemon, handle):
    daemon.slots = "its first slots are not in DRAM"
    _, state = decode(decoding, handle)
    assert state.request.failed == daemon.slots
    daemon.slots = list(LAYERS)
    assert decode(decoding, handle)[0] == (96, True)


def test_workers_are_told_at_every_step(decoding, daemon, handle, monkeypatch):
    monkeypatch.setattr(compat, "block_tables", lambda output, request_id: ([5, 6, 7],))
    _, state = decode(decoding, handle)
    decoding._ragged["r"] = state
    metadata = KvernMetadata()
    output = types.SimpleNamespace(num_scheduled_tokens={"r": 1})
    assert decoding.plan_step(metadata, output) == 0
    assert [(order.first_block, order.slots) for order in metadata.ragged] == [(5, state.ragged_slots)]
    decoding.ended("r")
    assert decoding.plan_step(metadata, output) == 0 and len(metadata.ragged) == 1
