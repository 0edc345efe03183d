"""A small OpenTelemetry collector: takes OTLP over HTTP, in JSON and in protobuf, and keeps the spans."""

import base64
import copy
import dataclasses
import http.server
import json
import threading
import time

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACES = "/v1/traces"
PATIENCE_SECONDS = 60


@dataclasses.dataclass
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    seconds: float
    attributes: dict
    error: str | None


def _from_json(text: bytes) -> ExportTraceServiceRequest:
    """Reads it by the schema and refuses all that the schema does not have. OTLP's JSON writes ids as hexadecimal digits,
    where protobuf's has base64, and enums as numbers only."""
    request = copy.deepcopy(json.loads(text))
    for resource in request["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                assert isinstance(span["kind"], int) and isinstance(span.get("status", {}).get("code", 0), int)
                for time_field in ("startTimeUnixNano", "endTimeUnixNano"):
                    assert isinstance(span[time_field], str)
                for field, size in (("traceId", 16), ("spanId", 8), ("parentSpanId", 8)):
                    if field in span:
                        raw = bytes.fromhex(span[field])
                        assert len(raw) == size and any(raw)
                        span[field] = base64.b64encode(raw).decode()
    return json_format.ParseDict(request, ExportTraceServiceRequest(), ignore_unknown_fields=False)


def _value(value):
    return getattr(value, value.WhichOneof("value"))


def _spans(request: ExportTraceServiceRequest):
    for resource in request.resource_spans:
        facts = {each.key: _value(each.value) for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service=facts.get("service.name", ""),
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                    attributes={each.key: _value(each.value) for each in span.attributes},
                    error=span.status.message if span.status.code == 2 else None,
                )


class Collector:
    """answer: status of all answers, to be changed at any time. While `open` is not set no request is answered."""

    def __init__(self, port: int = 0):
        self.answer = 200
        self.open = threading.Event()
        self.open.set()
        self.requests = 0
        self.problems: list[str] = []
        self._spans: list[Span] = []
        self._changed = threading.Condition()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector._take(self.path, self.headers["Content-Type"], body)
                collector.open.wait()
                self.send_response(collector.answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except OSError:  # the other side has given up
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _take(self, path: str, kind: str, body: bytes) -> None:
        with self._changed:
            self.requests += 1
            try:
                assert path == TRACES, path
                request = _from_json(body) if kind == "application/json" else ExportTraceServiceRequest.FromString(body)
                if self.answer == 200:
                    self._spans += _spans(request)
            except Exception as problem:
                self.problems.append(f"{type(problem).__name__}: {problem}: {body[:500]!r}")
            self._changed.notify_all()

    def wait(self, wanted, what: str = ""):
        """Waits until wanted(spans) is true; returns the spans."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while not wanted(self._spans):
                left = deadline - time.monotonic()
                names = sorted({span.name for span in self._spans})
                assert left > 0 and not self.problems, f"{what}: {self.problems or names}"
                self._changed.wait(left)
            return list(self._spans)

    def wait_for_requests(self, number: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while self.requests < number:
                left = deadline - time.monotonic()
                assert left > 0, f"{self.requests} of {number} requests came"
                self._changed.wait(left)

    def spans(self) -> list[Span]:
        with self._changed:
            assert not self.problems, self.problems
            return list(self._spans)

    def close(self) -> None:
        self.open.set()
        self._server.shutdown()
        self._server.server_close()
