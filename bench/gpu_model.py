"""Decode steps of a whole model with transformers, its attention replaced by Kvern's over full and compact caches.

    python3 bench/gpu_model.py --library build/release/lib/libkvern_gpu_attend.so [--model FOLDER] [--json FILE]

The model is SmolLM2-135M: that of FOLDER, or its configuration with random weights, which take as long.

Agreement: a prompt of PROMPT tokens is read, and then, with every attention, the same COMPARED tokens after it are given
one by one; how many of the likeliest next tokens are those that transformers finds with its own attention is counted,
and how likely the given ones are is measured (mean negative log-likelihood; its exponential is the perplexity). With
torch's plain attention in place of its flash, and with attention in float64, to tell how often rounding alone decides;
with Kvern's over the full cache, the outputs of which are compared with float64's, too; and over what CAKE keeps of the
prompt, for several shares of it: Kvern's kernels score and select per layer and head, the kept rows are copied, and
attention reads those and the rows of newer tokens. All layers keep the same number.
Of a model, prompt and given tokens are --text (default: prompt.txt in its folder, or the GNU General Public License as
Debian has it); with random weights they are random, and what torch decodes greedily.

Speed: a decode step is captured in a graph and timed for a cache of --tokens, filled at random: with torch's attention
(flash) and with Kvern's, over the full cache and over 3.2 % of it. Medians of replays, timed by events.
"""

import argparse
import ctypes
import json
import pathlib

import torch
from gpu_attention import DTYPES, Library, Plan, Rows, Segment, seconds_of, stream
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    StaticCache,
)

DEVICE = "cuda"
KEPT = 0.032
# Shares of the prompt, the observed tokens included.
SHARES = [KEPT, 0.12, 0.25, 0.5]
OBSERVED = 32
LICENCE = pathlib.Path("/usr/share/common-licenses/GPL-3")
PROMPT, COMPARED = 4000, 64
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


def kept_tokens(library, queries, keys, count):
    """[heads, count] of one sequence's keys [1, heads, tokens, dim]: CAKE's best, and the tokens of the queries."""
    _, query_heads, rows, dim = queries.shape
    _, heads, tokens, _ = keys.shape
    shape = (DTYPES[keys.dtype], query_heads, rows, heads, tokens, dim)
    scratch = torch.empty(library.c.kvern_keep_bytes(*shape), dtype=torch.uint8, device=DEVICE)
    kept = torch.empty(heads, count, dtype=torch.int32, device=DEVICE)
    queries = queries.contiguous()
    library.check(
        library.c.kvern_keep(
            *shape,
            ctypes.c_void_p(queries.data_ptr()),
            ctypes.c_void_p(keys.data_ptr()),
            ctypes.c_uint64(keys.stride(1) * keys.element_size()),
            count - rows,
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_void_p(kept.data_ptr()),
            stream(),
        )
    )
    return kept


def prompt_attention(query, key, value):
    """Of a prompt over its own rows, the first of the buffers."""
    own = slice(query.shape[2])
    return scaled_dot_product_attention(query, key[:, :, own], value[:, :, own], is_causal=True, enable_gqa=True)


class Exact:
    """Attention of single tokens in float64 over the buffers of a StaticCache, up to the position; rounded once."""

    def __init__(self, position):
        self.position = position

    def output(self, query, key, value, scaling):
        seen = slice(int(self.position) + 1)
        sharing = query.shape[1] // key.shape[1]
        keys, values = (rows[:, :, seen].double().repeat_interleave(sharing, 1) for rows in (key, value))
        return (query.double() @ keys.transpose(2, 3) * scaling).softmax(-1) @ values

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        prompt = query.shape[2] > 1
        output = prompt_attention(query, key, value) if prompt else self.output(query, key, value, scaling)
        return output.to(query.dtype).transpose(1, 2), None


