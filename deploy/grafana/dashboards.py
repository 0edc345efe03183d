#!/usr/bin/env python3
"""Writes Grafana's dashboards: python3 deploy/grafana/dashboards.py. What a panel shows is said here and nowhere else; the
JSON files beside this one are what it wrote, and a test compares them."""

import dataclasses
import json
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
WIDTH = 24  # of Grafana's grid
PANEL_HEIGHT = 8
OF = 'instance=~"$instance"'
EVERY = "[$__rate_interval]"


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[tuple[str, str], ...]  # (expression, legend)
    unit: str = "short"  # a unit of Grafana's
    kind: str = "timeseries"
    text: str = ""

    def json(self, number: int, x: int, y: int, width: int) -> dict:
        return {
            "id": number,
            "title": self.title,
            "description": self.text,
            "type": self.kind,
            "datasource": {"type": "prometheus", "uid": "$datasource"},
            "gridPos": {"x": x, "y": y, "w": width, "h": PANEL_HEIGHT},
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
                for i, (expression, legend) in enumerate(self.queries)
            ],
        }


def rate(metric: str, by: str = "instance", labels: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{OF}{labels}}}{EVERY}))"


def rate_or_zero(metric: str, by: str) -> str:
    """Of vLLM's counters that have no series before they first count."""
    return f"{rate(metric, f'instance, {by}')} or 0 * {gauge('vllm:kvern_connected')}"


