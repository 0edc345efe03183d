"""`vllm serve` as users run it: three processes, HTTP, metrics on vLLM's own endpoint."""

import pytest
import requests

from expressions import NEEDS_ENGINE, finite, panel_queries
from models import smollm2
from prometheus_server import Prometheus
from prompts import prose


@pytest.fixture(scope="module")
def server(stage):
    stage.start_daemon()
    return stage.server(smollm2()).wait_started()


def test_a_prompt_is_restored_over_http(stage, server):
    text = prose("serve", length=1000)
    cold = server.complete(text)
    stage.daemon.wait_quiet()
    hit = server.complete(text)
    server.reset_prefix_cache()
    restored = server.complete(text)
    assert (hit["cached_tokens"], restored["cached_tokens"]) == (992, 992)
    assert restored["text"] == hit["text"] == cold["text"]
    assert server.metric("vllm:external_prefix_cache_hits_total") >= 992
    print(f"first token: cold {cold['ttft']:.2f} s, prefix hit {hit['ttft']:.2f} s, restored {restored['ttft']:.2f} s")


def test_kverns_metrics_are_on_vllms_endpoint(server):
    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    assert any("kvern" in line and not line.startswith("#") for line in lines)


# Panels of counters that have a series for each reason, once there is one; these queries are only run.
TROUBLE = ("Loads that failed", "Stores that failed", "Chunks not stored")


def test_dashboards_and_rules_of_the_engines_side_have_data(stage, server, tmp_path):
    prometheus = Prometheus(tmp_path, stage.daemon.http_port, server.port).wait_ready()
    try:
        for i in range(2):  # rates need series that grow
            text = prose("dashboards", i, length=400)
            server.complete(text)
            stage.daemon.wait_quiet()
            server.reset_prefix_cache()
            assert server.complete(text)["cached_tokens"] == 384
            prometheus.wait_scrapes(2)
        asked = [(where, expression) for where, expression in panel_queries() if NEEDS_ENGINE.search(expression)]
        for where, expression in asked:
            prometheus.query(expression)
        asked = [(where, expression) for where, expression in asked if not any(panel in where for panel in TROUBLE)]
        assert len(asked) > 10
        prometheus.wait(
            lambda: all(finite(prometheus.query(expression)) for _, expression in asked),
            "there is data for all of " + ", ".join(where for where, _ in asked),
        )
        rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
        assert [rule for rule in rules if rule["health"] != "ok"] == []
        assert [alert for alert in prometheus.api("alerts")["alerts"] if alert["state"] == "firing"] == []
    finally:
        prometheus.kill()


def test_a_client_that_hangs_up_during_a_load_leaves_nothing_behind(stage, server):
    text = prose("hang up", length=1000)
    server.complete(text)
    server.reset_prefix_cache()
    with pytest.raises((requests.Timeout, requests.ConnectionError)):
        server.complete(text, max_tokens=1000, seconds=0.05)
    server.reset_prefix_cache()
    stage.daemon.wait_quiet()
    assert server.complete(text)["cached_tokens"] == 992


def test_the_server_outlives_the_daemon(stage, server):
    text = prose("outlive", length=500)
    cold = server.complete(text)
    stage.daemon.kill()
    server.reset_prefix_cache()
    alone = server.complete(text)
    assert alone["text"] == cold["text"]
    stage.daemon.start()
    stage.daemon.wait_sessions(2)
    server.reset_prefix_cache()
    server.complete(text)
    stage.daemon.wait_quiet()
    server.reset_prefix_cache()
    restored = server.complete(text)
    assert restored["cached_tokens"] == 480
    assert restored["text"] == cold["text"]
