"""Counters on their way to vLLM's log and to its /metrics endpoint."""

import collections
import re
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# name -> (help, label or None). Counters; Prometheus adds "_total".
COUNTERS = {
    "hit_tokens": ("Prompt tokens that Kvern promised to restore", None),
    "requested_tokens": ("Prompt tokens that vLLM asked Kvern for", None),
    "misses": ("Look-ups that found nothing of use", "reason"),
    "loads": ("Loads that ended with all bytes verified", None),
    "load_failures": ("Loads that failed; the request is recomputed or fails, as kv_load_failure_policy says", "reason"),
    "load_bytes": ("Bytes written into the engine's pages", None),
    "load_encoded_bytes": ("Bytes read from the store for them", None),
    "stores": ("Store jobs that ended", None),
    "store_failures": ("Store jobs of which some chunk was not stored", "reason"),
    "stored_chunks": ("Chunks that others can read now", None),
    "store_bytes": ("Bytes gathered from the engine's pages", None),
    "stores_skipped": ("Chunks that were not stored", "reason"),
    "stores_deferred": ("Times that a store was put off since too many blocks were held", None),
    "compactions": ("Prompts that were handed over for a compact cache", None),
    "compaction_failures": ("Of these, what the daemon did not take", "reason"),
    "compactions_refused": ("Requests for a compact cache that were refused", "reason"),
    "handles_failed": ("Requests that failed since their compact cache could not be had", "reason"),
    "rewrites_refused": ("Requests that brought their compact cache's whole prompt and had it computed", "reason"),
    "disconnections": ("Sessions with the daemon that were lost or never came about", None),
    "callback_errors": ("Callbacks that failed inside Kvern", None),
}
GAUGES = {
    "jobs_in_flight": "Loads and stores that are under way",
    "held_blocks": "KV blocks that wait for their store",
    "connected": "1 while there is a session with the daemon",
}
HISTOGRAMS = {
    "load_seconds": "From the order to verified bytes in the pages",
    "store_seconds": "From the order until others can read the chunks",
}
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_MAX_OBSERVATIONS = 1000  # per interval and histogram; more would only be a load for vLLM's logger
_MAX_REASONS = 50  # distinct label values, so that no text from outside makes metrics grow without end


def label_of(reason: str) -> str:
    """Of a metric: numbers would make one for each request."""
    return re.sub(r"\d+", "N", reason.split(":")[0])[:60]


class KvernStats(KVConnectorStats):
    """data = {"counters": {name or "name|label": n}, "gauges": {name: value}, "observations": {name: [seconds]}}"""

    def __init__(self, data: dict[str, Any] | None = None):
        super().__init__(data=data if data else {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {"counters": {}, "gauges": {}, "observations": {}}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        counters, gauges, observations = (self.data[key] for key in ("counters", "gauges", "observations"))
        for name, value in other.data["counters"].items():
            counters[name] = counters.get(name, 0) + value
        gauges.update(other.data["gauges"])  # they come from the scheduler side alone
        for name, values in other.data["observations"].items():
            observations[name] = (observations.get(name, []) + values)[:_MAX_OBSERVATIONS]
        return self

    def reduce(self) -> dict[str, int | float]:
        result: dict[str, int | float] = {}
        for name, value in sorted(self.data["counters"].items()):
            result[f"kvern {name.replace('|', ': ').replace('_', ' ')}"] = value
        for name, values in sorted(self.data["observations"].items()):
            if values:
                result[f"kvern mean {name.replace('_', ' ')}"] = round(sum(values) / len(values), 4)
        return result

    def is_empty(self) -> bool:
        """Whether there is nothing to log: vLLM's log makes these of the data that it gets, and lines of those that are
        not empty."""
        return not self.data["counters"] and not self.data["observations"]


class KvernUpdate(KvernStats):
    """As they leave the connector. vLLM's scheduler drops those that are empty, and a gauge alone is none of them."""

    def is_empty(self) -> bool:
        return super().is_empty() and not self.data["gauges"]


class Recorder:
    """Collects on one side of the connector until vLLM asks."""

    def __init__(self):
        self._stats = KvernUpdate()
        self._gauges: dict[str, float] = {}
        self._told: dict[str, float] = {}  # gauges, as of the last update
        self._reasons: collections.Counter = collections.Counter()

    def count(self, name: str, value: float = 1, label: str = "") -> None:
        if label:
            if label not in self._reasons and len(self._reasons) >= _MAX_REASONS:
                label = "other"
            self._reasons[label] += 1
            name = f"{name}|{label}"
        counters = self._stats.data["counters"]
        counters[name] = counters.get(name, 0) + value

    def observe(self, name: str, seconds: float) -> None:
        values = self._stats.data["observations"].setdefault(name, [])
        if len(values) < _MAX_OBSERVATIONS:
            values.append(seconds)

    def gauge(self, name: str, value: float) -> None:
        self._gauges[name] = value

    def take(self) -> KvernUpdate | None:
        """What is new since the last call; None if nothing is."""
        if self._stats.is_empty() and self._gauges == self._told:
            return None
        stats, self._stats = self._stats, KvernUpdate()
        stats.data["gauges"] = self._told = dict(self._gauges)
        return stats


class KvernPromMetrics(KVConnectorPromMetrics):
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labelled = {}
        self._plain = {}
        for name, (text, label) in COUNTERS.items():
            names = list(labelnames) + ([label] if label else [])
            metric = self._counter_cls(name=f"vllm:kvern_{name}", documentation=f"{text}.", labelnames=names)
            if label:
                self._labelled[name] = metric
            else:
                self._plain[name] = self._per_engine(metric)
        for name, text in GAUGES.items():
            metric = self._gauge_cls(
                name=f"vllm:kvern_{name}", documentation=f"{text}.", labelnames=list(labelnames), multiprocess_mode="sum"
            )
            self._plain[name] = self._per_engine(metric)
        for name, text in HISTOGRAMS.items():
            metric = self._histogram_cls(
                name=f"vllm:kvern_{name}", documentation=f"{text}.", labelnames=list(labelnames), buckets=list(_BUCKETS)
            )
            self._plain[name] = self._per_engine(metric)

    def _per_engine(self, metric) -> dict:
        return {index: metric.labels(*values) for index, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.get("counters", {}).items():
            name, _, label = key.partition("|")
            if name in self._labelled:
                self._labelled[name].labels(*self.per_engine_labelvalues[engine_idx], label or "other").inc(value)
            elif name in self._plain:
                self._plain[name][engine_idx].inc(value)
        for name, value in transfer_stats_data.get("gauges", {}).items():
            if name in self._plain:
                self._plain[name][engine_idx].set(value)
        for name, values in transfer_stats_data.get("observations", {}).items():
            if name in self._plain:
                for seconds in values:
                    self._plain[name][engine_idx].observe(seconds)
