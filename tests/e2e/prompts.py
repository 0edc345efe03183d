"""Prompts that no other test uses, and that are the same in every run."""

import functools
import hashlib
import pathlib
import random
import re

from models import ROOT, smollm2


def _source(label) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(repr(label).encode()).digest()[:8], "big"))


def tokens(*label, length: int, vocabulary: int = 2000) -> list[int]:
    """Random token ids, for models with random weights. Equal labels give prompts of which the shorter is a prefix of
    the longer."""
    source = _source(label)
    return [source.randrange(vocabulary) for _ in range(length)]


@functools.cache
def _tokenizer(model: pathlib.Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


@functools.cache
def _sentences() -> list[str]:
    text = re.sub(r"\s+", " ", (ROOT / "LICENSE").read_text())
    return [sentence for sentence in re.split(r"(?<=[.;:]) ", text) if len(sentence) > 30]


def prose(*label, length: int) -> list[int]:
    """English text as tokens of SmolLM2: sentences of the license in an order of its own. Equal labels give prompts of
    which the shorter is a prefix of the longer."""
    source = _source(label)
    text = f"Document {source.randrange(10**9)}."
    encoded: list[int] = []
    while len(encoded) < length + 8:  # the last tokens may change when text is added
        text += " " + " ".join(source.sample(_sentences(), 10))
        encoded = _tokenizer(smollm2()).encode(text, add_special_tokens=False).ids
    return encoded[:length]


def text(*label, length: int) -> str:
    """What prose() says, as a client would send it."""
    return _tokenizer(smollm2()).decode(prose(*label, length=length))
