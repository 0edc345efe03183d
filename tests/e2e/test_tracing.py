"""One trace from the header of a request through vLLM and the connector to the daemon."""

import secrets

import pytest

from collector import TRACES, Collector
from models import random_llama
from prompts import tokens


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def engine(stage, collector):
    stage.start_daemon(
        {"tracing.endpoint": collector.endpoint, "tracing.sample_one_in": 0, "tracing.interval_ms": 100}
    )
    # vLLM's own spans, and the connector's, go to the same collector.
    return stage.engine(
        random_llama(),
        otlp_traces_endpoint=collector.endpoint + TRACES,
        environment={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"},
    ).wait_started()


def test_a_request_has_one_trace_from_its_header_to_the_daemon(engine, collector):
    trace, root = secrets.token_hex(16), secrets.token_hex(8)
    text = tokens("traced", length=600)
    headers = {"trace_headers": {"traceparent": f"00-{trace}-{root}-01"}}
    cold = engine.generate(text, **headers)
    engine.forget_kv()
    warm = engine.generate(text, **headers)
    assert warm.cached_tokens == 576 and warm.tokens == cold.tokens

    wanted = {"kvern.lookup", "kvern.store", "kvern.load", "kvern.reserve", "kvern.commit", "kvern.encode", "kvern.fetch"}
    spans = collector.wait(
        lambda all_: wanted <= {span.name for span in all_ if span.trace_id == trace} and
        any(span.name == "llm_request" and span.trace_id == trace for span in all_),
        "the trace of the request",
    )
    spans = [span for span in spans if span.name.startswith("kvern.")]
    assert {span.trace_id for span in spans} == {trace}
    by_id = {span.span_id: span for span in spans}

    def parents(name):
        return {by_id[span.parent_id].name if span.parent_id in by_id else span.parent_id for span in spans if span.name == name}

    for name in ("kvern.lookup", "kvern.store", "kvern.load"):
        assert parents(name) == {root}, name
    assert parents("kvern.reserve") == parents("kvern.commit") == {"kvern.store"}
    assert parents("kvern.encode") == {"kvern.commit"}
    assert parents("kvern.fetch") == {"kvern.load"}
    (load,) = [span for span in spans if span.name == "kvern.load"]
    assert load.attributes["kvern.raw_bytes"] > 0 and load.error is None


def test_requests_without_a_trace_leave_no_spans(engine, collector):
    before = len([span for span in collector.spans() if span.name.startswith("kvern.")])
    engine.generate(tokens("not traced", length=600))
    trace = secrets.token_hex(16)
    headers = {"trace_headers": {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}}
    engine.generate(tokens("traced after", length=600), **headers)
    spans = collector.wait(
        lambda all_: any(span.trace_id == trace and span.name == "kvern.commit" for span in all_), "the next trace"
    )
    new = [span for span in spans if span.name.startswith("kvern.")][before:]
    assert {span.trace_id for span in new} == {trace}
