#!/usr/bin/env python3
"""Draws the dashboards beside this file without Grafana: each panel's queries are asked of a Prometheus over a period, and
drawn where the dashboard has the panel, under its title, in its unit, with its legends. Needs requirements.txt.

Usage: pictures.py --prometheus http://127.0.0.1:9090 [--minutes 60] [--output FOLDER] [NAME ...]
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import re
import time
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent

# Grafana's grid: 24 columns over the window, rows of 30 pixels.
COLUMNS = 24
WINDOW_INCHES = 12.0
ROW_INCHES = 0.31
POINTS = 240  # of a line
DPI = 100
SCRAPES_IN_A_RATE = 4  # Grafana's $__rate_interval

# Lines of a legend below a panel; Grafana scrolls, a picture cannot.
LEGEND_LINES = 4
LEGEND_LETTERS = 92  # of a line
MARK_LETTERS = 7  # what the mark of a line takes
LONG_LEGEND = 6  # entries; in a longer one, lines that never leave zero are only counted
LINES = ("#3274d9", "#e0752d", "#2f9e44", "#c4162a", "#8f3bb8", "#b8a000", "#00808f", "#e05fa0", "#6b4226", "#5c6670", "#8fb8f0", "#f0b88f")


@dataclasses.dataclass
class Series:
    legend: str
    points: list[tuple[float, float]]  # (seconds since the epoch, value)

    @property
    def last(self) -> float:
        return self.points[-1][1]


# ---- what Grafana makes of numbers and names


def scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power + 1 < len(units):
        value /= base
        power += 1
    return f"{value:.3g}{units[power]}" if abs(value) < 1000 else f"{value:.0f}{units[power]}"


def seconds(value: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs" if value else "0 s"


UNITS = {
    "short": lambda value: scaled(value, 1000, ("", " K", " Mil", " Bil")),
    "cps": lambda value: scaled(value, 1000, (" c/s", "K c/s", "M c/s", "B c/s")),
    "bytes": lambda value: scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB")),
    "Bps": lambda value: scaled(value, 1000, (" B/s", " kB/s", " MB/s", " GB/s", " TB/s")),
    "s": seconds,
    "percentunit": lambda value: f"{value * 100:.3g}%",
}


def legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template).strip()


def expression(text: str, rate_seconds: float) -> str:
    return text.replace("$__rate_interval", f"{rate_seconds:.0f}s").replace("$instance", ".*")


# ---- what Prometheus has


def ask(server: str, path: str, **parameters: str) -> dict:
    url = f"{server.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)["data"]


def over_time(server: str, panel: dict, begin: float, end: float, rate_seconds: float) -> list[Series]:
    step = max(1.0, (end - begin) / POINTS)
    found = []
    for target in panel["targets"]:
        data = ask(
            server,
            "query_range",
            query=expression(target["expr"], rate_seconds),
            start=str(begin),
            end=str(end),
            step=str(step),
        )
        for each in data["result"]:
            points = [(at, float(value)) for at, value in each["values"]]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            if points:
                found.append(Series(legend(target["legendFormat"], each["metric"]), points))
    return found


# ---- drawing


def gaps(points: list[tuple[float, float]], begin: float, step: float) -> tuple[list[float], list[float]]:
    """Minutes and values, with a hole where Prometheus had no value for a while."""
    minutes: list[float] = []
    values: list[float] = []
    for (at, value), before in zip(points, [None, *points]):
        if before is not None and at - before[0] > 1.5 * step:
            minutes.append((at - step - begin) / 60)
            values.append(math.nan)
        minutes.append((at - begin) / 60)
        values.append(value)
    return minutes, values


def legend_lines(series: list[Series]) -> list[list[tuple[int, str]]]:
    """(index of the series, text) by lines. -1: how many have no entry."""
    shown = list(range(len(series)))
    if len(series) > LONG_LEGEND:
        shown = [index for index in shown if any(value for _, value in series[index].points)]
    entries = [(index, series[index].legend) for index in shown]
    if len(shown) < len(series):
        entries.append((-1, f"{'and ' if shown else ''}{len(series) - len(shown)} that are 0"))
    lines: list[list[tuple[int, str]]] = [[]]
    letters = 0
    for number, (index, text) in enumerate(entries):
        length = len(text) + MARK_LETTERS
        if lines[-1] and letters + length > LEGEND_LETTERS:
            if len(lines) == LEGEND_LINES:
                lines[-1][-1] = (-1, f"and {len(entries) - number + 1} more")
                break
            lines.append([])
            letters = 0
        lines[-1].append((index, text))
        letters += length
    return lines


def draw(server: str, dashboard: dict, begin: float, end: float, rate_seconds: float, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    plt.rcParams.update({"font.size": 8, "axes.edgecolor": "#c0c4c8", "text.color": "#24292e"})
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    head = 0.45
    height = rows * ROW_INCHES + head
    figure = plt.figure(figsize=(WINDOW_INCHES, height), facecolor="#f4f5f5")
    figure.text(0.01, 1 - head / 2 / height, dashboard["title"], fontsize=13, weight="bold", va="center")
    step = max(1.0, (end - begin) / POINTS)
    for panel in panels:
        grid = panel["gridPos"]
        left, width = grid["x"] / COLUMNS, grid["w"] / COLUMNS
        top = 1 - (head + grid["y"] * ROW_INCHES) / height
        tall = grid["h"] * ROW_INCHES / height
        box = plt.Rectangle(
            (left + 0.004, top - tall + 0.06 / height),
            width - 0.008,
            tall - 0.12 / height,
            facecolor="white",
            edgecolor="#d8dadd",
            linewidth=0.8,
            transform=figure.transFigure,
            zorder=-1,
        )
        figure.add_artist(box)
        figure.text(left + 0.012, top - 0.2 / height, panel["title"], fontsize=9.5, weight="semibold", va="center")
        series = over_time(server, panel, begin, end, rate_seconds)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        inner = (left + 0.062, width - 0.082)
        if panel["type"] == "stat":
            figure.text(
                left + width / 2,
                top - tall / 2,
                "\n".join(f"{each.legend}   {UNITS[unit](each.last)}" for each in series),
                fontsize=14,
                ha="center",
                va="center",
            )
            continue
        lines = legend_lines(series) if series else []
        below = (0.42 + 0.17 * len(lines)) / height
        axes = figure.add_axes((inner[0], top - tall + below, inner[1], tall - below - 0.42 / height))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e6e8", linewidth=0.6)
        axes.tick_params(length=0, labelsize=7.5, colors="#57606a")
        axes.tick_params(axis="x", pad=5)
        axes.set_xlim(0, (end - begin) / 60)
        axes.xaxis.set_major_formatter(lambda minute, _: f"{minute:g} min")
        for each, colour in zip(series, itertools.cycle(LINES)):
            axes.plot(*gaps(each.points, begin, step), color=colour, linewidth=1.2)
        largest = max((value for each in series for _, value in each.points), default=0)
        axes.set_ylim(0, largest * 1.08 or 1)
        if unit == "bytes" and largest > 0:
            axes.yaxis.set_major_locator(plt.MultipleLocator(2.0 ** math.ceil(math.log2(largest / 4))))
        elif unit == "s" and largest > 240:
            axes.yaxis.set_major_locator(plt.MultipleLocator(60 * math.ceil(largest / 240)))
        else:
            axes.yaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _, unit=unit: UNITS[unit](value))
        if not series:
            axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", va="center", color="#8b949e")
        for number, line in enumerate(lines):
            y = top - tall + below - (0.30 + 0.17 * number) / height
            x = inner[0]
            for index, text in line:
                if index >= 0:
                    colour = LINES[index % len(LINES)]
                    figure.add_artist(plt.Line2D([x, x + 0.012], [y, y], color=colour, linewidth=2.2))
                    x += 0.016
                drawn = figure.text(x, y, text, color="#57606a", fontsize=7.5, va="center")
                extent = drawn.get_window_extent(figure.canvas.get_renderer())
                x += extent.width / (WINDOW_INCHES * figure.dpi) + 0.01
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(figure)
    # This way of choosing 256 colours keeps those of the lines apart.
    Image.open(path).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of dashboards; all when none is given")
    parser.add_argument("--prometheus", required=True, help="its address, http://HOST:PORT")
    parser.add_argument("--minutes", type=float, default=60, help="how far back (60)")
    parser.add_argument("--scrape-seconds", type=float, default=15, help="interval of scrapes (15)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    end = time.time()
    begin = end - arguments.minutes * 60
    rate_seconds = SCRAPES_IN_A_RATE * arguments.scrape_seconds
    for name in arguments.names or sorted(path.stem for path in HERE.glob("*.json")):
        path = arguments.output / f"dashboard-{name}.png"
        draw(arguments.prometheus, json.loads((HERE / f"{name}.json").read_text()), begin, end, rate_seconds, path)
        print(f"{path}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
