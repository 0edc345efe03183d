"""Decode steps of a whole model with transformers, its attention replaced by Kvern's over full and compact caches.

    python3 bench/gpu_model.py --library build/release/lib/libkvern_gpu_attend.so [--model FOLDER] [--json FILE]

The model is SmolLM2-135M: that of FOLDER, or its configuration with random weights, which take as long. First the same
prompt is continued greedily by transformers with its own attention, and with Kvern's over the full cache given the same
tokens, and what they find likeliest is compared; and with torch's plain attention in place of its flash, to tell how
often rounding alone decides. Then a decode step is captured in a graph and timed for a cache of
--tokens: transformers with torch's attention (flash) and with Kvern's, over the full cache and over 3.2 % of it.
Medians of replays, timed by events.
"""

import argparse
import json

import torch
from gpu_attention import Library, Plan, Rows, Segment, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

KEPT = 0.032
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
}
# Weights that tell tokens apart: small ones repeat a token for ever.
RANDOM_WEIGHTS = {"initializer_range": 0.04, "tie_word_embeddings": False}


class Attention:
    """Attention of single tokens over the buffers of a StaticCache, of which positions hide what is not there yet."""

    def __init__(self, library, position):
        self.library, self.position, self.plans = library, position, {}

    def plan(self, queries, keys, values):
        batch, heads, entries, dim = keys.shape
        positions = torch.arange(entries, dtype=torch.int32, device="cuda")
        segments = []
        for head in range(batch * heads):
            rows = [Rows(t.data_ptr() + head * entries * dim * 2, dim * 2) for t in (keys, values)]
            segments.append(Segment(head, entries, *rows, None, positions.data_ptr()))
        return Plan(self.library, queries, batch * heads, segments, (positions, keys, values))

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        if query.shape[2] > 1:
            own = slice(query.shape[2])
            output = scaled_dot_product_attention(
                query, key[:, :, own], value[:, :, own], is_causal=True, enable_gqa=True
            )
            return output.transpose(1, 2), None
        queries = query.reshape(-1, 1, query.shape[-1]).contiguous()
        if module.layer_idx not in self.plans:
            self.plans[module.layer_idx] = self.plan(queries, key, value)
        output = self.plans[module.layer_idx].run(queries, self.position)
        return output.to(query.dtype).view(query.shape).transpose(1, 2), None


def torch_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Of single tokens over all of a cache."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None


def continued(model, prompt, count, implementation, attention, given=None):
    """The likeliest tokens after the prompt and those before, which are its own or given ones."""
    model.set_attn_implementation(implementation)
    own = attention is not None
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + count) if own else DynamicCache()
    tokens, ids = [], prompt
    for step in range(count):
        position = torch.arange(ids.shape[1], device="cuda")[None] + (prompt.shape[1] + step - 1 if step else 0)
        if own:
            attention.position.fill_(int(position[0, -1]))
        logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        ids = tokens[-1] if given is None else given[:, step : step + 1]
    return torch.cat(tokens, 1)


def filled_cache(model, batch, entries):
    """A StaticCache whose rows are all there; a step writes its token to the last of them."""
    cache = StaticCache(config=model.config, max_cache_len=entries)
    shape = (batch, model.config.num_key_value_heads, entries, 64)
    for layer in cache.layers:
        keys = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        layer.lazy_initialization(keys, keys)
        layer.keys.copy_(keys)
        layer.values.normal_()
    return cache


def step_seconds(model, batch, entries, implementation, attention=None):
    """Seconds of a decode step, and the bytes of its cache."""
    model.set_attn_implementation(implementation)
    cache = filled_cache(model, batch, entries)
    ids = torch.randint(0, 49152, (batch, 1), device="cuda")
    position = torch.full((1, 1), 8191, device="cuda")
    if attention is not None:
        attention.position.fill_(entries)

    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(entries - 1)
        model(ids, position_ids=position, past_key_values=cache, use_cache=True)

    size = sum(2 * layer.keys.numel() * 2 for layer in cache.layers)
    return seconds_of(step), size


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--model", help="folder of the model; without it: random weights")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", help="where the figures go")
    arguments = parser.parse_args(words)
    library = Library(arguments.library)
    torch.manual_seed(1)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M, **RANDOM_WEIGHTS), dtype=torch.bfloat16)
    model = model.cuda().eval()
    position = torch.zeros(1, dtype=torch.int32, device="cuda")

    def fresh(name):
        attention = Attention(library, position)
        AttentionInterface.register(name, attention)
        return attention

    AttentionInterface.register("torch_full", torch_attention)
    report = {"device": torch.cuda.get_device_name(), "weights": arguments.model or "random", "rows": []}
    with torch.inference_mode():
        prompt = torch.randint(0, 49152, (1, 4000), device="cuda")
        expected = continued(model, prompt, 48, "sdpa", None)
        got = continued(model, prompt, 48, "kvern", fresh("kvern"), expected)
        with sdpa_kernel(SDPBackend.MATH):
            other = continued(model, prompt, 48, "sdpa", None, expected)
        report["same_tokens"] = int((expected == got).sum())
        report["same_tokens_of_torch_math"] = int((expected == other).sum())
        report["tokens_compared"] = got.numel()
        print(
            f"{report['same_tokens']} of {got.numel()} greedy tokens are the same"
            f" ({report['same_tokens_of_torch_math']} with torch's plain attention)",
            flush=True,
        )
        print("batch  attention            entries  ms/step   tokens/s  speed-up  cache MB", flush=True)
        kept = int(arguments.tokens * KEPT)
        for batch in arguments.batches:
            full = None
            for name, entries, own in (
                ("torch_full", arguments.tokens, False),
                ("kvern_full", arguments.tokens, True),
                ("kvern_compact", kept, True),
            ):
                attention = fresh(name) if own else None
                seconds, size = step_seconds(model, batch, entries, name, attention)
                full = full or seconds
                report["rows"].append(
                    {
                        "batch": batch,
                        "attention": name,
                        "entries": entries,
                        "step_seconds": seconds,
                        "tokens_per_second": batch / seconds,
                        "speed_up": full / seconds,
                        "cache_bytes": size,
                    }
                )
                print(
                    f"{batch:5d}  {name:20s} {entries:7d} {seconds * 1e3:8.3f} {batch / seconds:10.0f}"
                    f" {full / seconds:9.2f} {size / 1e6:9.1f}",
                    flush=True,
                )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
