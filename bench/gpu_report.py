"""Puts the results of bench/gpu.sh into docs/gpu.md (between its markers) and its plots: gpu_report.py RESULTS."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "kvern"
import matplotlib.pyplot as plt  # noqa: E402
from sections import put_sections  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
IMAGES = ROOT / "docs" / "images"
FORMS = ("int8", "fp8", "int4", "int3", "int2", "int8r")
SIDES = ("K encode", "K decode", "V encode", "V decode")
AIM = 0.7


def rows_of(header: str, rows: list[list[str]]) -> list[str]:
    columns = header.count("|") - 1
    return [header, "| --- |" + " ---: |" * (columns - 1), *("| " + " | ".join(row) + " |" for row in rows)]


def save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / f"gpu-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def kernels(results: dict) -> dict[str, list[str]]:
    found = {each["name"]: each for each in results["measured"]}

    def cell(name: str) -> str:
        return f"{found[name]['gb_per_s']:.0f} ({found[name]['share_of_copy']:.0%})"

    names = [f"{form} {side}" for form in FORMS for side in SIDES]
    forms = [[form, *(cell(f"{form} {side}") for side in SIDES)] for form in FORMS]
    reached = sum(found[name]["share_of_copy"] >= AIM for name in names)
    lowest = min(names, key=lambda name: found[name]["share_of_copy"])
    pages = [name for name in found if "pages of" in name]
    others = [name for name in found if name not in names and name not in pages and name != "copy"]

    figure, axis = plt.subplots(figsize=(8, 3.4))
    for i, side in enumerate(SIDES):
        heights = [found[f"{form} {side}"]["share_of_copy"] for form in FORMS]
        axis.bar([x + i * 0.2 for x in range(len(FORMS))], heights, 0.2, label=side)
    axis.axhline(AIM, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks([x + 0.3 for x in range(len(FORMS))], FORMS)
    axis.set(ylabel="share of a copy's bandwidth", ylim=(0, 1.05), title=results["device"])
    axis.legend(fontsize=7, ncols=4, loc="lower center")
    save(figure, "codecs")
    return {
        "copy": [f"A copy on the device, counted alike, moves {found['copy']['gb_per_s']:.0f} GB/s."],
        "forms": [
            *rows_of("| form | " + " | ".join(SIDES) + " |", forms),
            "",
            f"{reached} of {len(names)} reach the aim of {AIM:.0%}; the lowest is {lowest} "
            f"with {found[lowest]['share_of_copy']:.0%}.",
        ],
        "pages": rows_of(
            "| | ms | GB/s |",
            [[name, f"{found[name]['milliseconds']:.3f}", f"{found[name]['gb_per_s']:.0f}"] for name in pages],
        ),
        "layer": rows_of(
            "| | ms | MiB moved | GB/s | of copy |",
            [
                [
                    name,
                    f"{found[name]['milliseconds']:.3f}",
                    f"{found[name]['bytes'] / 2**20:.0f}",
                    f"{found[name]['gb_per_s']:.0f}",
                    f"{found[name]['share_of_copy']:.1%}",
                ]
                for name in others
            ],
        ),
    }


def transfer(results: dict) -> dict[str, list[str]]:
    rows = []
    for codec in ("raw", "int8", "int4"):
        of = results["codecs"][codec]
        rows.append(
            [
                codec,
                f"{of['store_raw_gb_per_s']:.1f}",
                f"{of['store_to_pinned_copy']:.2f}",
                f"{of['load_raw_gb_per_s']:.1f}",
                f"{of['load_to_pinned_copy']:.2f}",
                f"{of['bus_bytes_per_raw_byte_store']:.4f} / {of['bus_bytes_per_raw_byte_load']:.4f}",
            ]
        )
    figure, axis = plt.subplots(figsize=(5, 3.4))
    codecs = [row[0] for row in rows]
    for i, side in enumerate(("store", "load")):
        heights = [results["codecs"][codec][f"{side}_to_pinned_copy"] for codec in codecs]
        axis.bar([x + i * 0.4 for x in range(len(codecs))], heights, 0.4, label=side)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.axhline(2, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks([x + 0.2 for x in range(len(codecs))], codecs)
    axis.set(ylabel="raw bytes over a pinned copy's", title=results["device"])
    axis.legend(fontsize=7)
    save(figure, "transfer")
    header = "| codec | store | × pinned copy | load | × pinned copy | bus bytes per raw byte, store / load |"
    copies = (
        f"Pinned copies of the same run: {results['pinned_copy_to_host_gb_per_s']:.1f} GB/s to the host, "
        f"{results['pinned_copy_to_device_gb_per_s']:.1f} GB/s to the device."
    )
    return {"transfer": [*rows_of(header, rows), "", copies]}


def interference(folder: pathlib.Path) -> dict[str, list[str]]:
    """One table: in this process by multiprocessors, and beside kvernd as processes take turns or share (MPS)."""
    alone = json.loads((folder / "interference.json").read_text())
    kinds = {"processes take turns": alone["beside"]}
    for limit, name in ((0, "MPS"), (2, "MPS, 2 multiprocessors")):
        path = folder / f"interference-mps-{limit}.json"
        if path.exists():
            kinds[name] = [each for each in json.loads(path.read_text())["beside"] if "kvernd" in each["name"]]
    rows = [
        [
            each["name"],
            "" if "process," in each["name"] else kind,
            f"{each['raw_gb_per_s']:.1f}",
            f"{each['slower']:.1%}",
            f"{each['slower'] * 1e3 / max(each['raw_gb_per_s'], 0.1):.1f}",
        ]
        for kind, beside in kinds.items()
        for each in beside
    ]
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for kind, beside in kinds.items():
        stores = [each for each in beside if "store" in each["name"]]
        axis.plot(
            [each["raw_gb_per_s"] for each in stores],
            [100 * each["slower"] for each in stores],
            marker="o",
            label=f"kvernd, {kind}",
        )
    axis.axhline(3, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="raw GB/s stored", ylabel="decode slower by, %", xscale="log", title=alone["device"])
    axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    save(figure, "interference")
    header = "| beside the decode | processes | raw GB/s | slower by | ms of decode lost per GB |"
    base = f"The decode alone: {alone['alone_ms']:.2f} ms a step, {alone['decode_gb_per_s']:.0f} GB/s."
    return {"interference": [base, "", *rows_of(header, rows)]}


def step_cells(row: dict) -> list[str]:
    speed_up = f"{row['speed_up']:.2f} ×"
    return [str(row["entries"]), f"{row['step_seconds'] * 1e3:.3f}", f"{row['tokens_per_second']:.0f}", speed_up]


def attention(results: dict) -> dict[str, list[str]]:
    header = "| batch | method | entries | ms per step | tokens/s | speed-up | cache GB | memory | layers timed |"
    rows = [
        [
            str(row["batch"]),
            row["method"],
            *step_cells(row),
            f"{row['cache_bytes'] / 1e9:.2f}",
            f"{row['memory_ratio']:.2f} ×",
            str(row["layers_timed"]),
        ]
        for row in results["rows"]
    ]
    batches = sorted({row["batch"] for row in results["rows"]})
    names = [row["method"] for row in results["rows"] if row["batch"] == batches[0] and "kvern" in row["method"]]
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for i, batch in enumerate(batches):
        of = {row["method"]: row["speed_up"] for row in results["rows"] if row["batch"] == batch}
        axis.bar([x + i * 0.25 for x in range(len(names))], [of[name] for name in names], 0.25, label=f"batch {batch}")
    axis.set_xticks(
        [x + 0.25 for x in range(len(names))], [name.removeprefix("kvern, ") for name in names], rotation=20, fontsize=8
    )
    axis.set(ylabel="speed-up over the full cache", yscale="log", title=f"{results['device']}, 131072 tokens")
    axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
    save(figure, "attention")
    error = f"Relative error of the output against float64, 20000 entries with biases: {results['relative_error']:.1e}."
    return {"attention": [*rows_of(header, rows), "", error]}


def model(results: dict) -> dict[str, list[str]]:
    header = "| batch | attention | entries | ms per step | tokens/s | speed-up | cache MB |"
    rows = [
        [str(row["batch"]), row["attention"], *step_cells(row), f"{row['cache_bytes'] / 1e6:.0f}"]
        for row in results["rows"]
    ]
    agreement = [
        [
            row["attention"],
            str(row["entries"]),
            f"{row['same_tokens']} of {row['tokens_compared']}",
            f"{row['nll']:.3f}",
        ]
        for row in results["agreement"]
    ]
    agreed = rows_of("| attention | entries of the prompt | same tokens | negative log-likelihood |", agreement)
    error = (
        f"Largest error of Kvern's attention against float64, of all layers and steps: {results['worst_error']:.1e} "
        "(relative, before it is rounded)."
    )
    return {"model": rows_of(header, rows), "agreement": [*agreed, "", error]}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])

    def read(name: str) -> dict:
        return json.loads((folder / name).read_text())

    sections = {
        **kernels(read("kernels.json")),
        **transfer(read("transfer.json")),
        **interference(folder),
        **attention(read("attention.json")),
        **model(read("model.json")),
    }
    put_sections(DOCUMENT, sections)


if __name__ == "__main__":
    main()
