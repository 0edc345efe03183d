"""Spans of a real kvernd at a real, if small, OTLP/HTTP collector; and what it does when that one fails."""

import itertools
import secrets

import pytest

from collector import Collector
from daemon import Daemon
from engine import free_port
from load import Load

CHUNKS = 2  # per prompt, of 2 MiB
QUEUE = 16


def traceparent(sampled: bool = True) -> tuple[str, str]:
    """(text, trace id)"""
    trace = secrets.token_hex(16)
    return f"00-{trace}-{secrets.token_hex(8)}-{'01' if sampled else '00'}", trace


def settings(folder, endpoint: str, **changes) -> dict:
    return {
        "store.dram_bytes": "16MiB",  # three prompts
        "nvme.files": str(folder / "nvme"),
        "nvme.bytes": "256MiB",
        "nvme.sync": False,
        "tracing.endpoint": endpoint,
        "tracing.sample_one_in": 0,
        "tracing.interval_ms": 50,
        **changes,
    }


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def start(tmp_path):
    """Starts a daemon with spans and a stand-in for an engine on it."""
    started = []

    def make(endpoint: str, **changes) -> tuple[Daemon, Load]:
        daemon = Daemon(tmp_path, settings(tmp_path, endpoint, **changes)).start()
        started.append(daemon)
        load = Load(daemon.address, CHUNKS)
        started.append(load)
        return daemon, load

    yield make
    for each in reversed(started):
        each.destroy() if isinstance(each, Daemon) else each.close()


def of_trace(spans, trace: str, name: str):
    return [span for span in spans if span.trace_id == trace and span.name == name]


def test_the_spans_of_a_request_join_its_trace_from_store_to_tier_and_back(collector, start):
    daemon, load = start(collector.endpoint, **{"codec.default": "int8"})
    parent, stored = traceparent()
    load.store(0, traceparent=parent)
    others = itertools.count(1)
    while daemon.metric("kvern_removed_chunks_total") < CHUNKS:  # of these nothing is recorded
        load.store(next(others))
    again, loaded = traceparent()
    assert load.load(0, traceparent=again) == CHUNKS * 256

    spans = collector.wait(lambda all_: of_trace(all_, stored, "kvern.tier.write"), "write-through")
    spans = collector.wait(lambda all_: len(of_trace(all_, loaded, "kvern.fetch")) == CHUNKS, "load")
    assert {span.trace_id for span in spans} == {stored, loaded}
    assert {span.service for span in spans} == {"kvernd"}
    assert not [span for span in spans if span.error]

    (reserve,) = of_trace(spans, stored, "kvern.reserve")
    (commit,) = of_trace(spans, stored, "kvern.commit")
    assert reserve.parent_id == commit.parent_id == parent.split("-")[2]
    assert reserve.attributes["kvern.client"] == "load worker" and reserve.attributes["kvern.reserved"] == CHUNKS
    encoded = of_trace(spans, stored, "kvern.encode")
    assert len(encoded) == CHUNKS and {span.parent_id for span in encoded} == {commit.span_id}
    for span in encoded:
        assert span.attributes["kvern.tokens"] == 256 and span.attributes["kvern.codec"].startswith("int8")
        assert 0 < span.attributes["kvern.encoded_bytes"] < span.attributes["kvern.raw_bytes"]
    written = of_trace(spans, stored, "kvern.tier.write")
    assert {span.parent_id for span in written} <= {span.span_id for span in encoded}
    assert {span.attributes["kvern.tier"] for span in written} == {"nvme"}

    prefetch = of_trace(spans, loaded, "kvern.prefetch")
    read = of_trace(spans, loaded, "kvern.tier.read")
    assert len(prefetch) == 1 and read and {span.parent_id for span in read} == {prefetch[0].span_id}
    fetched = of_trace(spans, loaded, "kvern.fetch")  # a piece of several chunks is fetched from its end on
    assert sum(span.attributes["kvern.tokens"] for span in fetched) == CHUNKS * 256
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        root = span
        while root.parent_id in by_id:
            root = by_id[root.parent_id]
        assert root.parent_id in (parent.split("-")[2], again.split("-")[2]), f"{span.name} hangs in the air"


def test_nothing_is_recorded_of_requests_that_the_engine_does_not_record(collector, start):
    daemon, load = start(collector.endpoint)
    load.store(0, traceparent=traceparent(sampled=False)[0])
    load.store(1, traceparent="no traceparent at all")
    load.store(2)
    parent, trace = traceparent()
    load.store(3, traceparent=parent)
    daemon.stop()  # sends what is left
    assert {span.trace_id for span in collector.spans()} == {trace}


def test_without_a_trace_of_the_engine_every_nth_request_has_one_of_its_own(collector, start):
    daemon, load = start(collector.endpoint, **{"tracing.sample_one_in": 1})
    load.store(0)
    load.load(0)
    daemon.stop()
    spans = collector.spans()
    assert {"kvern.reserve", "kvern.commit", "kvern.encode", "kvern.fetch"} <= {span.name for span in spans}
    roots = [span for span in spans if not span.parent_id]
    assert roots and len({span.trace_id for span in roots}) == len(roots)


def test_log_lines_of_a_request_carry_its_trace_id(collector, start):
    daemon, load = start(collector.endpoint, **{"log.level": "debug", "log.lines_per_second": 0})
    parent, trace = traceparent()
    load.store(0, traceparent=parent)
    daemon.stop()
    assert f"trace={trace}" in daemon.log.read_text()


# What is sent again keeps the queue full meanwhile; what is refused for good is dropped at once.
@pytest.mark.parametrize("answer, reason", [(500, "collector"), (400, "collector"), (429, "queue_full"), (503, "queue_full")])
def test_a_collector_that_refuses_costs_spans_and_nothing_else(collector, start, answer, reason):
    collector.answer = answer
    daemon, load = start(collector.endpoint, **{"tracing.queue_spans": QUEUE})
    load.store(0, traceparent=traceparent()[0])
    collector.wait_for_requests(1)
    while daemon.metric("kvern_trace_spans_dropped_total", reason=reason) == 0:
        assert load.load(0, traceparent=traceparent()[0]) == CHUNKS * 256
    assert daemon.metric("kvern_trace_spans_exported_total") == 0
    daemon.wait_quiet()


def test_a_slow_collector_costs_spans_and_nobody_waits_for_it(collector, start):
    collector.open.clear()
    daemon, load = start(collector.endpoint, **{"tracing.queue_spans": QUEUE, "tracing.timeout_ms": 600_000})
    load.store(0, traceparent=traceparent()[0])
    collector.wait_for_requests(1)
    while daemon.metric("kvern_trace_spans_dropped_total", reason="queue_full") == 0:
        assert load.load(0, traceparent=traceparent()[0]) == CHUNKS * 256
    assert daemon.metric("kvern_trace_spans_exported_total") == 0
    collector.open.set()
    daemon.wait_metric("kvern_trace_spans_exported_total", lambda value: value > 0)


def test_a_collector_may_come_later(start):
    port = free_port()
    daemon, load = start(f"http://127.0.0.1:{port}", **{"tracing.queue_spans": QUEUE})
    load.store(0, traceparent=traceparent()[0])
    while daemon.metric("kvern_trace_spans_dropped_total") == 0:
        assert load.load(0, traceparent=traceparent()[0]) == CHUNKS * 256
    collector = Collector(port)
    try:
        parent, trace = traceparent()
        while not [span for span in collector.spans() if span.trace_id == trace]:
            load.load(0, traceparent=parent)
    finally:
        daemon.stop()
        collector.close()
