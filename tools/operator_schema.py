#!/usr/bin/env python3
"""Writes tests/deploy/podmonitor.schema.json: the PodMonitor of the Prometheus operator as a JSON schema that refuses unknown
fields. The operator's CRD comes as a Python model from PyPI; nothing else needs that package, so it gets an environment of
its own.

usage: python3.11 -m venv /tmp/operator && /tmp/operator/bin/pip install cloudcoil-models-prometheus-operator==0.80.1.0 &&
       /tmp/operator/bin/python tools/operator_schema.py
"""

import importlib.metadata
import json
import pathlib

from cloudcoil.models.prometheus_operator import v1

PACKAGE = "cloudcoil-models-prometheus-operator"
OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "tests/deploy/podmonitor.schema.json"
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
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


if __name__ == "__main__":
    schema = strict(v1.PodMonitor.model_json_schema())
    version = importlib.metadata.version(PACKAGE)
    schema["$comment"] = f"Written by tools/operator_schema.py from {PACKAGE} {version} (Apache-2.0), made from the operator's CRD"
    OUTPUT.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
