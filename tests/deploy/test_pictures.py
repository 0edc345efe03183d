"""The pictures of the dashboards, and how numbers and legends are written in them."""

import json
import re

import pytest

import dashboards
import pictures
from engine import ROOT

IMAGES = ROOT / "docs/images"
MOST_BYTES = 200 << 10


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_a_dashboard_has_a_picture_that_the_guide_shows(name):
    file = IMAGES / f"dashboard-{name}.png"
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < MOST_BYTES
    assert f"](images/{file.name})" in (ROOT / "docs/dashboards.md").read_text()


def test_every_unit_of_a_panel_is_known():
    for name in dashboards.DASHBOARDS:
        for panel in json.loads((ROOT / f"deploy/grafana/{name}.json").read_text())["panels"]:
            assert panel["fieldConfig"]["defaults"]["unit"] in pictures.UNITS


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("bytes", 1536, "1.5 KiB"),
        ("bytes", 256 << 20, "256 MiB"),
        ("Bps", 2.5e9, "2.5 GB/s"),
        ("cps", 33_700, "33.7K c/s"),
        ("s", 0, "0 s"),
        ("s", 0.0000045, "4.5 µs"),
        ("s", 0.25, "250 ms"),
        ("s", 90, "1.5 min"),
        ("percentunit", 0.075, "7.5%"),
        ("short", 1_200_000, "1.2 Mil"),
        ("short", 0, "0"),
    ],
)
def test_numbers_are_written_as_grafana_writes_them(unit, value, text):
    assert pictures.UNITS[unit](value) == text


def test_a_legend_takes_its_labels():
    assert pictures.legend("p50 {{tier}} {{operation}}", {"tier": "nvme", "operation": "read"}) == "p50 nvme read"
    assert pictures.legend("{{gone}} all", {}) == "all"


def test_expressions_are_made_whole():
    panel = next(panel for panel in dashboards.dashboard("tiers")["panels"] if panel["title"] == "Bandwidth")
    asked = pictures.expression(panel["targets"][0]["expr"], 60)
    assert "$" not in asked and "[60s]" in asked


def series(legend: str, *values: float) -> pictures.Series:
    return pictures.Series(legend, list(enumerate(values)))


def test_a_long_legend_counts_what_stays_at_zero():
    lines = pictures.legend_lines([series("moves", 0, 1), *(series(f"rests {i}", 0, 0) for i in range(9))])
    assert lines == [[(0, "moves"), (-1, "and 9 that are 0")]]


def test_a_legend_without_end_says_how_many_are_missing():
    lines = pictures.legend_lines([series("x" * 40, 1) for _ in range(30)])
    assert len(lines) == pictures.LEGEND_LINES
    shown = sum(index >= 0 for line in lines for index, _ in line)
    assert int(re.fullmatch(r"and (\d+) more", lines[-1][-1][1])[1]) == 30 - shown
