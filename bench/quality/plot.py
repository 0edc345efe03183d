"""Plots results.json of quality.py, or engine.json of engine_quality.py: plot.py RESULTS writes docs/images/quality-*.svg."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "kvern"
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from methods import CHAINS, COMBINATIONS, EVICTIONS, SHARES  # noqa: E402

IMAGES = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "images"


def points(of_text: dict, names: list[str]) -> tuple[list[float], list[float]]:
    known = [of_text[name] for name in names if "error" in of_text.get(name, {})]
    known.sort(key=lambda result: result["bytes"])
    return [100 * result["bytes"] for result in known], [result["error"] for result in known]


def panels(results: dict, title: str):
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 5), sharey=True, squeeze=False)
    for axis, text in zip(axes[0], results):
        axis.set(title=f"{title}: {text}", xlabel="bytes, % of raw", xscale="log", yscale="log")
        axis.set_xticks([3.2, 6.25, 12.5, 25, 50, 100], ["3.2", "6.25", "12.5", "25", "50", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error of the attention output")
    return figure, axes[0]


def save(figure, axes, name: str) -> None:
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"quality-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def colours(axis) -> None:
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)


def evictions(results: dict) -> None:
    figure, axes = panels(results, "evictions")
    for axis, of_text in zip(axes, results.values()):
        colours(axis)
        for name in EVICTIONS:
            axis.plot(*points(of_text, [f"{name}({share})" for share in SHARES]), marker=".", label=name)
    save(figure, axes, "evictions")


def chains(results: dict) -> None:
    """Points with a letter each: chains do not form lines."""
    figure, axes = panels(results, "chains")
    letters = {name: letter for name, letter in zip(CHAINS, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP")}
    for axis, of_text in zip(axes, results.values()):
        axis.set_xlim(7, 110)
        for name in CHAINS:
            result = of_text.get(name, {})
            if result.get("error", 0) > 0:
                label = f"{letters[name]}  {name}"
                axis.plot(100 * result["bytes"], result["error"], marker=f"${letters[name]}$", ls="", label=label)
    save(figure, axes, "chains")


def combinations(results: dict) -> None:
    figure, axes = panels(results, "evictions with a quantiser")
    families = {}
    for name in COMBINATIONS:
        head, _, form = name.partition(" | ")
        families.setdefault(f"{head.split('(')[0]} | {form}", []).append(name)
    for axis, of_text in zip(axes, results.values()):
        colours(axis)
        for family, names in families.items():
            axis.plot(*points(of_text, names), "--" if family.endswith("int8") else "-", marker=".", label=family)
        axis.plot(*points(of_text, [f"snapkv({share})" for share in SHARES]), "k:", marker=".", label="snapkv | raw")
    save(figure, axes, "combinations")


def engine(results: dict) -> None:
    """Of engine_quality.py: next tokens and facts by method, over the share that is kept."""
    measures = {"kl": "KL of the next token, nats", "facts": "facts found, question unknown", "asked": "facts found, question known"}
    figure, axes = plt.subplots(1, len(measures), figsize=(5 * len(measures), 4.5))
    lines: dict[str, list[tuple[float, dict]]] = {}
    for name, found in results.items():
        if "(budget=" in name:
            method, _, share = name.removesuffix("%)").partition("(budget=")
            lines.setdefault(method, []).append((float(share), found))
    for axis, (key, title) in zip(axes, measures.items()):
        for method, points_of in lines.items():
            known = sorted((share, found[key]) for share, found in points_of if key in found)
            axis.plot(*zip(*known), marker=".", label=method)
        if key != "kl":
            axis.axhline(results["full"]["facts"], color="black", linestyle=":", label="full")
        axis.set(title=title, xlabel="slots, % of tokens", xscale="log")
        axis.set_xticks([3.2, 6, 12, 25, 50], ["3.2", "6", "12", "25", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    save(figure, axes, "engine")


if __name__ == "__main__":
    loaded = json.loads(pathlib.Path(sys.argv[1]).read_text())
    if "full" in loaded:
        engine(loaded)
        sys.exit()
    evictions(loaded)
    chains(loaded)
    combinations(loaded)
