#!/usr/bin/env python3
"""Shows what Kvern does, with a real model: the time to the first token of a long prompt cold, restored in the same
engine, and restored in a new engine process, lossless and with int8.

usage: demo.py [--tokens N] [--dtype float32|bfloat16] [--stay]     (make demo)
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from daemon import Daemon  # noqa: E402
from engine import Engine, Output, kvern_transfer  # noqa: E402
from models import smollm2  # noqa: E402

BEGIN = time.monotonic()
GENERATED = 24


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", flush=True)


def long_prompt(model: pathlib.Path, length: int) -> list[int]:
    """The project's own texts, as tokens."""
    from tokenizers import Tokenizer

    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "LICENSE"]
    text = "\n\n".join(path.read_text() for path in texts)
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    if len(tokens) < length:
        sys.exit(f"demo: the project's texts have {len(tokens)} tokens; choose --tokens below that")
    return tokens[:length]


def agreement(output: Output, cold: Output) -> str:
    if output.tokens == cold.tokens:
        return "yes"
    equal = next(i for i, (a, b) in enumerate(zip(output.tokens, cold.tokens)) if a != b)
    return f"first {equal} of {len(cold.tokens)} tokens"


class Demo:
    def __init__(self, folder: pathlib.Path, model: pathlib.Path, dtype: str, prompt: list[int]):
        self.folder = folder
        self.model = model
        self.dtype = dtype
        self.prompt = prompt
        self.daemon = Daemon(folder, {"store.dram_bytes": "1GiB"}).start()
        self.engine: Engine | None = None
        self.rows: list[tuple[str, ...]] = []

    def new_engine(self) -> None:
        if self.engine is not None:
            self.engine.stop()
        say("starting a vLLM engine in a new process")
        self.engine = Engine(
            self.model,
            self.folder,
            transfer=kvern_transfer(self.daemon.address),
            threads=os.cpu_count() or 1,
            dtype=self.dtype,
            max_model_len=len(self.prompt) + GENERATED + 32,
        ).wait_started()
        # The first step of a process is slow for reasons that have nothing to do with KV.
        self.engine.generate(self.prompt[:64][::-1], max_tokens=2, **self.asking("raw", store=False))

    @staticmethod
    def asking(codec: str, **options) -> dict:
        return {"kv_transfer_params": {"kvern": {"codec": codec, **options}}}

    def generate(self, codec: str) -> Output:
        return self.engine.generate(self.prompt, max_tokens=GENERATED, **self.asking(codec))

    def row(self, what: str, output: Output, cold: Output, stored: str = "") -> None:
        self.rows.append(
            (
                what,
                f"{output.ttft:.2f} s",
                f"{cold.ttft / output.ttft:.0f} x" if output is not cold else "",
                f"{output.cached_tokens} of {len(self.prompt)}",
                stored,
                agreement(output, cold) if output is not cold else "",
            )
        )
        say(f"{what}: first token after {output.ttft:.2f} s, {output.cached_tokens} tokens found")

    def run_codec(self, codec: str, name: str, cold: Output | None) -> Output:
        raw_before, encoded_before = self.daemon.bytes_stored()
        say(f"{name}: a prompt of {len(self.prompt)} tokens, cold")
        output = self.generate(codec)
        self.daemon.wait_quiet()
        raw, encoded = (now - then for now, then in zip(self.daemon.bytes_stored(), (raw_before, encoded_before)))
        stored = f"{encoded / 2**20:.1f} of {raw / 2**20:.1f} MiB ({100 * encoded / max(raw, 1):.0f} %)"
        if cold is None:
            cold = output
            self.row("cold", cold, cold)
        say(f"{name}: stored {stored}; emptying the engine's own prefix cache and overwriting its KV memory")
        self.engine.forget_kv()
        self.row(f"{name}, same engine", self.generate(codec), cold, stored)
        self.new_engine()
        self.row(f"{name}, new engine", self.generate(codec), cold, stored)
        return cold

    def run(self) -> None:
        self.new_engine()
        cold = self.run_codec("raw", "lossless", None)
        say("emptying the store (kvernctl flush --all)")
        self.engine.forget_kv()
        self.daemon.ctl("flush", "--all")
        self.run_codec("int8", "int8", cold)
        self.engine.stop()

    def print_table(self) -> None:
        header = ("", "first token", "sooner", "tokens found", "stored of raw bytes", "same output")
        rows = [header, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        print(f"\nSmolLM2-135M-Instruct, {self.dtype}, {os.cpu_count()} cores, {GENERATED} greedy tokens\n")
        for number, row in enumerate(rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
            if number == 0:
                print("  " + "  ".join("-" * width for width in widths))
        print(f"\nMetrics are at http://127.0.0.1:{self.daemon.http_port}/metrics while kvernd runs; for instance:\n")
        for name in ("kvern_hit_tokens_total", "kvern_stored_raw_bytes_total", "kvern_stored_encoded_bytes_total"):
            for sample, labels, value in self.daemon.metrics():
                if sample == name and value > 0:
                    text = ",".join(f'{key}="{label}"' for key, label in labels.items())
                    print(f"  {sample}{{{text}}} {value:.0f}" if text else f"  {sample} {value:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="length of the prompt (default: 3000)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--stay", action="store_true", help="leave kvernd running until Enter is pressed")
    arguments = parser.parse_args()

    say("preparing the model SmolLM2-135M-Instruct")
    model = smollm2(arguments.dtype)
    prompt = long_prompt(model, arguments.tokens)
    with tempfile.TemporaryDirectory(prefix="kvern-demo-") as folder:
        say("starting kvernd")
        demo = Demo(pathlib.Path(folder), model, arguments.dtype, prompt)
        try:
            demo.run()
            demo.print_table()
            if arguments.stay:
                input("\nkvernd is still running; press Enter to end it. ")
            demo.daemon.stop()
        finally:
            if demo.engine is not None:
                demo.engine.kill()
            demo.daemon.destroy()
    print(f"\nDone in {time.monotonic() - BEGIN:.0f} s. Nothing is left running.")


if __name__ == "__main__":
    main()
