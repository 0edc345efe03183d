#!/usr/bin/env python3
"""The questions of retrieval.py put to SmolLM2-135M-Instruct in transformers over caches that kvpress has cut.

usage: kvpress_quality.py RESULTS.json          (engine_quality.py runs it, in an environment of requirements-kvpress.txt)

Same documents, model, dtype and budgets as engine_quality.py; SnapKV with Kvern's window. facts: one cut cache of the
document answers all questions; asked: the question ends the prompt that is cut.
"""

import json
import os
import pathlib
import statistics
import sys

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import kvpress  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from retrieval import ANSWER_TOKENS, Retrieval, smollm2  # noqa: E402

BUDGETS = {"50%": 0.5, "25%": 0.25}  # below, nobody finds anything
WINDOW = 32
METHODS = {
    "snapkv": lambda cut: kvpress.SnapKVPress(cut, window_size=WINDOW),
    "streaming": kvpress.StreamingLLMPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "random": lambda cut: kvpress.RandomPress(cut, seed=0),
}


class Model:
    def __init__(self):
        self._model = transformers.AutoModelForCausalLM.from_pretrained(str(smollm2()), dtype=torch.float32).eval()

    def cut(self, prompt: list[int], press):
        """The cache that the press leaves of the prompt, and the first token after it."""
        cache = transformers.DynamicCache()
        with press(self._model):
            output = self._model(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
        return cache, int(output.logits[0, -1].argmax())

    def generate(self, cache, tokens: list[int], position: int, count: int) -> list[int]:
        """Tokens that follow `tokens`, which stand at `position`; the cache is as before afterwards."""
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        result: list[int] = []
        while len(result) < count:
            positions = torch.arange(position, position + len(tokens))[None]
            output = self._model(input_ids=torch.tensor([tokens]), past_key_values=cache, position_ids=positions)
            position += len(tokens)
            tokens = [int(output.logits[0, -1].argmax())]
            result += tokens
        for layer, length in zip(cache.layers, lengths):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return result


def facts(model: Model, questions: Retrieval, press) -> float:
    right = []
    for prompt, asked in questions.documents:
        cache, _ = model.cut(prompt, press)
        for question, answer in asked:
            right.append(questions.right(model.generate(cache, question, len(prompt), ANSWER_TOKENS), answer))
    return statistics.mean(right)


def asked(model: Model, questions: Retrieval, press) -> float:
    right = []
    for prompt, pairs in questions.asked:
        for question, answer in pairs:
            cache, first = model.cut(prompt + question, press)
            rest = model.generate(cache, [first], len(prompt) + len(question), ANSWER_TOKENS - 1)
            right.append(questions.right([first, *rest], answer))
    return statistics.mean(right)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model, questions, results = Model(), Retrieval(), {}
    with torch.inference_mode():
        for share, kept in BUDGETS.items():
            for method, press in METHODS.items():
                found = {"facts": facts(model, questions, press(1 - kept)), "asked": asked(model, questions, press(1 - kept))}
                results[f"{method}(budget={share})"] = found
                pathlib.Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")
                print(f"quality: kvpress {method}(budget={share})", found, flush=True)


if __name__ == "__main__":
    main()
