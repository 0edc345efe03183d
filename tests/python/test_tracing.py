"""Spans of the engine's side, over the fake native half: whose they are, what they hand on, and that they hurt nobody."""

import types

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvern import guard, tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ROOT = "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{ROOT}-01"
HEADERS = {"trace_headers": {"traceparent": PARENT, "tracestate": "vendor=1"}}


@pytest.fixture
def exporter(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    return exporter


def prompt_of(count: int) -> list[int]:
    return [(7919 + i * i * 31 + i) % 500 for i in range(count)]


def store_and_load(engine, **options):
    one = engine()
    for _ in range(2):
        request = one.add(prompt_of(512), **options)
        one.run(request)
        one.settle()
        one.forget()
    assert one.connector._scheduler.all_errors == 0 and one.workers[0]._worker.errors == 0
    return one


def test_look_up_load_and_store_are_spans_of_the_requests_trace(engine, store, exporter):
    store_and_load(engine, **HEADERS)
    spans = exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    assert {f"{span.parent.span_id:016x}" for span in spans} == {ROOT}
    by_name = {span.name: span for span in spans}  # the last of each name
    assert set(by_name) == {"kvern.lookup", "kvern.load", "kvern.store"}
    assert by_name["kvern.lookup"].attributes["kvern.tokens"] == 512
    assert by_name["kvern.load"].attributes["kvern.raw_bytes"] > 0
    assert by_name["kvern.load"].status.status_code.name == "UNSET"
    # What works for a span is its child.
    handed_on = {kind: text for kind, text in store.traceparents if text}
    assert handed_on["match"].split("-")[2] == f"{by_name['kvern.lookup'].context.span_id:016x}"
    assert handed_on["load"].split("-")[2] == f"{by_name['kvern.load'].context.span_id:016x}"
    assert all(text.split("-")[1] == TRACE for text in handed_on.values())


def test_a_request_without_a_trace_has_no_spans(engine, store, exporter):
    store_and_load(engine)
    assert not exporter.get_finished_spans()
    assert {text for _, text in store.traceparents} == {""}


def test_a_failed_load_is_an_error_of_its_span(engine, store, exporter):
    one = engine()
    one.run(one.add(prompt_of(512)))
    one.settle()
    one.forget()
    store.fail_loads = True
    one.run(one.add(prompt_of(512), **HEADERS))
    (load,) = [span for span in exporter.get_finished_spans() if span.name == "kvern.load"]
    assert load.status.status_code.name == "ERROR" and load.status.description


def test_without_the_sdk_the_requests_own_context_reaches_the_daemon(engine, store, monkeypatch, caplog):
    monkeypatch.setattr(tracing, "trace", None)
    monkeypatch.setattr(guard, "_said", set())
    monkeypatch.setattr(guard.logger, "propagate", True)
    store_and_load(engine, **HEADERS)
    assert {text for _, text in store.traceparents} == {PARENT}
    assert sum("opentelemetry-api is not there" in record.getMessage() for record in caplog.records) == 1


def test_a_provider_that_fails_costs_its_spans_only(engine, store, monkeypatch):
    def broken(*_):
        raise RuntimeError("no tracer today")

    monkeypatch.setattr(tracing.trace, "get_tracer", broken)
    store_and_load(engine, **HEADERS)
    assert {text for _, text in store.traceparents} == {PARENT}


@pytest.mark.parametrize("odd", [None, {}, {"traceparent": 7}, {"traceparent": "ü"}, {"traceparent": "0" * 1000}])
def test_headers_that_hold_no_traceparent_are_none(odd):
    assert tracing.traceparent_of(types.SimpleNamespace(trace_headers=odd)) == ""
    assert tracing.traceparent_of(types.SimpleNamespace()) == ""


def test_a_malformed_traceparent_is_none(exporter):
    span = tracing.begin("kvern.load", "00-nonsense")
    span.end()
    assert span.traceparent == "" and not exporter.get_finished_spans()
