#!/usr/bin/env python3
"""Writes tests/deploy/podmonitor.schema.json and prometheusrule.schema.json: these resources of the Prometheus operator as JSON
schemas that refuse unknown fields. The operator's CRDs come as Python models from PyPI; nothing else needs that package, so it
gets an environment of its own.

usage: python3.11 -m venv /tmp/operator && /tmp/operator/bin/pip install cloudcoil-models-prometheus-operator==0.80.1.0 &&
       /tmp/operator/bin/python tools/operator_schema.py
"""

import importlib.metadata
import json
import pathlib

from cloudcoil.models.prometheus_operator import v1

PACKAGE = "cloudcoil-models-prometheus-operator"
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests/deploy"
NOISE = ("title", "default", "description")  # as keywords: properties of these names stay


def strict(schema: dict) -> dict:
    """Only what the schema names may be there."""
    made = {key: value for key, value in schema.items() if key not in NOISE}
    for key in ("properties", "$defs"):
        if key in made:
            made[key] = {name: strict(each) for name, each in made[key].items()}
    for key in ("anyOf", "oneOf", "allOf"):
        if key in made:
            made[key] = [strict(each) for each in made[key]]
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    if "pattern" in made:  # Go takes flags anywhere, Python at the beginning only
        made["pattern"] = made["pattern"].replace("^(?i)", "(?i)^")
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


if __name__ == "__main__":
    version = importlib.metadata.version(PACKAGE)
    for model in (v1.PodMonitor, v1.PrometheusRule):
        schema = strict(model.model_json_schema())
        source = f"{PACKAGE} {version} (Apache-2.0), made from the operator's CRD"
        schema["$comment"] = f"Written by tools/operator_schema.py from {source}"
        path = FOLDER / f"{model.__name__.lower()}.schema.json"
        path.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