class Attention:
    """Attention of single tokens over the buffers of a StaticCache, of which positions hide what is not there yet. With
    a share, prompts (of one sequence) are compacted to it, and their rows in the buffers are not read any more. exact: what
    outputs are compared with."""

    def __init__(self, library, position, share=None, exact=None):
        self.library, self.position, self.share, self.exact = library, position, share, exact
        self.worst_error = 0.0  # of a layer and step, relative, before it is rounded
        self.plans, self.compact = {}, {}

    def compacted(self, query, key, value):
        kept = kept_tokens(self.library, query[:, :, -OBSERVED:], key, round(self.share * query.shape[2]))
        index = kept.long()[None, :, :, None].expand(-1, -1, -1, key.shape[-1])
        return [rows.gather(2, index).contiguous() for rows in (key, value)]

    def plan(self, layer, queries, keys, values):
        batch, heads, entries, dim = keys.shape
        prompt, compact = self.compact.get(layer, (0, []))
        positions = torch.arange(prompt, entries, dtype=torch.int32, device=DEVICE)
        segments = []
        for head in range(batch * heads):
            if compact:
                count = compact[0].shape[2]
                rows = [Rows(t.data_ptr() + head * count * dim * 2, dim * 2) for t in compact]
                segments.append(Segment(head, count, *rows))
            rows = [Rows(t.data_ptr() + (head * entries + prompt) * dim * 2, dim * 2) for t in (keys, values)]
            segments.append(Segment(head, entries - prompt, *rows, None, positions.data_ptr()))
        return Plan(self.library, queries, batch * heads, segments, (positions, keys, values, compact))

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        layer, tokens = module.layer_idx, query.shape[2]
        if tokens > 1:
            if self.share is not None:
                self.compact[layer] = tokens, self.compacted(query, key[:, :, :tokens], value[:, :, :tokens])
            return prompt_attention(query, key, value).transpose(1, 2), None
        queries = query.reshape(-1, 1, query.shape[-1]).contiguous()
        if layer not in self.plans:
            self.plans[layer] = self.plan(layer, queries, key, value)
        output = self.plans[layer].run(queries, self.position).view(query.shape)
        if self.exact is not None:
            exact = self.exact.output(query, key, value, scaling)
            self.worst_error = max(self.worst_error, ((output - exact).norm() / exact.norm()).item())
        return output.to(query.dtype).transpose(1, 2), None


def torch_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Of single tokens over all of a cache."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None


def continued(model, prompt, implementation, attention=None, given=None):
    """The likeliest tokens after the prompt and those before, which are given or its own, and the given ones' mean
    negative log-likelihood."""
    model.set_attn_implementation(implementation)
    own = attention is not None
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + COMPARED) if own else DynamicCache()
    tokens, losses, ids = [], [], prompt
    for step in range(COMPARED):
        position = torch.arange(ids.shape[1], device=DEVICE)[None] + (prompt.shape[1] + step - 1 if step else 0)
        if own:
            attention.position.fill_(int(position[0, -1]))
        logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        ids = tokens[-1] if given is None else given[:, step : step + 1]
        losses.append(cross_entropy(logits[:, -1].float(), ids[:, 0]))
    return torch.cat(tokens, 1), torch.stack(losses).mean().item()


def text_tokens(folder, text):
    """The first PROMPT and the COMPARED tokens after them."""
    beside = pathlib.Path(folder) / "prompt.txt"
    text = text or (beside if beside.exists() else LICENCE)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids
    if ids.shape[1] < PROMPT + COMPARED:
        raise SystemExit(f"gpu_model: {text} has {ids.shape[1]} tokens, {PROMPT + COMPARED} are needed")
    ids = ids.to(DEVICE)
    return ids[:, :PROMPT], ids[:, PROMPT : PROMPT + COMPARED]


