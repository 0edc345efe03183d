#!/usr/bin/env python3
"""What compact and restored caches cost in a real engine: next tokens, and facts found again.

usage: engine_quality.py [--only METHOD ...] [--budgets 25% ...] [--keep]        writes build/quality/engine.json and docs/quality.md

vLLM (SmolLM2-135M-Instruct, fp32) decodes over the full cache, over compact caches, and over chunks that were stored
through a codec and restored; the same questions go to kvpress, the reference library for such methods (kvpress_quality.py).
Measures:

next token   a text of TEXT_TOKENS tokens is the prompt; the tokens that really follow are the suffix, of several lengths.
             KL divergence of the next token's distribution from that over the full cache, and how often the first choice
             is the same.
facts        a document with sentences such as "The secret number of Alice is 48213." at even depths; each is asked
             for in turn, over one cache of the document: it was made without any question being known.
asked        the same, but the question ends the prompt that is compacted, as the proxy does it.
pairs        lines of keys and values; some of them are asked for over one cache.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests" / "e2e")]

from capture import TEXTS  # noqa: E402
from compact_caches import RefusedByEngine, compact_request, make, run  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Engine, kvern_transfer  # noqa: E402
from models import smollm2  # noqa: E402
from quality import plots  # noqa: E402
from retrieval import ANSWER_TOKENS, Retrieval  # noqa: E402
from sections import put_sections  # noqa: E402

from kvern.compact import Daemon as Compactions  # noqa: E402

DOCUMENT = ROOT / "docs" / "quality.md"
TARGET = ROOT / "build" / "quality" / "engine.json"
RIVAL = ROOT / "build" / "quality" / "kvpress.json"
BUDGETS = ["50%", "25%", "12%", "6%", "3.2%"]
CONTROL = "snapkv(budget=100%)"  # keeps everything: must read like the full cache
METHODS = ["cake", "snapkv", "windowkv", "streaming", "keydiff", "knorm"]
RESTORED = ["int8", "int4", "centroid(ratio=0.5)", "centroid(ratio=0.5) | int4", "minicache(max_angle=180)"]
TEXT_TOKENS = 1024
FOLLOWING = [1, 9, 17, 33, 49, 65, 97, 129]  # lengths of the suffix
TOP = 500  # log-probabilities that are compared; the rest counts as one


class Bench:
    def __init__(self, engine: Engine, compactions: Compactions):
        self.engine = engine
        self.compactions = compactions
        self.questions = Retrieval()
        encode = self.questions.encode
        self.texts = {name: encode(read())[: TEXT_TOKENS + max(FOLLOWING) + 1] for name, read in TEXTS.items()}
        self.exact = None

    # ---- ways to a cache: each gives a function from a suffix to a request

    def full(self, prompt: list[int]):
        return lambda suffix: {"prompt": prompt + suffix, "kv_transfer_params": {"kvern": {"load": False, "store": False}}}

    def compact(self, spec: str):
        def prepare(prompt: list[int]):
            output, _ = make(self.engine, self.compactions, prompt, spec)
            return lambda suffix: compact_request(output, suffix)

        return prepare

    def restored(self, codec: str):
        def prepare(prompt: list[int]):
            request = {"prompt": prompt, "salt": codec, "kv_transfer_params": {"kvern": {"codec": codec}}}
            run(self.engine, [request], 1)
            self.engine.forget_kv()
            return lambda suffix: {**request, "prompt": prompt + suffix, "kv_transfer_params": {"kvern": {"store": False}}}

        return prepare

    # ---- measures

    def _distributions(self, prepare) -> dict[str, list[dict[int, float]]]:
        result = {}
        for name, ids in self.texts.items():
            request = prepare(ids[:TEXT_TOKENS])
            asked = [{**request(ids[TEXT_TOKENS : TEXT_TOKENS + n]), "logprobs": TOP} for n in FOLLOWING]
            outputs, _ = run(self.engine, asked, 1)
            result[name] = [dict(map(tuple, output.logprobs[0])) for output in outputs]
        return result

    def next_token(self, prepare) -> dict:
        found = self._distributions(prepare)
        if self.exact is None:
            self.exact = found
        pairs = [pair for name in found for pair in zip(self.exact[name], found[name])]
        return {
            "kl": statistics.mean(divergence(exact, other) for exact, other in pairs),
            "top1": statistics.mean(max(exact, key=exact.get) == max(other, key=other.get) for exact, other in pairs),
        }

    def _right(self, requests: list[dict], answers: list[str]) -> list[bool]:
        outputs, _ = run(self.engine, requests, ANSWER_TOKENS)
        return [self.questions.right(output.tokens, answer) for output, answer in zip(outputs, answers)]

    def found(self, prepare, documents) -> list[list[bool]]:
        """By document and fact, over one cache of each document."""
        result = []
        for prompt, asked in documents:
            request = prepare(prompt)
            result.append(self._right([request(question) for question, _ in asked], [answer for _, answer in asked]))
        return result

    def asked(self, spec: str) -> list[list[bool]]:
        result = []
        for prompt, asked in self.questions.asked:
            right = []
            for question, answer in asked:
                output, _ = make(self.engine, self.compactions, prompt + question, spec)
                (rest,), _ = run(self.engine, [compact_request(output, output.tokens)], ANSWER_TOKENS - 1)
                right.append(self.questions.right(list(output.tokens) + list(rest.tokens), answer))
            result.append(right)
        return result

    def measure(self, prepare, spec: str | None = None) -> dict:
        result = self.next_token(prepare)
        facts = self.found(prepare, self.questions.documents)
        result["facts"] = statistics.mean(map(statistics.mean, facts))
        result["facts_by_depth"] = [statistics.mean(column) for column in zip(*facts)]
        result["pairs"] = statistics.mean(map(statistics.mean, self.found(prepare, self.questions.pairs)))
        if spec is not None:
            result["asked"] = statistics.mean(map(statistics.mean, self.asked(spec)))
        return result


def divergence(exact: dict[int, float], other: dict[int, float]) -> float:
    """KL of the next token, exact from other: the most likely tokens one by one, all others as one. A token that other does not
    tell is no more likely there than the least of those that it tells."""
    least = min(other.values())
    total, exact_rest, other_rest = 0.0, 1.0, 1.0
    for token, value in exact.items():
        there = other.get(token, least)
        total += math.exp(value) * (value - there)
        exact_rest -= math.exp(value)
        other_rest -= math.exp(there)
    exact_rest, other_rest = max(exact_rest, 1e-9), max(other_rest, 1e-9)
    return total + exact_rest * math.log(exact_rest / other_rest)


def table(results: dict) -> list[str]:
    lines = [
        "| cache | KL | same first choice | facts | asked | pairs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in ["full", CONTROL, *(f"{method}(budget={share})" for share in BUDGETS for method in METHODS), *RESTORED]:
        found = results.get(name, {})
        if "kl" in found:
            shares = [f"{found[key]:.0%}" if key in found else "" for key in ("top1", "facts", "asked", "pairs")]
            lines.append(f"| `{name.replace('|', chr(92) + '|')}` | {found['kl']:.3f} | " + " | ".join(shares) + " |")
    refused = [f"* `{name}`: {found['refused']}" for name, found in results.items() if "refused" in found]
    return lines + (["", "Refused:", "", *refused] if refused else [])


def rival_table(ours: dict, theirs: dict) -> list[str]:
    """Ours beside kvpress, question unknown / question known."""
    lines = ["| slots | method | Kvern: facts | kvpress: facts | Kvern: asked | kvpress: asked |", "|--:|---|--:|--:|--:|--:|"]
    for name, found in theirs.items():
        method, _, share = name.removesuffix(")").partition("(budget=")
        mine = ours.get(name, {})
        cells = [f"{of[key]:.0%}" if key in of else "" for key in ("facts", "asked") for of in (mine, found)]
        lines.append(f"| {share} | {method} | " + " | ".join(cells) + " |")
    return lines


def write_document(results: dict) -> None:
    sections = {"engine": table(results)}
    if RIVAL.exists():
        sections["kvpress"] = rival_table(results, json.loads(RIVAL.read_text()))
    put_sections(DOCUMENT, sections)


def measure_rival() -> None:
    """In an environment of its own: kvpress wants a transformers that is older than vLLM's."""
    venv = RIVAL.parent / "kvpress"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        requirements = HERE / "requirements-kvpress.txt"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
        (venv / "ready").touch()
    subprocess.run([str(python), str(HERE / "kvpress_quality.py"), str(RIVAL)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=METHODS + RESTORED)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--keep", action="store_true", help="measure only what is missing")
    arguments = parser.parse_args()
    results = json.loads(TARGET.read_text()) if arguments.keep and TARGET.exists() else {}
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    specs = [CONTROL] + [f"{method}(budget={share})" for share in arguments.budgets for method in METHODS if method in arguments.only]
    with tempfile.TemporaryDirectory(prefix="kvern-quality-") as folder:
        daemon = Daemon(pathlib.Path(folder), {"store.dram_bytes": "2GiB"}).start()
        options = {"threads": 2, "max_model_len": 2048, "max_logprobs": TOP, "max_num_seqs": 16}
        engine = Engine(smollm2(), pathlib.Path(folder), transfer=kvern_transfer(daemon.address, policy="fail"), **options)
        try:
            engine.wait_started()
            with Compactions(daemon.address) as compactions:
                bench = Bench(engine, compactions)
                results["full"] = bench.measure(bench.full)
                print("quality: full", results["full"], flush=True)
                ways = [(spec, bench.compact(spec), spec) for spec in specs]
                ways += [(codec, bench.restored(codec), None) for codec in RESTORED if codec in arguments.only]
                for name, prepare, spec in ways:
                    if name in results:
                        continue
                    try:
                        results[name] = bench.measure(prepare, spec)
                    except RefusedByEngine as reason:
                        results[name] = {"refused": str(reason)}
                    print("quality:", name, results[name], flush=True)
                    TARGET.write_text(json.dumps(results, indent=1) + "\n")
        finally:
            engine.stop()
            daemon.stop()
    if not (arguments.keep and RIVAL.exists()):
        measure_rival()
    write_document(results)
    plots(TARGET)


if __name__ == "__main__":
    main()
