"""What dashboards and rules ask Prometheus."""

import json
import math
import re

import yaml

from engine import ROOT
from prometheus_server import RULES

DASHBOARDS = ROOT / "deploy" / "grafana"

# What vLLM serves, or is computed from it.
NEEDS_ENGINE = re.compile(r"vllm:|engine:")

# What has no value before a compact cache was made, or a tenant with a quota came, which the load is not.
NEEDS_GUESTS = re.compile(r"\bkvern_compaction_(?:seconds|error)|\bkvern_tenant_")


def rules() -> list[dict]:
    files = [yaml.safe_load((RULES / name).read_text()) for name in ("rules.yaml", "alerts.yaml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def recorded() -> list[str]:
    return [rule["record"] for rule in rules() if "record" in rule]


def panel_queries() -> list[tuple[str, str]]:
    queries = []
    for file in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
                queries.append((f"{file.stem}: {panel['title']} {target['refId']}", expression))
    assert queries
    return queries


def has_data(expression: str) -> bool:
    """Of a daemon under the load of load.py."""
    return not NEEDS_ENGINE.search(expression) and not NEEDS_GUESTS.search(expression)


def finite(values: list[float]) -> bool:
    return any(math.isfinite(value) for value in values)
