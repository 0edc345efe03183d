#!/usr/bin/env python3
"""The steps of our kernels in torch: the best of eager and compiled, in bf16, fp16 and fp32.

usage: torch_kernels.py [--threads 1] [--only STEP ...] [--seconds 0.4]

One layer: 8 KV heads, 32 query heads, dim 128, 4,096 tokens (scores also 32,768, attention 32,768). Prints one JSON
object: per step "ms", the median of the best variant, "variant", which that was, and "gb_per_s", where it has raw
bytes: those of the same K and V in two-byte elements, whatever the variant computes in. Copies of the inputs, 128 MiB
of them, take turns. Compiled fp16 is left out: it was never the best, and compiling takes most of the time.
"""

import argparse
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

HEADS, QUERY_HEADS, DIM = 8, 32, 128
GROUP = QUERY_HEADS // HEADS
TOKENS, LONG = 4096, 32768
WINDOW = 32
KEEP = 2048
CHUNK = 64
WORKING_SET = 128 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantise(bits, axis):
    """KIVI's groups of 64 along the axis (-2: tokens of a channel, -1: channels of a token), codes packed into bytes.
    A byte holds codes half (or a quarter) of a group apart, so that unpacking needs no interleaving."""
    levels = 2**bits - 1
    per_byte = 8 // bits

    def run(x):
        groups = x.unflatten(axis, (-1, 64))
        low, high = groups.amin(axis, True), groups.amax(axis, True)
        scale = (high - low) / levels
        codes = ((groups - low) / scale).round().clamp(0, levels).to(torch.uint8)
        if per_byte > 1:
            parts = codes.unflatten(axis, (per_byte, -1)).unbind(axis - 1)
            codes = sum((part << (bits * i) for i, part in enumerate(parts[1:], 1)), start=parts[0])
        return codes, scale, low

    return run


