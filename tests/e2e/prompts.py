"""Prompts that no other test uses, and that are the same in every run."""

import hashlib
import random


def prompt(*label, length: int, vocabulary: int) -> list[int]:
    """Random token ids. Equal labels give prompts of which the shorter is a prefix of the longer."""
    seed = int.from_bytes(hashlib.sha256(repr(label).encode()).digest()[:8], "big")
    source = random.Random(seed)
    return [source.randrange(vocabulary) for _ in range(length)]
