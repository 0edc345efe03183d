"""Dashboards, rules and alerts against a real kvernd under load and a real Prometheus."""

import importlib.util
import itertools
import math
import pathlib
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

import dashboards
import pictures
from daemon import Daemon
from engine import ROOT
from expressions import NEEDS_ENGINE, finite, has_data, panel_queries, recorded, rules
from load import Load
from prometheus_server import RULES, Prometheus

# Metric names in an expression; recording rules have a colon in them, as vLLM's metrics have.
NAMES = re.compile(r"\b(?:instance\w*:|engine:|vllm:)?kvern_\w+(?::\w+)?|vllm:\w+")
SUFFIXES = re.compile(r"_(bucket|sum|count)$")

PROMPTS_IN_DRAM = 24  # more than it ever holds
DRIVE_SECONDS = 120  # the daemon's demoting threads have the lowest priority that there is


@pytest.fixture(scope="module")
def prometheus(daemon, tmp_path_factory):
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), daemon.http_port).wait_ready()
    yield server
    server.kill()


def test_a_fresh_and_idle_daemon_fires_no_alert(prometheus):
    prometheus.wait_scrapes(5)
    assert prometheus.query('up{job="kvernd"}') == [1]
    assert prometheus.query("count(kvern_uptime_seconds)") == [1]
    assert prometheus.api("alerts")["alerts"] == []


@pytest.fixture(scope="module")
def loaded(daemon, prometheus):
    """After two rounds of load with scrapes between them, so that rates see series grow. The sessions stay."""
    load = Load(daemon.address, chunks=8)
    prompts = itertools.count()
    before = drive(load, daemon, prompts, {})
    prometheus.wait_scrapes(2)
    drive(load, daemon, prompts, before)
    prometheus.wait_scrapes(2)
    yield load
    load.close()


def growing() -> set[str]:
    """Counters that must grow lest a quantile or a ratio be without value."""
    expressions = [each for _, each in panel_queries() if has_data(each)] + [rule["expr"] for rule in rules()]
    counts = {f"{name}_count" for each in expressions for name in re.findall(r"(?<!:)\b(kvern_\w+)_bucket", each)}
    assert counts
    return counts | {
        "kvern_promoted_chunks_total",
        "kvern_requested_tokens_total",
        "kvern_saved_chunks_total",
        "kvern_stored_encoded_bytes_total",
        "kvern_tier_operations_total",
    }


def drive(load: Load, daemon: Daemon, prompts: Iterator[int], before: dict) -> dict:
    """Stores and loads prompts until all counters of growing() have grown, and gives their series. Where there are series
    of before, the growth must be in one of them: only then is there a rate."""
    wanted = growing()
    deadline = time.monotonic() + DRIVE_SECONDS
    while True:
        prompt = next(prompts)
        load.store(prompt, "raw" if prompt % 8 == 0 else "")
        assert load.load(prompt) > 0
        if prompt >= PROMPTS_IN_DRAM:
            load.load(prompt - PROMPTS_IN_DRAM)  # has left DRAM: comes up from the file, if it was not lost
        series = {(name, *sorted(labels.items())): value for name, labels, value in daemon.metrics() if name in wanted}
        grown = {key[0] for key, value in series.items() if value > before.get(key, math.inf if before else 0)}
        if grown == wanted:
            return series
        assert time.monotonic() < deadline, f"after {DRIVE_SECONDS} s of load these stand still: {wanted - grown}"


def test_every_panel_shows_data(prometheus, loaded):
    empty = []
    for where, expression in panel_queries():
        values = prometheus.query(expression)  # fails if it does not parse
        if has_data(expression) and not finite(values):
            empty.append(f"{where}: {expression} gives {values}")
    assert not empty, "\n".join(empty)


def test_a_tenant_with_a_quota_has_what_its_panels_ask_for(tmp_path):
    daemon = Daemon(tmp_path, {"store.dram_bytes": "64MiB"})
    with daemon.config.open("a") as config:
        config.write('[[tenant]]\nname = "*"\ndram_share = 0.5\n')
    daemon.start()
    try:
        load = Load(daemon.address, chunks=2)
        load.store(0)
        asked = {name for _, expression in panel_queries() for name in re.findall(r"\bkvern_tenant_\w+", expression)}
        assert asked and asked <= {name for name, labels, _ in daemon.metrics() if labels.get("tenant")}
        assert daemon.metric("kvern_tenant_limit_bytes") == 32 << 20
        assert daemon.metric("kvern_tenant_used_bytes") > 0
        load.close()
    finally:
        daemon.destroy()


