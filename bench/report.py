"""Writes docs/measured.md and its plot from the results of one `make bench`.

Usage: report.py [build/bench/results.json]
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = ("256KiB", "2MiB", "8MiB")
RIVALS = {"local": ("mooncake_shm",), "tcp": ("mooncake_tcp", "redis_tcp")}
E2E = {
    "e2e.ttft_cold_s": "cold, seconds",
    "e2e.ttft_prefix_hit_s": "hit in vLLM's own prefix cache, seconds",
    "e2e.ttft_restored_s": "restored by Kvern, seconds",
    "e2e.ttft_cold_over_restored": "cold over restored",
    "e2e.restored_over_prefix_hit": "restored over prefix hit",
    "e2e.kvern_ms": "Kvern's part of the restored first token, milliseconds",
}


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


COMPACT = {
    "compact.handover_over_prefill": "hand-over of 4,000 tokens over their prefill",
    "compact.handover.made_s": "stored and compacted, seconds",
    "compact.handover.decode_s": "loaded, and one step, seconds",
    "compact.tokens_per_s": "tokens compacted a second",
    "compact.exchange_ms": "a step of four requests with a budget for each layer: exchange of the layers' tables, milliseconds",
}
TIERS = {
    "store.index.bytes_per_chunk": "DRAM: bytes of bookkeeping per chunk of eight blocks",
    "store.index.lookups_per_s": "DRAM: block look-ups per second, one thread",
    "store.recovery.dram_s_per_16gib": "DRAM: seconds of a warm restart per 16 GiB of chunks of 4 MiB",
    "store.nvme.read_over_fio": "NVMe: read over fio on the same disk",
    "store.nvme.write_over_fio": "NVMe: write over fio on the same disk",
    "store.nvme.read_gb_per_s": "NVMe: read, GB/s",
    "store.nvme.write_gb_per_s": "NVMe: write, GB/s",
    "store.nvme.read_ms": "NVMe: one chunk read, ms",
    "store.nvme.read_among_writes_ms": "NVMe: one chunk read during a burst of writes, ms",
    "store.nvme.index_bytes_per_chunk": "NVMe: bytes of index per chunk of eight blocks",
    "store.recovery.s_per_million": "NVMe: seconds of recovery per million chunks",
    "store.redis.get_over_benchmark": "Redis: get over redis-benchmark",
}
REPLAYS = {
    "lru": "LRU", "s3fifo": "S3-FIFO", "tinylfu": "W-TinyLFU", "policy": "reuse (default)", "ladder_int8": "with int8",
    "ladder_int4": "with int8, int4", "ladder_full": "whole ladder", "belady": "Belady (limit)",
}


def compact_rows(results: dict) -> list[list[str]]:
    fields = ("slots_ratio", "capacity_ratio", "capacity_limit", "decode_speedup", "decode_limit")
    cases = sorted({key.rpartition(".")[0] for key in results if key.startswith("compact.") and key.endswith(".slots_ratio")})
    return [[case.removeprefix("compact."), *(number(results.get(f"{case}.{field}")) for field in fields)] for case in cases]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def transfer_rows(results: dict, plane: str) -> list[list[str]]:
    ours = f"transfer.{plane}"
    rows = []
    for what, ending in (("store", "store_raw"), ("commit", "commit_raw"), ("load", "load_raw"),
                         ("load, int8", "load_int8"), ("store, single chunks", "b1.store_raw"),
                         ("load, single chunks", "b1.load_raw")):
        values = [results.get(f"{ours}.{size}.{ending}_over_memcpy") for size in SIZES]
        if any(value is not None for value in values):
            rows.append([f"Kvern: {what}", *map(number, values)])
    for rival in RIVALS[plane]:
        for what in ("store", "load"):
            values = [results.get(f"rival.{rival}.{size}.{what}_over_memcpy") for size in SIZES]
            rows.append([f"{rival}: {what}", *map(number, values)])
    return rows


def match_rows(results: dict) -> list[list[str]]:
    sources = {"Kvern, shared memory": "match", "Kvern, TCP": "match.tcp"}
    sources |= {rival: f"rival.{rival}.match" for rivals in RIVALS.values() for rival in rivals}
    return [[name, *(number(results.get(f"{key}.{n}.p50_us")) for n in (1, 64, 1024))] for name, key in sources.items()]


def kernel_rows(results: dict) -> list[list[str]]:
    steps = sorted({key.removeprefix("kernels.").rpartition(".")[0] for key in results if key.startswith("kernels.")})
    fields = ("gb_per_s", "ms", "over_memcpy", "over_torch", "speedup")
    figures = {step: [results.get(f"kernels.{step}.{field}") for field in fields] for step in steps}
    return [[step, *map(number, values)] for step, values in figures.items() if any(v is not None for v in values)]


def tier_rows(results: dict) -> list[list[str]]:
    return [[text, number(results[key])] for key, text in TIERS.items() if key in results]


def replays(results: dict) -> dict[str, list[int]]:
    """Traces that were replayed, and at which capacities (thousands of blocks)."""
    found: dict[str, set[int]] = {}
    for key in results:
        parts = key.split(".")
        if parts[0] == "replay" and parts[2].endswith("k"):
            found.setdefault(parts[1], set()).add(int(parts[2][:-1]))
    return {trace: sorted(capacities) for trace, capacities in sorted(found.items())}


def replay_rows(results: dict) -> list[list[str]]:
    return [[trace, f"{capacity}k", *(number(results.get(f"replay.{trace}.{capacity}k.{key}")) for key in REPLAYS)]
            for trace, capacities in replays(results).items() for capacity in capacities]


def plot_replays(results: dict, target: pathlib.Path) -> None:
    traces = replays(results)
    if not traces:
        return
    figure, axes = plt.subplots(1, len(traces), figsize=(4.5 * len(traces), 3.4), sharey=True, squeeze=False)
    for axis, (trace, capacities) in zip(axes[0], traces.items()):
        for key, name in REPLAYS.items():
            hits = [results.get(f"replay.{trace}.{capacity}k.{key}") for capacity in capacities]
            axis.plot(capacities, hits, marker=".", linestyle=":" if key in ("lru", "belady") else "-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(capacities, [f"{capacity}k" for capacity in capacities])
        axis.set_title(trace)
        axis.set_xlabel("capacity in uncompressed blocks")
    axes[0][0].set_ylabel("prompt tokens that hit")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target)


def plot(results: dict, target: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, plane in zip(axes, ("local", "tcp")):
        bars = {"Kvern store": f"transfer.{plane}.{{}}.store_raw_over_memcpy",
                "Kvern load": f"transfer.{plane}.{{}}.load_raw_over_memcpy"}
        for rival in RIVALS[plane]:
            bars |= {f"{rival} store": f"rival.{rival}.{{}}.store_over_memcpy",
                     f"{rival} load": f"rival.{rival}.{{}}.load_over_memcpy"}
        width = 0.8 / len(bars)
        for i, (name, key) in enumerate(bars.items()):
            heights = [results.get(key.format(size), 0) for size in SIZES]
            axis.bar([x + i * width for x in range(len(SIZES))], heights, width, label=name)
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(SIZES))], SIZES)
        axis.set_title({"local": "same host", "tcp": "TCP over loopback"}[plane])
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("speed over one-thread memcpy")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def main() -> int:
    source = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "bench" / "results.json"
    results = json.loads(source.read_text())
    plot(results, ROOT / "docs" / "images" / "transfers.svg")
    plot_replays(results, ROOT / "docs" / "images" / "replays.svg")
    lines = [
        "# Measured", "",
        f"Written by `make bench && python bench/report.py` on {results['date']}: {results['machine.cpu']}, "
        f"{results['machine.cores']} cores, load at the start {results['machine.load_at_start']:.1f}. "
        "What each figure means: [benchmarks.md](benchmarks.md).", "",
        "![transfers](images/transfers.svg)", "",
        "## Same host, over one-thread memcpy, batches of eight", "",
        *table(["", *SIZES], transfer_rows(results, "local")),
        "## TCP over loopback, over one-thread memcpy, batches of eight", "",
        *table(["", *SIZES], transfer_rows(results, "tcp")),
        "## Look-up of n block hashes, p50 in microseconds", "",
        *table(["", "1", "64", "1,024"], match_rows(results)),
        "## First token of a prompt of 7,168 tokens", "",
        *table(["", ""], [[text, number(results[key])] for key, text in E2E.items() if key in results]),
        "## Compact caches, beside the full one", "",
        *table(["model, budget", "slots", "capacity", "its limit", "decode step", "its limit"], compact_rows(results)),
        *table(["", ""], [[text, number(results[key])] for key, text in COMPACT.items() if key in results]),
        "## Tiers below DRAM", "",
        *table(["", ""], tier_rows(results)),
        "## Replays of production traces: share of prompt tokens that hit", "",
        "![replays](images/replays.svg)", "",
        *table(["trace", "capacity in blocks", *REPLAYS.values()], replay_rows(results)),
        "## Kernels, one thread, raw bytes", "",
        *table(["step", "GB/s", "ms", "over memcpy", "over torch", "over full attention"], kernel_rows(results)),
    ]
    (ROOT / "docs" / "measured.md").write_text("\n".join(lines).rstrip() + "\n")
    print("report: docs/measured.md, docs/images/transfers.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
