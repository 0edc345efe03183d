#!/usr/bin/env python3
"""Measures what every method costs in attention output at equal bytes, and writes the tables of docs/quality.md.

usage: quality.py [--tokens 4096] [--build build/release] [--only METHOD ...] [--keep]

Captures the real model's keys, values and queries on two texts (capture.py), lets kvern_quality judge every method on
them, and writes build/quality/results.json, the plots docs/images/quality-*.svg and, between the markers of
docs/quality.md, the tables. With --keep methods that results.json holds already are not measured again.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "build" / "quality"
DOCUMENT = ROOT / "docs" / "quality.md"
PLOT_REQUIREMENTS = pathlib.Path(__file__).with_name("requirements.txt")

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from capture import TEXTS, capture_all, smollm2  # noqa: E402
from methods import CHAINS, COMBINATIONS, EVICTIONS, QUERY_FREE, SHARES  # noqa: E402
from sections import put_sections  # noqa: E402


def methods() -> list[str]:
    evictions = [f"{name}({share})" for name in EVICTIONS for share in SHARES]
    return [*CHAINS, *COMBINATIONS, *evictions]


def profile(text: str, tokens: int) -> str:
    """The name of the model profile that is learnt on a text, made where it is missing."""
    folder = OUT / "profiles" / f"{text}-{tokens}"
    if not list(folder.glob("*.kvernprofile")):
        print(f"quality: calibrating on {text}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(TEXTS[text]())
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "python_shim")}
        command = ["-m", "kvern.calibrate", str(smollm2("float32")), "--text", str(folder / "text.txt")]
        command += ["--output", str(folder), "--tokens", str(tokens)]
        subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    (file,) = folder.glob("*.kvernprofile")
    return file.stem


def measure(program: pathlib.Path, file: pathlib.Path, wanted: list[str], calibrated_on: str, tokens: int) -> dict:
    if not wanted:
        return {}
    name = profile(calibrated_on, tokens)
    print(f"quality: {len(wanted)} methods on {file.stem}", flush=True)
    specs = {method.replace("PROFILE", name): method for method in wanted}
    environment = {**os.environ, "KVERN_PROFILES": str(OUT / "profiles" / f"{calibrated_on}-{tokens}")}
    command = [str(program), str(file), *specs]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {specs[line.pop("method")]: line for line in lines}


def plots(results: pathlib.Path) -> None:
    """In an environment of its own: the project itself needs no matplotlib."""
    venv = OUT / "venv"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        python = str(venv / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(PLOT_REQUIREMENTS)], check=True)
        (venv / "ready").touch()
    program = pathlib.Path(__file__).with_name("plot.py")
    subprocess.run([str(venv / "bin" / "python"), str(program), str(results)], check=True)


def mean(results: dict, method: str, key: str) -> float | None:
    """Over the texts; None for a method that one of them has not."""
    found = [of_text.get(method, {}).get(key) for of_text in results.values()]
    return None if None in found or not found else sum(found) / len(found)


def row(results: dict, method: str) -> str:
    errors = " | ".join(f"{of_text[method]['error']:.4f}" for of_text in results.values())
    worst = max(of_text[method]["worst"] for of_text in results.values())
    return f"| `{method.replace('|', chr(92) + '|')}` | {100 * mean(results, method, 'bytes'):.1f} % | {errors} | {worst:.3f} |"


def table(results: dict, names: list[str]) -> list[str]:
    head = " | ".join(results)
    lines = [f"| method | bytes | {head} | worst layer |", "|---|--:|" + "--:|" * (len(results) + 1)]
    return lines + [row(results, name) for name in names if mean(results, name, "error") is not None]


def frontier(results: dict, names: list[str]) -> list[str]:
    """Methods that no other one beats in both bytes and error, from exact to smallest. Of those that differ by less
    than 2 % in bytes the most exact one stands for all."""
    known = [name for name in names if mean(results, name, "error") is not None]
    kept = []
    for name in sorted(known, key=lambda n: (mean(results, n, "bytes"), mean(results, n, "error"))):
        if kept and mean(results, name, "error") >= mean(results, kept[-1], "error"):
            continue
        if kept and mean(results, name, "bytes") < 1.02 * mean(results, kept[-1], "bytes"):
            kept.pop()
        kept.append(name)
    return kept[::-1]


def eviction_table(results: dict) -> list[str]:
    lines = ["| method | " + " | ".join(SHARES) + " |", "|---|" + "--:|" * len(SHARES)]
    for name in EVICTIONS:
        cells = []
        for share in SHARES:
            method = f"{name}({share})"
            errors = [f"{of_text.get(method, {}).get('error', float('nan')):.3f}" for of_text in results.values()]
            cells.append(" / ".join(errors))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_document(results: dict) -> None:
    query_free = [name for name in methods() if name in CHAINS or name.startswith(QUERY_FREE)]
    parts = {
        "chains": table(results, CHAINS),
        "evictions": eviction_table(results),
        "combinations": table(results, COMBINATIONS),
        "frontier": table(results, frontier(results, methods())),
        "frontier-stored": table(results, frontier(results, CHAINS)),
        "frontier-query-free": table(results, frontier(results, query_free)),
    }
    put_sections(DOCUMENT, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    build = pathlib.Path(os.environ.get("KVERN_BUILD", ROOT / "build" / "release"))
    parser.add_argument("--build", type=pathlib.Path, default=build)
    parser.add_argument("--only", nargs="+", help="measure these methods and print them; writes no document")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    target = OUT / "results.json"
    results = json.loads(target.read_text()) if arguments.keep and target.exists() else {}
    for name, file in zip(TEXTS, capture_all(arguments.tokens, OUT)):
        of_text = results.setdefault(name, {})
        wanted = arguments.only or [name for name in methods() if "error" not in of_text.get(name, {})]
        (other,) = set(TEXTS) - {name}
        measured = measure(arguments.build / "bin" / "kvern_quality", file, wanted, other, arguments.tokens)
        for method, result in measured.items():
            if arguments.only or "refused" in result:
                print(f"quality: {method}: {result}", flush=True)
        of_text |= measured
    if arguments.only:
        return
    target.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_document(results)
    plots(target)
    print(f"quality: written to {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
