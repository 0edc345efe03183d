#!/usr/bin/env python3
"""Makes the weights of kvern.task_kind from training.txt, and measures them on held_out.txt.

usage: train.py [--check]        --check: measures the weights that are there, writes nothing

Sentences of both sets were written for this purpose, apart from each other. Each stands alone, before and after
documents; those of the two sets are different ones. Logistic regression by stochastic gradient descent, the same in
every run.
"""

import argparse
import json
import math
import pathlib
import random
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = ROOT / "python_shim"
sys.path.insert(0, str(PACKAGE))

from kvern.task_kind import BUCKETS, LOCALISATION, TASKS, features, task_kind  # noqa: E402

EPOCHS = 40
RATE = 0.2
SHRINK = 3e-3  # of the weights, at each step that touches them
REPEATS = 3  # of each training sentence, since those that ask for nothing are more
VARIANTS = 8  # of each sentence
DOCUMENT_CHARACTERS = 1200
LEADS = ("", "", "", "Question: ", "Instruction: ", "User: ", "Please. ", "Now: ")
ENDS = ("", "", "", "\nAnswer:", "\n", "\n\nAssistant:", " Thank you.", "\nOutput:")


def sections(path: pathlib.Path) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            result[line[1:-1]] = []
        elif line and not line.startswith("#"):
            result[next(reversed(result))].append(line)
    return result


def document(lines: list[str], source: random.Random) -> str:
    text = ""
    while len(text) < DOCUMENT_CHARACTERS:
        text += source.choice(lines) + "\n"
    return text


def prompts(sentences: list[str], documents: list[str], source: random.Random) -> list[str]:
    """Each sentence alone, and in places where it stands in prompts."""
    result = []
    for sentence in sentences:
        result.append(sentence)
        for i in range(VARIANTS - 1):
            asked = source.choice(LEADS) + sentence + source.choice(ENDS)
            text = document(documents, source)
            result.append(f"{text}\n{asked}" if i % 2 else f"{asked}\n\n{text}")
    return result


def labelled(path: pathlib.Path, documents: list[str], seed: int) -> list[tuple[str, bool]]:
    source = random.Random(seed)
    return [(text, kind == LOCALISATION) for kind, lines in sections(path).items() for text in prompts(lines, documents, source)]


def sentences_of(texts: list[str]) -> list[str]:
    return [sentence for text in texts for sentence in re.findall(r"[^.?!\n]+[.?!]?", text) if len(sentence) > 8]


def train(examples: list[tuple[list[int], int]]) -> list[dict]:
    """Softmax over the two tasks and a third class, whose scores are 0. examples: buckets, and the class."""
    biases, weights = [0.0, 0.0], [[0.0] * BUCKETS, [0.0] * BUCKETS]
    source = random.Random(0)
    for epoch in range(EPOCHS):
        source.shuffle(examples)
        rate = RATE / (1 + epoch / 4)
        for buckets, wanted in examples:
            raised = [math.exp(min(30.0, biases[k] + sum(weights[k][bucket] for bucket in buckets))) for k in range(2)]
            for k in range(2):
                step = rate * ((wanted == k) - raised[k] / (1 + sum(raised)))
                biases[k] += step
                for bucket in buckets:
                    weights[k][bucket] += step - SHRINK * rate * weights[k][bucket]
    return [{"bias": bias, "weights": row} for bias, row in zip(biases, weights)]


def measure(name: str, examples: list[tuple[str, bool]]) -> float:
    right = {True: 0, False: 0}
    for text, wanted in examples:
        right[wanted] += (task_kind(text) == LOCALISATION) == wanted
    total = {kind: sum(wanted == kind for _, wanted in examples) for kind in (True, False)}
    accuracy = sum(right.values()) / len(examples)
    each = ", ".join(f"{kind} {right[i == 0] / total[i == 0]:.1%}" for i, kind in enumerate(TASKS))
    print(f"{name}: {accuracy:.1%} of {len(examples)} prompts ({each})")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    documents = sections(HERE / "documents.txt")
    training = labelled(HERE / "training.txt", documents["training"], seed=1)
    if not parser.parse_args().check:
        asked = sections(HERE / "training.txt")
        idle = sentences_of([*documents["training"], (ROOT / "LICENSE").read_text()])
        examples = [(features(line), k) for k, task in enumerate(TASKS) for line in asked[task] for _ in range(REPEATS)]
        rows = train(examples + [(features(line), len(TASKS)) for line in idle])
        stored = {
            task: {"bias": round(row["bias"] * 100), "weights": [round(weight * 100) for weight in row["weights"]]}
            for task, row in zip(TASKS, rows)
        }
        target = PACKAGE / "kvern" / "task_kind.json"
        target.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
    measure("training", training)
    held_out = labelled(HERE / "held_out.txt", documents["held out"], seed=2)
    measure("held out, all", held_out)
    measure("held out, the sentence alone", held_out[::VARIANTS])


if __name__ == "__main__":
    main()