def dequantise(bits, axis, dtype):
    mask = 2**bits - 1
    shifts = (torch.arange(8 // bits, dtype=torch.uint8) * bits).reshape(-1, *[1] * -axis)

    def run(codes, scale, low):
        if bits < 8:
            codes = ((codes.unsqueeze(axis - 1) >> shifts) & mask).flatten(axis - 1, axis)
        return (codes.to(dtype) * scale + low).flatten(axis - 1, axis)

    return run


def int8_symmetric(axis):
    def run(x):
        groups = x.unflatten(axis, (-1, 64))
        scale = groups.abs().amax(axis, True) / 127
        return (groups / scale).round().to(torch.int8), scale

    return run


def fp8(x):
    scale = x.abs().amax((-2, -1), True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def both(of_keys, of_values):
    return lambda k, v: (of_keys(k), of_values(v))


def observe(q, k):
    """Attention of the last rows over the candidates, query heads grouped over the KV head that they share."""
    logits = torch.einsum("hgwd,hsd->hgws", q.unflatten(0, (HEADS, GROUP)), k) / math.sqrt(DIM)
    mask = torch.ones(WINDOW, WINDOW, dtype=torch.bool, device=q.device).triu(1)
    logits[..., -WINDOW:].masked_fill_(mask, -torch.inf)
    return torch.softmax(logits, -1, dtype=torch.float32)[..., :-WINDOW]


def pool(scores):
    return F.avg_pool1d(scores, 5, 1, 2, count_include_pad=True).mean(1)


def score_snapkv(q, k):
    return pool(observe(q, k).mean(2))


def score_cake(q, k):
    a = observe(q, k)
    variance = a.var(2)
    entropy = -(a * torch.log(a + 1e-10)).sum()
    return pool(a.mean(2) + 200 * variance), entropy, variance.sum()


def score_windowkv(q, k):
    sums = observe(q, k).sum(2).flatten(0, 1)
    sums = F.pad(sums, (0, -sums.shape[-1] % 8))
    return sums.unflatten(-1, (-1, 8)).mean(-1).mean(0)


def score_knorm(q, k):
    return -k.norm(dim=-1)


def score_keydiff(q, k):
    unit = F.normalize(k, dim=-1)
    return -F.cosine_similarity(k, unit.mean(-2, True), dim=-1)


def select_gather(scores, k, v):
    index = scores.topk(KEEP, -1).indices.sort(-1).values.unsqueeze(-1).expand(-1, -1, DIM)
    return k.gather(1, index), v.gather(1, index)


def merge_minicache(x, y, t=0.6):
    nx, ny = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    ux, uy = x / nx, y / ny
    angle = torch.acos((ux * uy).sum(-1, True).clamp(-1 + 1e-3, 1 - 1e-3))
    e = (torch.sin((1 - t) * angle) * ux + torch.sin(t * angle) * uy) / torch.sin(angle)
    top = angle.squeeze(-1).topk(int(0.05 * x.shape[1]), -1).indices
    return e, nx, ny, top


def restore_minicache(e, nx, ny):
    return e * nx, e * ny


def match_centroid(k):
    """Within chunks of 64: even entries find their most similar odd one; the best half of the pairs counts."""
    unit = F.normalize(k.unflatten(1, (-1, CHUNK)).flatten(0, 1), dim=-1)
    best, target = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    edges = best.topk(CHUNK // 4, -1).indices
    return edges, target.gather(1, edges)


def cluster_centroid(k, v):
    """The same, and each pair becomes its mean."""
    edges, into = match_centroid(k)
    into = into.unsqueeze(-1).expand(-1, -1, DIM)
    keys, values = k.unflatten(1, (-1, CHUNK)).flatten(0, 1), v.unflatten(1, (-1, CHUNK)).flatten(0, 1)
    counts = torch.ones(into.shape[0], CHUNK // 2, 1, dtype=keys.dtype)
    counts.scatter_add_(1, into[..., :1], torch.ones_like(into[..., :1], dtype=keys.dtype))
    merged = []
    for rows in (keys, values):
        moved = rows[:, 0::2].gather(1, edges.unsqueeze(-1).expand(-1, -1, DIM))
        merged.append(rows[:, 1::2].scatter_add(1, into, moved) / counts)
    kept = torch.ones(keys.shape[0], CHUNK // 2, dtype=torch.bool).scatter(1, edges, False)
    return merged, counts, keys[:, 0::2][kept], values[:, 0::2][kept]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), enable_gqa=True)


def rows(heads, tokens, dtype, seed):
    return torch.randn(heads, tokens, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """A function, how its inputs are made in a dtype, and the raw bytes that count."""

    def __init__(self, make, raw_tokens=0, parts=2, compiled=True):
        self.make, self.compiled = make, compiled
        self.raw_bytes = parts * HEADS * raw_tokens * DIM * 2


def on_kv(function_of, tokens=TOKENS, **options):
    def make(dtype, seed):
        return function_of(dtype), (rows(HEADS, tokens, dtype, seed), rows(HEADS, tokens, dtype, seed + 1))

    return Step(make, tokens, **options)


def decoding(encode_keys, encode_values, decode):
    """decode(dtype) takes what the encoders make of K and of V."""

    def make(dtype, seed):
        encoded = encode_keys(rows(HEADS, TOKENS, dtype, seed)), encode_values(rows(HEADS, TOKENS, dtype, seed + 1))
        return decode(dtype), encoded

    return Step(make, TOKENS)


def scoring(function, tokens, **options):
    def make(dtype, seed):
        return function, (rows(QUERY_HEADS, WINDOW, dtype, seed), rows(HEADS, tokens, dtype, seed + 1))

    return Step(make, tokens, parts=1, **options)


def steps():
    def of_kivi(bits):
        return decoding(
            quantise(bits, -2),
            quantise(bits, -1),
            lambda dtype: lambda k, v: (dequantise(bits, -2, dtype)(*k), dequantise(bits, -1, dtype)(*v)),
        )

    def merged(dtype, seed):
        return merge_minicache, (rows(HEADS, TOKENS, dtype, seed), rows(HEADS, TOKENS, dtype, seed + 1))

    def restoring(dtype, seed):
        return restore_minicache, merge_minicache(*merged(dtype, seed)[1])[:3]

    def selecting(dtype, seed):
        return select_gather, (torch.rand(HEADS, TOKENS), *merged(dtype, seed)[1])

    def attending(tokens):
        return lambda dtype, seed: (
            attend,
            (rows(QUERY_HEADS, 1, dtype, seed), rows(HEADS, tokens, dtype, seed), rows(HEADS, tokens, dtype, seed + 1)),
        )

    def int8_decode(dtype):
        back = lambda coded, scale: coded.to(dtype) * scale  # noqa: E731
        return lambda k, v: (back(*k), back(*v))

    all_steps = {
        "encode_int8": on_kv(lambda dtype: both(int8_symmetric(-2), int8_symmetric(-1))),
        "decode_int8": decoding(int8_symmetric(-2), int8_symmetric(-1), int8_decode),
        "encode_fp8": on_kv(lambda dtype: both(fp8, fp8)),
        "decode_fp8": decoding(fp8, fp8, int8_decode),
        "merge_minicache": Step(merged, TOKENS),
        "restore_minicache": Step(restoring, TOKENS),
        "match_centroid": Step(
            lambda dtype, seed: (match_centroid, (rows(HEADS, TOKENS, dtype, seed),)), TOKENS, parts=1
        ),
        "cluster_centroid": Step(lambda dtype, seed: (cluster_centroid, merged(dtype, seed)[1]), TOKENS, compiled=False),
        "select_gather": Step(selecting, TOKENS, compiled=False),
        "attend_full": Step(attending(LONG), LONG, compiled=False),
        "attend_1_32": Step(attending(LONG // 32), LONG // 32, compiled=False),
    }
    for bits in (4, 2):
        all_steps[f"encode_int{bits}"] = on_kv(lambda dtype, b=bits: both(quantise(b, -2), quantise(b, -1)))
        all_steps[f"decode_int{bits}"] = of_kivi(bits)
    # Three bits do not divide a byte; torch's best is a code per byte.
    all_steps["encode_int3"] = on_kv(lambda dtype: both(quantise(8, -2), quantise(8, -1)))
    for name, function in (
        ("snapkv", score_snapkv),
        ("cake", score_cake),
        ("windowkv", score_windowkv),
        ("keydiff", score_keydiff),
        ("knorm", score_knorm),
    ):
        light = name in ("cake", "keydiff", "knorm")
        all_steps[f"score_{name}_4k"] = scoring(function, TOKENS, compiled=light)
        all_steps[f"score_{name}_32k"] = scoring(function, LONG, compiled=light)
    return all_steps


def time_step(function, inputs, seconds):
    """Median milliseconds over the given time, at least three calls, after one that does not count."""
    function(*inputs[0])
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        arguments = inputs[len(times) % len(inputs)]
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
        if len(times) >= 200:
            break
    return statistics.median(times) * 1e3


def size(inputs):
    return inputs.nbytes if isinstance(inputs, torch.Tensor) else sum(map(size, inputs))


def copies(inputs):
    return inputs.clone() if isinstance(inputs, torch.Tensor) else tuple(map(copies, inputs))


def measure(name, step, seconds):
    best = None
    variants = [(f"eager {dtype}", dtype, False) for dtype in DTYPES]
    if step.compiled:
        variants += [(f"compiled {dtype}", dtype, True) for dtype in ("bf16", "fp32")]
    for variant, dtype, compiled in variants:
        try:
            function, first = step.make(DTYPES[dtype], 0)
            inputs = [first, *(copies(first) for _ in range(WORKING_SET // size(first)))]
            if compiled:
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            ms = time_step(function, inputs, seconds)
        except Exception as error:  # a variant that torch lacks on this machine
            print(f"torch_kernels: {name}: {variant}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        if best is None or ms < best["ms"]:
            best = {"ms": ms, "variant": variant}
    if best is not None and step.raw_bytes:
        best["gb_per_s"] = step.raw_bytes / best["ms"] / 1e6
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="per variant")
    parser.add_argument("--only", nargs="+", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    with torch.inference_mode():
        for name, step in steps().items():
            if arguments.only is None or name in arguments.only:
                best = measure(name, step, arguments.seconds)
                if best is not None:
                    results[name] = best
    print(json.dumps(results, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
