"""What kind of task a prompt sets, for WindowKV: localisation, when the answer stands in few places of the text (a question
about it), or aggregation, when all of it matters (a summary, a translation, a pattern to follow).

A linear model over hashed words and pairs of words judges the sentences at both ends of the prompt, where instructions
stand, against a third kind: sentences that ask for nothing. Its weights are made by tools/task_kind/train.py.
Deterministic; unknown words count for nothing.
"""

import functools
import json
import pathlib
import re
import zlib

LOCALISATION, AGGREGATION = TASKS = ("localisation", "aggregation")
BUCKETS = 4096
_EDGE_CHARACTERS = 600  # of the prompt's beginning and of its end are looked at
_EDGE_WEIGHTS = (1.0, 0.7, 0.5, 0.35)  # of the sentences from each end on: instructions stand outermost
_EXAMPLES = 3  # as many lines with the label of the last one make a pattern to follow
_SCALE = 100  # weights are stored as whole numbers
_WEIGHTS = pathlib.Path(__file__).with_name("task_kind.json")
_SENTENCE = re.compile(r"[^.?!\n]+[.?!]?")
_WORD = re.compile(r"[^\W_]+")
_LABEL = re.compile(r"^[ \t]*([^\W\d_][^\W\d_ ]{0,15}):", re.MULTILINE)


def sentences(text: str) -> list[tuple[float, str]]:
    """Of both ends of a prompt, outermost first, with their weights. Single words, such as a last "Answer:", are none."""
    text = text.strip()
    head, tail = text[:_EDGE_CHARACTERS], text[-_EDGE_CHARACTERS:]
    found = []
    for edge in (_sentences(head), _sentences(tail)[::-1]):
        found += zip(_EDGE_WEIGHTS, edge)
    return found


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE.findall(text) if len(_WORD.findall(sentence)) > 1]


def features(sentence: str) -> list[int]:
    """The buckets of a sentence, each once."""
    words = _WORD.findall(sentence.lower())
    found = {*words, *map(" ".join, zip(words, words[1:])), *(f"^ {word}" for word in words[:1])}
    if sentence.rstrip().endswith("?"):
        found |= {"?", *(f"? {word}" for word in words[:2])}
    return sorted({zlib.crc32(feature.encode()) % BUCKETS for feature in found})


@functools.cache
def _model() -> dict:
    return json.loads(_WEIGHTS.read_text())


def scores(sentence: str) -> tuple[float, float]:
    """How much a sentence asks for each of TASKS; 0: as much as one that asks for nothing."""
    model, buckets = _model(), features(sentence)
    return tuple((model[task]["bias"] + sum(model[task]["weights"][bucket] for bucket in buckets)) / _SCALE for task in TASKS)


def task_kind(text: str) -> str:
    """One of TASKS. In doubt aggregation, which loses less when it is wrong."""
    labels = _LABEL.findall(text)
    last = _LABEL.match(text.rstrip().rpartition("\n")[2])
    if last and labels.count(last[1]) >= _EXAMPLES:
        return AGGREGATION
    best = [0.0, 0.0]
    for weight, sentence in sentences(text):
        best = [max(before, weight * score) for before, score in zip(best, scores(sentence))]
    return LOCALISATION if best[0] > best[1] else AGGREGATION
