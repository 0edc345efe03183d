"""Decode attention over compact caches on a GPU, beside torch's over the full cache of the same run.

    python3 bench/gpu_attention.py --library build/release/lib/libkvern_gpu_attend.so [--json FILE]

The attention of one decode step of Llama-3.1-8B (32 query heads, 8 KV heads, dimension 128, bfloat16, 32 layers) over
131072 tokens. A step is captured in a graph, for both sides, with a buffer of its own for every layer as far as memory
allows; where it does not, fewer layers are timed and the step is their time scaled. Medians of replays, timed by
events.
"""

import argparse
import ctypes
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

QUERY_HEADS, HEADS, DIM, LAYERS, TOKENS = 32, 8, 128, 32, 131072
# MiniCache: one token in so many keeps its own rows in both layers of a pair; and the paper's groups, 4.25 bits in all.
RETAINED, MINICACHE_GROUP = 20, 128
# Of int4 by itself, as its form is by default.
GROUP = 64
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_bytes", ctypes.c_uint64),
        ("index", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("bits", ctypes.c_uint32),
        ("tokens", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        ("head", ctypes.c_uint32),
        ("entries", ctypes.c_uint32),
        ("keys", Rows),
        ("values", Rows),
        ("bias", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
    ]


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        self.c.kvern_last_error.restype = ctypes.c_char_p
        self.c.kvern_attend_plan.restype = ctypes.c_void_p
        self.c.kvern_attend_device_bytes.restype = ctypes.c_uint64
        self.c.kvern_section_bytes.restype = ctypes.c_uint64
        self.c.kvern_keep_bytes.restype = ctypes.c_uint64

    def check(self, status):
        if status != 0:
            raise RuntimeError(self.c.kvern_last_error().decode())


def stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


class Plan:
    """Attention over segments, planned once. Keeps what it is given alive."""

    def __init__(self, library, queries, heads, segments, keep=(), piece_entries=0):
        """queries: [query heads, rows, dim]; segments: those of all heads, in order."""
        self.library, self.keep = library, keep
        array = (Segment * len(segments))(*segments)
        query_heads, rows, dim = queries.shape
        self.plan = library.c.kvern_attend_plan(
            DTYPES[queries.dtype], query_heads, rows, dim, dim, heads, array, len(segments), piece_entries
        )
        if not self.plan:
            raise RuntimeError(library.c.kvern_last_error().decode())
        self.plan = ctypes.c_void_p(self.plan)
        self.memory = torch.empty(
            library.c.kvern_attend_device_bytes(self.plan), dtype=torch.uint8, device="cuda"
        )
        library.check(library.c.kvern_attend_put(self.plan, ctypes.c_void_p(self.memory.data_ptr()), stream()))
        self.output = torch.empty(queries.shape, dtype=torch.float32, device="cuda")
        self.lse = torch.empty(query_heads, rows, dtype=torch.float32, device="cuda")

    def run(self, queries, positions=None):
        self.library.check(
            self.library.c.kvern_attend(
                self.plan,
                ctypes.c_void_p(queries.data_ptr()),
                ctypes.c_void_p(positions.data_ptr() if positions is not None else None),
                ctypes.c_void_p(self.output.data_ptr()),
                ctypes.c_void_p(self.lse.data_ptr()),
                stream(),
            )
        )
        return self.output

    def __del__(self):
        if getattr(self, "plan", None):
            self.library.c.kvern_attend_free(self.plan)


def encode(library, bits, group, rows, keys):
    """Sections [batch * heads, bytes] of rows [batch, heads, tokens, dim]."""
    batch, heads, tokens, dim = rows.shape
    args = (DTYPES[rows.dtype], bits, int(keys), tokens, dim, group)
    sections = torch.empty(
        batch * heads, library.c.kvern_section_bytes(*args), dtype=torch.uint8, device="cuda"
    )
    not_finite = torch.zeros(1, dtype=torch.int32, device="cuda")
    library.check(
        library.c.kvern_encode(
            *args,
            ctypes.c_void_p(rows.data_ptr()),
            batch * heads,
            ctypes.c_void_p(sections.data_ptr()),
            ctypes.c_void_p(not_finite.data_ptr()),
            stream(),
        )
    )
    return sections


def section_segments(bits, group, tokens, keys, values, key_lengths=None, value_lengths=None):
    """One segment per sequence and head of sections [batch * heads, bytes]."""

    def row(tensor, head):
        return tensor.data_ptr() + head * tokens * 4 if tensor is not None else None

    return [
        Segment(
            head,
            tokens,
            Rows(keys[head].data_ptr(), 0, None, row(key_lengths, head), bits, tokens, group),
            Rows(values[head].data_ptr(), 0, None, row(value_lengths, head), bits, tokens, group),
        )
        for head in range(keys.shape[0])
    ]


def plain_segments(keys, values, bias=None):
    """One segment per sequence and head of rows [batch, heads, tokens, dim]."""
    batch, heads, tokens, dim = keys.shape

    def rows(tensor, head):
        return Rows(tensor.data_ptr() + head * tokens * dim * tensor.element_size(), dim * tensor.element_size())

    return [
        Segment(
            head,
            tokens,
            rows(keys, head),
            rows(values, head),
            bias.data_ptr() + head * tokens * 4 if bias is not None else None,
        )
        for head in range(batch * heads)
    ]


def seconds_of(run, replays=15):
    """Median seconds of run() as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def normal(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


class Layers:
    """Caches of one method for as many layers as fit, each with its plan."""

    def __init__(self, library, batch, make, most_bytes):
        self.plans, self.queries, self.bytes = [], [], []
        # In fours, which have all kinds of layers; one or two where four are too many.
        while len(self.plans) < LAYERS and (
            len(self.plans) % 4 != 0 or sum(self.bytes) * (1 + 4 / max(len(self.plans), 1)) <= most_bytes
        ):
            if len(self.plans) < 4 and sum(self.bytes) > most_bytes:
                break
            queries = normal(batch * QUERY_HEADS, 1, DIM)
            segments, tensors, layer_bytes = make(len(self.plans))
            self.plans.append(Plan(library, queries, batch * HEADS, segments, tensors))
            self.queries.append(queries)
            self.bytes.append(layer_bytes)

    def run(self):
        for plan, queries in zip(self.plans, self.queries):
            plan.run(queries)

    def measured(self):
        scale = LAYERS / len(self.plans)
        seconds = seconds_of(self.run) * scale
        return seconds, sum(self.bytes) * scale, len(self.plans)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def plain(batch, entries, with_bias):
    def make(_):
        keys, values = normal(batch, HEADS, entries, DIM), normal(batch, HEADS, entries, DIM)
        tensors = [keys, values]
        if with_bias:
            tensors.append(torch.log(torch.randint(1, 9, (batch, HEADS, entries), device="cuda").float()))
        return plain_segments(keys, values, tensors[2] if with_bias else None), tensors, size(*tensors)

    return make


def int4_sections(library, batch, group, tokens):
    """Sections of random keys and values."""
    return [encode(library, 4, group, normal(batch, HEADS, tokens, DIM), keys) for keys in (True, False)]


def int4(library, batch):
    """All tokens as sections."""

    def make(_):
        sections = int4_sections(library, batch, GROUP, TOKENS)
        return section_segments(4, GROUP, TOKENS, *sections), sections, size(*sections)

    return make


def minicache(library, batch):
    """All tokens as sections, which half of the layers (the upper ones; here, every other pair) share in pairs: rows
    times the layer's own lengths. One token of RETAINED is not in what a pair shares; each layer has it in sections of
    its own. (Sections that the store writes keep these rows as they are, in 16 bits.)"""
    shared = {}
    kept = TOKENS // RETAINED
    merged = TOKENS - kept

    def segments_of(tokens, *tensors):
        return section_segments(4, MINICACHE_GROUP, tokens, *tensors)

    def make(layer):
        pair = layer // 2
        if pair % 2 == 0:
            sections = int4_sections(library, batch, MINICACHE_GROUP, TOKENS)
            return segments_of(TOKENS, *sections), sections, size(*sections)
        if pair not in shared:
            shared[pair] = int4_sections(library, batch, MINICACHE_GROUP, merged)
        lengths = [torch.rand(batch, HEADS, merged, device="cuda") + 0.5 for _ in range(2)]
        own = int4_sections(library, batch, MINICACHE_GROUP, kept)
        parts = zip(segments_of(merged, *shared[pair], *lengths), segments_of(kept, *own))
        segments = [segment for of_head in parts for segment in of_head]
        return segments, [*shared[pair], *lengths, *own], size(*shared[pair]) / 2 + size(*lengths, *own)

    return make


def torch_attention(backend, batch, entries, most_bytes):
    """Seconds of a step of torch over rows."""
    sets = []
    layer_bytes = 2 * batch * HEADS * entries * DIM * 2
    for _ in range(max(1, min(LAYERS, int(most_bytes // layer_bytes)))):
        sets.append([normal(batch, h, n, DIM) for h, n in ((QUERY_HEADS, 1), (HEADS, entries), (HEADS, entries))])

    def run():
        with sdpa_kernel(backend):
            for queries, keys, values in sets:
                scaled_dot_product_attention(queries, keys, values, enable_gqa=True)

    return seconds_of(run) * LAYERS / len(sets), layer_bytes * LAYERS, len(sets)


def agreement(library):
    """Relative error of the plan over 20000 entries with biases against float32."""
    queries, bias = normal(2 * QUERY_HEADS, 1, DIM), torch.rand(2, HEADS, 20000, device="cuda")
    keys, values = normal(2, HEADS, 20000, DIM), normal(2, HEADS, 20000, DIM)
    got = Plan(library, queries, 2 * HEADS, plain_segments(keys, values, bias)).run(queries)
    logits = torch.einsum("bhgd,bhnd->bhgn", queries.view(2, HEADS, -1, DIM).double(), keys.double()) / DIM**0.5
    weights = (logits + bias[:, :, None].double()).softmax(-1)
    expected = torch.einsum("bhgn,bhnd->bhgd", weights, values.double()).reshape(got.shape)
    return ((got - expected).norm() / expected.norm()).item()


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--most-gb", type=float, default=40, help="device memory for caches of one method")
    arguments = parser.parse_args(words)
    library, most = Library(arguments.library), arguments.most_gb * 1e9
    torch.manual_seed(1)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "relative_error": agreement(library),
        "rows": [],
    }
    print(f"{report['device']}, torch {report['torch']}; error against float64 {report['relative_error']:.1e}")
    print("batch  method                    entries   ms/step  tokens/s  speed-up  cache GB  memory  layers", flush=True)

    for batch in arguments.batches:
        full = None
        methods = {
            "torch flash, full": (TOKENS, lambda: torch_attention(SDPBackend.FLASH_ATTENTION, batch, TOKENS, most)),
            "torch cudnn, full": (TOKENS, lambda: torch_attention(SDPBackend.CUDNN_ATTENTION, batch, TOKENS, most)),
        }
        for name, entries, make in (
            ("kvern, full", TOKENS, plain(batch, TOKENS, False)),
            ("kvern, CAKE 3.2 %", 4194, plain(batch, 4194, False)),
            ("kvern, WindowKV 12 %", 15729, plain(batch, 15729, False)),
            ("kvern, CentroidKV 50 %", TOKENS // 2, plain(batch, TOKENS // 2, True)),
            ("kvern, CentroidKV 25 %", TOKENS // 4, plain(batch, TOKENS // 4, True)),
            ("kvern, int4", TOKENS, int4(library, batch)),
            ("kvern, MiniCache int4", TOKENS, minicache(library, batch)),
        ):
            methods[name] = entries, lambda make=make: Layers(library, batch, make, most).measured()
        methods["torch cudnn, 3.2 %"] = (
            4194,
            lambda: torch_attention(SDPBackend.CUDNN_ATTENTION, batch, 4194, most),
        )
        full_bytes = 2 * batch * HEADS * TOKENS * DIM * 2 * LAYERS
        for name, (entries, measure) in methods.items():
            seconds, cache_bytes, layers = measure()
            torch.cuda.empty_cache()
            if name.endswith(", full") and name.startswith("torch"):
                full = min(full or seconds, seconds)
            report["rows"].append(
                {
                    "batch": batch,
                    "method": name,
                    "entries": entries,
                    "step_seconds": seconds,
                    "tokens_per_second": batch / seconds,
                    "speed_up": full / seconds,
                    "cache_bytes": cache_bytes,
                    "memory_ratio": full_bytes / cache_bytes,
                    "layers_timed": layers,
                }
            )
            print(
                f"{batch:5d}  {name:25s} {entries:7d} {seconds * 1e3:9.3f} {batch / seconds:9.0f} {full / seconds:9.2f}"
                f" {cache_bytes / 1e9:9.2f} {full_bytes / cache_bytes:7.2f} {layers:7d}",
                flush=True,
            )
            if arguments.json:
                with open(arguments.json, "w") as file:
                    json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