def quantile(share: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({share}, {rate(metric + '_bucket', ', '.join(filter(None, [by, 'le'])))})"


def gauge(metric: str, by: str = "instance", labels: str = "") -> str:
    return f"sum by ({by}) ({metric}{{{OF}{labels}}})"


def one(title: str, expression: str, legend: str, unit: str = "short", **more) -> Panel:
    return Panel(title, ((expression, legend),), unit, **more)


def p50_p99(title: str, metric: str, by: str = "", **more) -> Panel:
    legend = "".join(f" {{{{{label}}}}}" for label in by.split(", ") if label)
    return Panel(
        title,
        ((quantile(0.5, metric, by), f"p50{legend}"), (quantile(0.99, metric, by), f"p99{legend}")),
        "s",
        **more,
    )


OVERVIEW = (
    one("Hit rate in tokens", f"instance:kvern_hit_tokens:ratio_rate5m{{{OF}}}", "{{instance}}", "percentunit"),
    Panel(
        "Prompt tokens",
        (
            (rate("kvern_requested_tokens_total"), "asked for {{instance}}"),
            (rate("kvern_hit_tokens_total"), "found {{instance}}"),
            (rate("kvern_loaded_tokens_total"), "loaded {{instance}}"),
        ),
        "cps",
    ),
    one("Tokens that came up from lower tiers", rate("kvern_promoted_tokens_total", "tier"), "{{tier}}", "cps"),
    one("Tokens that were not served, by reason", rate("kvern_miss_tokens_total", "reason"), "{{reason}}", "cps"),
    one("Fill of tiers", f"instance_tier:kvern_tier_used_bytes:ratio{{{OF}}}", "{{tier}} {{instance}}", "percentunit"),
    one("DRAM by form", gauge("kvern_form_bytes", "codec"), "{{codec}}", "bytes", text="How chunks are stored now"),
    one(
        "DRAM saved by compression",
        f"kvern_tier_raw_bytes{{{OF}}} - kvern_tier_encoded_bytes{{{OF}}}",
        "{{instance}}",
        "bytes",
    ),
    one("Sessions", gauge("kvern_sessions", "role"), "{{role}}"),
    one("Chunks that were not taken, by reason", rate("kvern_refused_total", "reason"), "{{reason}}", "cps"),
    Panel(
        "Errors",
        (
            (rate("kvern_failed_loads_total"), "failed loads {{instance}}"),
            (rate("kvern_quarantined_chunks_total"), "damaged in memory {{instance}}"),
            (rate("kvern_corrupt_objects_total", "tier"), "damaged in {{tier}}"),
            (rate("kvern_protocol_errors_total", "kind"), "protocol: {{kind}}"),
        ),
        "cps",
    ),
    one("Uptime", f"kvern_uptime_seconds{{{OF}}}", "{{instance}}", "s"),
    one("Versions", f"kvern_build_info{{{OF}}}", "{{version}} {{instance}}", kind="stat"),
)

COMPRESSION = (
    one(
        "Ratio of what is stored, by codec",
        f"{rate('kvern_stored_raw_bytes_total', 'codec')} / ({rate('kvern_stored_encoded_bytes_total', 'codec')} > 0)",
        "{{codec}}",
        text="Bytes before over bytes after encoding",
    ),
    one(
        "Ratio of the DRAM tier",
        f"kvern_tier_raw_bytes{{{OF}}} / (kvern_tier_encoded_bytes{{{OF}}} > 0)",
        "{{instance}}",
    ),
    one("Stored bytes before encoding", rate("kvern_stored_raw_bytes_total", "codec"), "{{codec}}", "Bps"),
    p50_p99("Time to encode a shard", "kvern_encode_seconds", "codec"),
    p50_p99("Time of a load at the engine, with decoding", "kvern_decode_seconds", "codec"),
    one("Cores that encoding takes", rate("kvern_encode_seconds_sum", "codec"), "{{codec}}"),
    one("Chunks by form", gauge("kvern_form_chunks", "codec"), "{{codec}}"),
    one(
        "Chunks by lossy encodings behind them",
        gauge("kvern_lossy_generation_chunks", "generations"),
        "{{generations}}",
    ),
    one("Steps down the ladder", rate("kvern_demotions_total", "codec"), "to {{codec}}", "cps"),
    one("Bytes that steps freed", rate("kvern_demotion_freed_bytes_total", "codec"), "to {{codec}}", "Bps"),
    Panel(
        "Error of steps",
        (
            (quantile(0.5, "kvern_demotion_error", "codec"), "p50 {{codec}}"),
            (quantile(0.99, "kvern_demotion_error", "codec"), "p99 {{codec}}"),
        ),
        "percentunit",
        text="Relative error of the attention output, with the steps before",
    ),
    p50_p99("Time of a step", "kvern_demotion_seconds", "codec"),
    one(
        "Steps that came to nothing, by reason",
        rate("kvern_demotions_refused_total", "reason"),
        "{{reason}}",
        "cps",
    ),
    one("Requests for compact caches, by outcome", rate("kvern_compactions_total", "outcome"), "{{outcome}}", "cps"),
    one("Compact caches by state", gauge("kvern_compact_caches", "state"), "{{state}}"),
    one(
        "Bytes of compact caches",
        gauge("kvern_compact_bytes"),
        "{{instance}}",
        "bytes",
        text="Of those that are ready, as they were stored",
    ),
    Panel(
        "Bytes of prompts and of their compact caches",
        (
            (rate("kvern_compacted_raw_bytes_total"), "prompts {{instance}}"),
            (rate("kvern_compacted_stored_bytes_total"), "compact caches {{instance}}"),
        ),
        "Bps",
    ),
    p50_p99("Time to make a compact cache", "kvern_compaction_seconds"),
    Panel(
        "Error of compact caches",
        ((quantile(0.5, "kvern_compaction_error"), "p50"), (quantile(0.99, "kvern_compaction_error"), "p99")),
        "percentunit",
        text="Relative error of the attention output, mean over the layers, where queries were captured",
    ),
)

TIERS = (
    one("Bytes in use", gauge("kvern_tier_used_bytes", "tier"), "{{tier}}", "bytes"),
    one("Chunks", gauge("kvern_tier_chunks", "tier"), "{{tier}}"),
    one("Bandwidth", rate("kvern_tier_bytes_total", "tier, operation"), "{{tier}} {{operation}}", "Bps"),
    one(
        "Operations by outcome",
        rate("kvern_tier_operations_total", "tier, operation, outcome"),
        "{{tier}} {{operation}} {{outcome}}",
        "cps",
    ),
    p50_p99("Latency", "kvern_tier_operation_seconds", "tier, operation"),
    one(
        "Share of operations that fail",
        f"instance_tier:kvern_tier_errors:ratio_rate5m{{{OF}}}",
        "{{tier}} {{instance}}",
        "percentunit",
    ),
    one("Breaker: 0 closed, 1 half open, 2 open", f"kvern_tier_breaker_state{{{OF}}}", "{{tier}} {{instance}}"),
    one("Bytes that wait to be written", gauge("kvern_tier_queued_bytes", "tier"), "{{tier}}", "bytes"),
    one("Operations under way", gauge("kvern_tier_outstanding_operations", "tier"), "{{tier}}"),
    Panel(
        "Chunks between tiers",
        (
            (rate("kvern_promoted_chunks_total", "tier"), "up from {{tier}}"),
            (rate("kvern_saved_chunks_total", "tier"), "written to {{tier}}"),
            (rate("kvern_unsaved_chunks_total", "tier"), "given up for {{tier}}"),
        ),
        "cps",
    ),
    one("Chunks that left DRAM, by reason", rate("kvern_removed_chunks_total", "reason"), "{{reason}}", "cps"),
    one("Look-ups that wait for a lower tier", gauge("kvern_prefetches"), "{{instance}}"),
    one(
        "Index in use",
        f"instance:kvern_index_slots_used:ratio{{{OF}}}",
        "{{instance}}",
        "percentunit",
        text="No new blocks go in at 75%",
    ),
    Panel(
        "DRAM of tenants with a quota",
        (
            (gauge("kvern_tenant_used_bytes", "tenant"), "{{tenant}}"),
            (gauge("kvern_tenant_limit_bytes", "tenant"), "limit of {{tenant}}"),
        ),
        "bytes",
    ),
    one("Chunks refused at a tenant's quota", rate("kvern_tenant_refused_total", "tenant"), "{{tenant}}", "cps"),
)

ENGINE = (
    one("Connected", gauge("vllm:kvern_connected"), "{{instance}}"),
    Panel(
        "Prompt tokens",
        (
            (rate("vllm:kvern_requested_tokens_total"), "asked for {{instance}}"),
            (rate("vllm:kvern_hit_tokens_total"), "promised {{instance}}"),
        ),
        "cps",
    ),
    p50_p99("Load latency", "vllm:kvern_load_seconds"),
    p50_p99("Store latency", "vllm:kvern_store_seconds"),
    Panel(
        "Bytes loaded",
        (
            (rate("vllm:kvern_load_bytes_total"), "into pages {{instance}}"),
            (rate("vllm:kvern_load_encoded_bytes_total"), "from the store {{instance}}"),
        ),
        "Bps",
    ),
    one("Bytes gathered for stores", rate("vllm:kvern_store_bytes_total"), "{{instance}}", "Bps"),
    one("Look-ups without a hit, by reason", rate("vllm:kvern_misses_total", "reason"), "{{reason}}", "cps"),
    one("Loads that failed, by reason", rate("vllm:kvern_load_failures_total", "reason"), "{{reason}}", "cps"),
    one("Stores that failed, by reason", rate("vllm:kvern_store_failures_total", "reason"), "{{reason}}", "cps"),
    one("Chunks not stored, by reason", rate("vllm:kvern_stores_skipped_total", "reason"), "{{reason}}", "cps"),
    one("Blocks that wait for their store", gauge("vllm:kvern_held_blocks"), "{{instance}}"),
    Panel(
        "Trouble",
        (
            (rate("vllm:kvern_disconnections_total"), "disconnections {{instance}}"),
            (rate("vllm:kvern_callback_errors_total"), "callback errors {{instance}}"),
            (rate("vllm:kvern_stores_deferred_total"), "stores put off {{instance}}"),
        ),
        "cps",
    ),
    one(
        "Requests that failed for want of their compact cache, by reason",
        rate_or_zero("vllm:kvern_handles_failed_total", "reason"),
        "{{reason}} {{instance}}",
        "cps",
        text="Their clients get HTTP 500",
    ),
    one(
        "Prompts computed in place of their compact cache, by reason",
        rate_or_zero("vllm:kvern_rewrites_refused_total", "reason"),
        "{{reason}} {{instance}}",
        "cps",
    ),
    one("Prompts handed over for compact caches", rate("vllm:kvern_compactions_total"), "{{instance}}", "cps"),
    one(
        "Requests for compact caches that the engine refused, by reason",
        rate_or_zero("vllm:kvern_compactions_refused_total", "reason"),
        "{{reason}} {{instance}}",
        "cps",
    ),
)

SESSIONS = (
    one(
        "Sessions by role and data plane",
        gauge("kvern_sessions", "role, data_plane"),
        "{{role}} {{data_plane}}",
    ),
    one("Sessions that ended, by reason", rate("kvern_sessions_ended_total", "reason"), "{{reason}}", "cps"),
    one("Expired sessions whose process lives", gauge("kvern_lingering_sessions"), "{{instance}}"),
    Panel(
        "Held by sessions",
        (
            (gauge("kvern_leases"), "leases {{instance}}"),
            (gauge("kvern_reservations"), "reservations {{instance}}"),
            (gauge("kvern_pinned_chunks"), "chunks that a lease holds {{instance}}"),
            (gauge("kvern_in_flight_shards"), "shards on their way in {{instance}}"),
            (gauge("kvern_incomplete_chunks"), "chunks that lack ranks {{instance}}"),
        ),
    ),
    Panel(
        "Staging memory",
        (
            (gauge("kvern_staging_bytes"), "all {{instance}}"),
            (gauge("kvern_staging_used_bytes"), "in use {{instance}}"),
        ),
        "bytes",
    ),
    one("Requests by type", rate("kvern_requests_total", "type"), "{{type}}", "cps"),
    Panel(
        "Control messages",
        (
            (rate("kvern_control_requests_total"), "received {{instance}}"),
            (rate("kvern_dropped_replies_total"), "replies that nobody took {{instance}}"),
        ),
        "cps",
    ),
    one("Chunks that wait for an encode thread", gauge("kvern_encode_queue_length"), "{{instance}}"),
    p50_p99("Look-up, as the asker sees it", "kvern_match_seconds"),
    p50_p99("Reserve", "kvern_reserve_seconds"),
    p50_p99("Commit", "kvern_commit_seconds"),
    p50_p99("Fetch", "kvern_fetch_seconds"),
)

# file -> (title, panels, the metric whose instances can be chosen)
DASHBOARDS = {
    "overview": ("Kvern: overview", OVERVIEW, "kvern_build_info"),
    "compression": ("Kvern: compression and quality", COMPRESSION, "kvern_build_info"),
    "tiers": ("Kvern: tiers", TIERS, "kvern_build_info"),
    "engine": ("Kvern: engine side", ENGINE, "vllm:kvern_connected"),
    "sessions": ("Kvern: sessions", SESSIONS, "kvern_build_info"),
}


def variables(metric: str) -> list[dict]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "$datasource"},
            "query": f"label_values({metric}, instance)",
            "refresh": 2,  # when the time range changes
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def dashboard(name: str, columns: int = 2) -> dict:
    title, panels, metric = DASHBOARDS[name]
    width = WIDTH // columns
    return {
        "uid": f"kvern-{name}",
        "title": title,
        "tags": ["kvern"],
        "schemaVersion": 38,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Kvern", "tags": ["kvern"], "asDropdown": True, "keepTime": True}],
        "templating": {"list": variables(metric)},
        "panels": [
            panel.json(i + 1, i % columns * width, i // columns * PANEL_HEIGHT, width) for i, panel in enumerate(panels)
        ],
    }


def text(name: str) -> str:
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (HERE / f"{each}.json").write_text(text(each))