def test_the_drawer_finds_what_it_draws(prometheus, loaded):
    empty = []
    for name in dashboards.DASHBOARDS:
        for panel in dashboards.dashboard(name)["panels"]:
            now = time.time()
            series = pictures.over_time(f"http://{prometheus.address}", panel, now - 60, now, rate_seconds=60)
            if not series and has_data(panel["targets"][0]["expr"]):
                empty.append(f"{name}: {panel['title']}")
            assert all("{{" not in each.legend and each.points for each in series)
    assert not empty


def test_loads_are_counted_under_the_form_of_their_chunks(daemon, loaded):
    loads = {
        labels["codec"]: value for name, labels, value in daemon.metrics() if name == "kvern_decode_seconds_count" and value
    }
    assert "unknown" not in loads and set(loads) - {"mixed"}, loads


def test_every_recording_rule_gives_data(prometheus, loaded):
    empty = [name for name in recorded() if not NEEDS_ENGINE.search(name) and not finite(prometheus.query(name))]
    assert not empty


def test_every_alert_compares_series_that_are_there(prometheus, loaded):
    for rule in rules():
        if "alert" not in rule:
            continue
        prometheus.query(rule["expr"])
        # Without its comparisons the expression must give something, or the alert could never fire.
        if not NEEDS_ENGINE.search(rule["expr"]):
            for part in rule["expr"].split(" and "):
                bare = re.sub(r" (==|>=|>) [\d.]+$|^absent\((.*)\)$", r"\2", part)
                assert bare != part and finite(prometheus.query(bare)), f"{rule['alert']}: {bare}"


def test_no_rule_fails_when_it_is_evaluated(prometheus, loaded):
    found = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert [rule for rule in found if rule["health"] != "ok"] == []


def test_load_fires_no_alert(prometheus, loaded):
    assert [alert for alert in prometheus.api("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_every_metric_that_is_asked_for_exists_in_the_code():
    shim = (ROOT / "python_shim/kvern/stats.py").read_text()
    service = "".join((ROOT / "service" / name).read_text() for name in ("metrics.cc", "collector.cc"))
    # Read, not imported: that takes long.
    package = pathlib.Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    vllm = (package / "v1/metrics/loggers.py").read_text()
    expressions = [expression for _, expression in panel_queries()] + [rule["expr"] for rule in rules()]
    for name in {name for expression in expressions for name in NAMES.findall(expression)} - set(recorded()):
        plain = SUFFIXES.sub("", name)
        if plain.startswith("vllm:kvern_"):
            known = f'"{plain.removeprefix("vllm:kvern_").removesuffix("_total")}":' in shim
        elif plain.startswith("vllm:"):
            known = f'"{plain.removesuffix("_total")}"' in vllm
        else:
            known = f'"{plain}"' in service
        assert known, name


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_the_dashboard_is_what_the_generator_writes(name):
    assert (ROOT / "deploy/grafana" / f"{name}.json").read_text() == dashboards.text(name)


def test_every_alert_has_a_section_in_the_runbook():
    sections = set(re.findall(r"^## (Kvern\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert sections == set(alerts)
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yaml"),
        ("check", "rules", "rules.yaml", "alerts.yaml"),
        ("test", "rules", "rules_test.yaml", "alerts_test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments):
    done = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Last: it ends the daemon.
def test_a_daemon_that_was_killed_raises_the_alert(daemon, prometheus, loaded):
    def pending() -> bool:
        alerts = prometheus.api("alerts")["alerts"]
        # Others may be on their way where the machine is slow; none has lasted long enough to fire.
        return "KvernDown" in {alert["labels"]["alertname"] for alert in alerts} and all(
            alert["state"] == "pending" for alert in alerts
        )

    daemon.kill()
    prometheus.wait(pending, "KvernDown is on its way and nothing fires")