def agreements(model, prompt, given, fresh, position):
    """A row per attention, and the largest error of Kvern's in a layer and step."""
    if given is None:
        given, _ = continued(model, prompt, "sdpa")
    expected, loss = continued(model, prompt, "sdpa", given=given)
    found = {"torch, full": (PROMPT, expected, loss)}
    with sdpa_kernel(SDPBackend.MATH):
        found["torch plain, full"] = (PROMPT, *continued(model, prompt, "sdpa", given=given))
    exact = Exact(position)
    AttentionInterface.register("float64", exact)
    found["float64, full"] = (PROMPT, *continued(model, prompt, "float64", exact, given))
    compared = fresh("kvern", exact=exact)
    found["kvern, full"] = (PROMPT, *continued(model, prompt, "kvern", compared, given))
    for share in SHARES:
        tokens = continued(model, prompt, "kvern", fresh("kvern", share), given)
        found[f"kvern, CAKE {share:.1%}"] = (round(share * PROMPT), *tokens)
    rows = []
    print("attention            of the prompt  same tokens      nll", flush=True)
    for name, (entries, tokens, loss) in found.items():
        same = int((tokens == expected).sum())
        rows.append(
            {"attention": name, "entries": entries, "same_tokens": same, "tokens_compared": COMPARED, "nll": loss}
        )
        print(f"{name:20s} {entries:13d} {same:5d} of {COMPARED:3d} {loss:8.4f}", flush=True)
    print(f"largest error of Kvern's attention against float64: {compared.worst_error:.1e}", flush=True)
    return rows, compared.worst_error


def filled_cache(model, batch, entries):
    """A StaticCache whose rows are all there; a step writes its token to the last of them."""
    cache = StaticCache(config=model.config, max_cache_len=entries)
    shape = (batch, model.config.num_key_value_heads, entries, 64)
    for layer in cache.layers:
        keys = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        layer.lazy_initialization(keys, keys)
        layer.keys.copy_(keys)
        layer.values.normal_()
    return cache


def step_seconds(model, batch, entries, implementation, attention=None):
    """Seconds of a decode step, and the bytes of its cache."""
    model.set_attn_implementation(implementation)
    cache = filled_cache(model, batch, entries)
    ids = torch.randint(0, 49152, (batch, 1), device=DEVICE)
    position = torch.full((1, 1), 8191, device=DEVICE)
    if attention is not None:
        attention.position.fill_(entries)

    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(entries - 1)
        model(ids, position_ids=position, past_key_values=cache, use_cache=True)

    size = sum(2 * layer.keys.numel() * 2 for layer in cache.layers)
    return seconds_of(step), size


def speeds(model, batches, tokens, fresh):
    """A row per batch and attention."""
    AttentionInterface.register("torch", torch_attention)
    rows = []
    print("batch  attention            entries  ms/step   tokens/s  speed-up  cache MB", flush=True)
    for batch in batches:
        full = None
        for name, own, entries in (
            ("torch, full", False, tokens),
            ("kvern, full", True, tokens),
            ("kvern, compact", True, int(tokens * KEPT)),
            ("torch, compact", False, int(tokens * KEPT)),
        ):
            attention = fresh("kvern") if own else None
            seconds, size = step_seconds(model, batch, entries, "kvern" if own else "torch", attention)
            full = full or seconds
            rows.append(
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
    return rows


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--model", help="folder of the model; without it: random weights")
    parser.add_argument("--text", type=pathlib.Path, help="what the model reads")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", help="where the figures go")
    arguments = parser.parse_args(words)
    library = Library(arguments.library)
    torch.manual_seed(1)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        prompt, given = text_tokens(arguments.model, arguments.text)
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M, **RANDOM_WEIGHTS), dtype=torch.bfloat16)
        prompt, given = torch.randint(0, 49152, (1, PROMPT), device=DEVICE), None
    model = model.to(DEVICE).eval()
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def fresh(name, share=None, exact=None):
        attention = Attention(library, position, share, exact)
        AttentionInterface.register(name, attention)
        return attention

    report = {"device": torch.cuda.get_device_name(), "weights": "real" if arguments.model else "random"}
    with torch.inference_mode():
        report["agreement"], report["worst_error"] = agreements(model, prompt, given, fresh, position)
        report["rows"] = speeds(model, arguments.batches, arguments.tokens, fresh)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
