"""Compact caches by definition: the published scores written down once more, and decoding in transformers on the kept
rows at the positions that they had in the prompt."""

import math
import re

import torch


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


def best(scores: torch.Tensor, count: int, tail: range) -> torch.Tensor:
    """[head, token], ascending: the best of each head, then all of the tail."""
    top = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    return torch.cat([top, torch.tensor(list(tail), dtype=torch.long).expand(scores.shape[0], -1)], -1)


def by_attention(name: str, settings: dict, queries, keys, slots: int) -> torch.Tensor:
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
    kept = best(scores[None], (slots - (tokens - columns)) // omega, range(0))[0]
    inside = (kept[:, None] * omega + torch.arange(omega)).reshape(-1)
    return torch.cat([inside, torch.arange(columns, tokens)]).expand(heads, -1)


def by_keys(name: str, settings: dict, keys, slots: int) -> torch.Tensor:
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


def selection(spec: str, slots: int, queries, keys) -> torch.Tensor:
    """[KV head, slot] -> token, of one layer. queries: [head, row, dim]; keys: [KV head, token, dim]."""
    name, settings = parameters(spec)
    tokens = keys.shape[1]
    if name in ("cake", "snapkv"):
        return by_attention(name, settings, queries, keys, slots)
    if name == "windowkv":
        return by_windows(settings, queries, keys, slots)
    if name == "streaming":
        sinks = int(settings["sinks"])
        kept = torch.cat([torch.arange(sinks), torch.arange(tokens - slots + sinks, tokens)])
        return kept.expand(keys.shape[0], -1)
    return by_keys(name, settings, keys, slots)


def pruned(spec: str, slots: int, prompt: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Kept keys and values of each layer, [1, KV head, slot, dim]. prompt: as engine_process.save_prompt() saves it."""
    layers = []
    for i, (keys, values) in enumerate(zip(prompt["keys"], prompt["values"])):
        kept = selection(spec, slots, prompt["queries"][i] if len(prompt["queries"]) else None, keys)[..., None]
        assert kept.shape[1] == slots
        layers.append(tuple(rows.gather(1, kept.expand(-1, -1, rows.shape[2]))[None] for rows in (keys, values)))
    return layers


@torch.no_grad()
def decode(model, layers, suffix: list[int], generated: list[int], position: int) -> torch.Tensor:
    """Log-probabilities of each generated token's position, [token, vocabulary]: the suffix and the generated tokens at
    positions from `position` on, over the given rows and over each other."""
    from transformers import DynamicCache

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
