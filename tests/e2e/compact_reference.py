"""Compact caches by definition: the published scores written down once more, and decoding in transformers on the kept
rows at the positions that they had in the prompt."""

import itertools
import math
import re
from collections.abc import Iterator

import torch

ROUNDING = 5e-7  # relative; scores that are nearer than that are the same to those who compute in fp32
MOST_DOUBTS = 3  # such pairs in a whole cache: a prompt with more of them shows nothing


def parameters(spec: str) -> tuple[str, dict[str, str]]:
    """Method and settings of a canonical chain's first step."""
    name, settings = re.match(r"(\w+)\((.*?)\)", spec).groups()
    return name, dict(part.split("=", 1) for part in settings.split(","))


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[query head, row, token]: causal softmax of the prompt's last queries over all keys."""
    queries, keys = queries.double(), keys.double().repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    rows, tokens = queries.shape[1], keys.shape[1]
    logits = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[2])
    late = torch.arange(tokens)[None, :] > torch.arange(tokens - rows, tokens)[:, None]
    return logits.masked_fill(late, -math.inf).softmax(-1)


def pooled(scores: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.avg_pool1d(scores[:, None], width, stride=1, padding=width // 2)[:, 0]


Doubts = list[tuple[int, int, int]]  # head, the last token that it keeps, one whose score is the same but for rounding


def best(scores: torch.Tensor, count: int, tail: range) -> tuple[torch.Tensor, Doubts]:
    """[head, token]: the best of each head, then all of the tail."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.cat([order[:, :count], torch.tensor(list(tail), dtype=torch.long).expand(scores.shape[0], -1)], -1)
    if not 0 < count < scores.shape[1]:
        return kept, []
    close = values[:, count - 1] - values[:, count] < ROUNDING * values[:, count - 1].abs()
    return kept, [(head, *order[head, count - 1 : count + 1].tolist()) for head in close.nonzero()[:, 0].tolist()]


def by_attention(name: str, settings: dict, queries, keys, slots: int) -> tuple[torch.Tensor, Doubts]:
    heads, tokens = keys.shape[:2]
    window = int(settings["window"])
    seen = attention(queries[:, -window:], keys)[:, :, : tokens - window]
    scores = seen.mean(1)
    if name == "cake":
        scores = scores + float(settings["gamma"]) * seen.var(1)
    assert settings["pool"] == "avg"
    scores = pooled(scores, int(settings["kernel"])).reshape(heads, -1, tokens - window).mean(1)
    return best(scores, slots - window, range(tokens - window, tokens))


def by_windows(settings: dict, queries, keys, slots: int) -> torch.Tensor:
    heads, tokens = keys.shape[:2]
    omega, alpha, top = (int(settings[key]) for key in ("omega", "alpha", "top"))
    columns = (tokens - alpha) // omega * omega
    sums = attention(queries[:, -alpha:], keys)[:, :, :columns].sum(1).reshape(queries.shape[0], -1, omega)
    scores = sums.sort(-1, descending=True).values[:, :, :top].mean(-1).mean(0)
    whole, rest = divmod(slots - (tokens - columns), omega)
    ranked = scores.sort(descending=True, stable=True).indices
    inside = (ranked[:whole, None] * omega + torch.arange(omega)).reshape(-1)
    if rest:  # where layers keep whole pages: the last tokens of the next best window
        inside = torch.cat([inside, (ranked[whole] + 1) * omega - rest + torch.arange(rest)])
    return torch.cat([inside.sort().values, torch.arange(columns, tokens)]).expand(heads, -1)


def shares(preferences: torch.Tensor, total: float, cap: float) -> torch.Tensor:
    """CAKE's tokens of each layer in real numbers: in proportion to the preferences, none above the cap."""
    low, high = 0.0, cap / preferences.min().item()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * preferences).clamp(max=cap).sum() < total else (low, middle)
    return (high * preferences).clamp(max=cap)


def layer_tokens(spec: str, slots: float, most: int, prompt: dict) -> torch.Tensor:
    """Tokens that each layer of a ragged cache keeps, `slots` on average and no more than `most`, in real numbers: CAKE's
    preferences, or a falling line."""
    name, settings = parameters(spec)
    layers, tokens = len(prompt["keys"]), prompt["keys"][0].shape[1]
    if settings["allocation"] != "cake":
        slope = 14
        tail = int(settings["recent"]) if name in ("knorm", "keydiff") else int(settings["window"])
        if name in ("knorm", "keydiff"):
            tail += int(settings["sinks"])
        line = torch.linspace(2 - 1 / slope, 1 / slope, layers, dtype=torch.double)
        return tail + shares(line, (slots - tail) * layers, most - tail)
    window, preferences = int(settings["window"]), []
    for queries, keys in zip(prompt["queries"], prompt["keys"]):
        seen = attention(queries[:, -window:], keys)[:, :, : tokens - window]
        dispersion, shift = -torch.xlogy(seen, seen).sum(), seen.var(1).sum()
        preferences.append(dispersion ** (1 / float(settings["tau1"])) * shift ** (1 / float(settings["tau2"])))
    preferences = torch.stack(preferences)
    return window + shares(preferences, (slots - window) * layers, most - window)


def by_keys(name: str, settings: dict, keys, slots: int) -> tuple[torch.Tensor, Doubts]:
    sinks, recent = int(settings["sinks"]), int(settings["recent"])
    keys, tokens = keys.double(), keys.shape[1]
    if name == "knorm":
        scores = -keys.norm(dim=-1)
    else:
        directions = torch.nn.functional.normalize(keys, dim=-1)
        scores = -(directions * torch.nn.functional.normalize(directions.mean(1, keepdim=True), dim=-1)).sum(-1)
    scores = scores[:, : tokens - recent].clone()
    scores[:, :sinks] = math.inf
    return best(scores, slots - recent, range(tokens - recent, tokens))


def selection(spec: str, slots: int, queries, keys) -> tuple[torch.Tensor, Doubts]:
    """[KV head, slot] -> token, of one layer. queries: [head, row, dim]; keys: [KV head, token, dim]."""
    name, settings = parameters(spec)
    tokens = keys.shape[1]
    if name in ("cake", "snapkv"):
        return by_attention(name, settings, queries, keys, slots)
    if name == "windowkv":
        return by_windows(settings, queries, keys, slots), []
    if name == "streaming":
        sinks = int(settings["sinks"])
        kept = torch.cat([torch.arange(sinks), torch.arange(tokens - slots + sinks, tokens)])
        return kept.expand(keys.shape[0], -1), []
    return by_keys(name, settings, keys, slots)


def prunings(spec: str, slots: int | list[int], prompt: dict) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Kept keys and values of each layer, [1, KV head, slot, dim]; once more for each other choice between tokens whose
    scores only rounding tells apart. slots: of all layers, or of each. prompt: as engine_process.save_prompt() saves it."""
    layers = []
    for i, keys in enumerate(prompt["keys"]):
        count = slots if isinstance(slots, int) else slots[i]
        layers.append(selection(spec, count, prompt["queries"][i] if len(prompt["queries"]) else None, keys))
        assert layers[-1][0].shape[1] == count
    doubts = [(kept, *doubt) for kept, of_layer in layers for doubt in of_layer]
    assert len(doubts) <= MOST_DOUBTS, f"{len(doubts)} pairs of tokens have the same score"
    for exchanged in itertools.product((False, True), repeat=len(doubts)):
        for exchange, (kept, head, last, other) in zip(exchanged, doubts):
            is_either = (kept[head] == last) | (kept[head] == other)
            kept[head, is_either] = other if exchange else last
        yield [
            tuple(part.gather(1, kept[..., None].expand(-1, -1, part.shape[2]))[None] for part in rows)
            for (kept, _), *rows in zip(layers, prompt["keys"], prompt["values"])
        ]


def attend(module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
    """Causal attention of the last rows over all tokens that the layer has."""
    group, rows, tokens = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    late = torch.arange(tokens)[None, :] > torch.arange(tokens - rows, tokens)[:, None]
    output = logits.masked_fill(late, -math.inf).softmax(-1) @ value.repeat_interleave(group, 1)
    return output.transpose(1, 2).contiguous(), None


@torch.no_grad()
def decode(model, layers, suffix: list[int], generated: list[int], position: int) -> torch.Tensor:
    """Log-probabilities of each generated token's position, [token, vocabulary]: the suffix and the generated tokens at
    positions from `position` on, over the given rows and over each other."""
    from transformers import AttentionInterface, DynamicCache

    # The model's own attention takes one mask for all layers, which their lengths forbid when they differ.
    AttentionInterface.register("by_definition", attend)
    ragged = len({keys.shape[2] for keys, _ in layers}) > 1
    model.config._attn_implementation = "by_definition" if ragged else "sdpa"
    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys.to(model.dtype), values.to(model.dtype), i)
    slots, new = layers[0][0].shape[2], len(suffix) + len(generated) - 1
    late = torch.arange(slots + new)[None, :] > slots + torch.arange(new)[:, None]
    mask = torch.zeros(new, slots + new, dtype=model.dtype).masked_fill(late, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=torch.tensor([suffix + generated[:-1]]),
        past_key_values=cache,
        attention_mask=mask[None, None],
        position_ids=torch.arange(position, position + new)[None],
    ).logits[0, len(suffix) - 1 :]
    return logits.float().log_softmax(-1)
