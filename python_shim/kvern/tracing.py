"""OpenTelemetry spans of the engine's side, for requests that vLLM brings a trace context with.

Spans go to the tracer provider of the process, which vLLM sets up with --otlp-traces-endpoint: ending one puts it into that
provider's queue, and nothing here waits or raises. What is handed on to the daemon is the W3C traceparent of the span, or,
where no spans are recorded here, that of the request.
"""

import logging
import time

from kvern.guard import log_once

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    trace = None

_MAX_BYTES = 256  # a traceparent has 55; later versions of the standard may have more


def traceparent_of(request) -> str:
    """The request's, "" where it has none."""
    headers = getattr(request, "trace_headers", None)
    if not headers:
        return ""
    text = headers.get("traceparent", "")
    if not isinstance(text, str) or len(text) > _MAX_BYTES or not text.isascii():
        return ""
    if text and trace is None:
        log_once(
            logging.WARNING,
            "Kvern: requests bring trace contexts, but the package opentelemetry-api is not there: the daemon's spans join "
            "their traces, the connector has none of its own.",
        )
    return text


class Span:
    """traceparent: of this span, for those who work for it."""

    def __init__(self, traceparent: str = "", span=None):
        self.traceparent = traceparent
        self._span = span
        self._start = time.time_ns()

    def end(self, *, seconds: float | None = None, error: str = "", **attributes) -> None:
        """seconds: how long it took, where that is known better than by now. attributes: kvern.<name>. A second end does
        nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        try:
            for name, value in attributes.items():
                span.set_attribute(f"kvern.{name}", value)
            if error:
                span.set_status(trace.Status(trace.StatusCode.ERROR, error))
            span.end(self._start + int(seconds * 1e9) if seconds else None)
        except Exception as problem:
            _tell(problem)


def begin(name: str, traceparent: str, **attributes) -> Span:
    """Never fails; records nothing without a traceparent, and hands on none that is malformed."""
    if not traceparent or trace is None:
        return Span(traceparent)
    try:
        propagator = TraceContextTextMapPropagator()
        context = propagator.extract({"traceparent": traceparent})
        if not trace.get_current_span(context).get_span_context().is_valid:
            return Span()
        span = trace.get_tracer("kvern").start_span(
            name, context=context, attributes={f"kvern.{key}": value for key, value in attributes.items()}
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, trace.set_span_in_context(span))
        return Span(carrier.get("traceparent", traceparent), span)
    except Exception as problem:
        _tell(problem)
        return Span(traceparent)


def _tell(problem: Exception) -> None:
    log_once(logging.WARNING, "Kvern: a span was not recorded: %s.", type(problem).__name__)
