"""Documents with planted facts and lists of pairs, as tokens, with questions about them and the right answers.

Needs the tokenizers package alone, so that environments of other libraries can ask the same.
"""

import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from models import smollm2  # noqa: E402
from prompts import prose  # noqa: E402

FACT_TOKENS = 1000
NAMES = ["Alice", "Robert", "Maria", "Thomas", "Helena"]
DOCUMENTS = 2
ASKED_DOCUMENTS = 1
PAIR_LINES = 48
PAIRS = 8
ANSWER_TOKENS = 8


class Retrieval:
    """documents and pairs: each a list of (prompt, [(question, answer)]); prompts and questions are token ids."""

    def __init__(self):
        from tokenizers import Tokenizer

        self._codec = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
        self.documents = [self._facts(number) for number in range(DOCUMENTS)]
        self.pairs = [self._pairs(number) for number in range(DOCUMENTS)]
        self.asked = self.documents[:ASKED_DOCUMENTS]

    def encode(self, text: str) -> list[int]:
        return self._codec.encode(text, add_special_tokens=False).ids

    def right(self, generated: list[int], answer: str) -> bool:
        return self._codec.decode(generated).strip().startswith(answer)

    def _facts(self, number: int):
        source = random.Random(number)
        filler = prose("facts", number, length=FACT_TOKENS)
        numbers = source.sample(range(10_000, 99_999), len(NAMES))
        ids = []
        share = len(filler) // len(NAMES)
        for i, (name, value) in enumerate(zip(NAMES, numbers)):
            part = filler[i * share : (i + 1) * share]
            ids += part[: share // 2] + self.encode(f" The secret number of {name} is {value}. ") + part[share // 2 :]
        asked = [(self.encode(f"\nThe secret number of {name} is"), str(value)) for name, value in zip(NAMES, numbers)]
        return ids, asked

    def _pairs(self, number: int):
        source = random.Random(1000 + number)
        letters = ("bcdfghklmnprstvw", "aeiou")
        keys = ["".join(source.choice(kind) for _ in range(3) for kind in letters) for _ in range(PAIR_LINES)]
        values = [str(source.randrange(100, 999)) for _ in keys]
        text = "".join(f"The code of {key} is {value}.\n" for key, value in zip(keys, values))
        chosen = range(PAIR_LINES // PAIRS // 2, PAIR_LINES, PAIR_LINES // PAIRS)
        return self.encode(text), [(self.encode(f"The code of {keys[i]} is"), values[i]) for i in chosen]
