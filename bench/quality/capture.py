#!/usr/bin/env python3
"""Writes the keys, values and queries that SmolLM2-135M-Instruct computes on real text, for kvern_quality.

usage: capture.py [--tokens 4096] [--output DIR]        (default: build/quality)

Two texts that every machine of ours has: the GNU General Public License (Debian) and the language reference that Python
carries for its help(). Per text one safetensors file, bf16 as an engine caches them, for every layer l:
K_l and V_l [KV heads, tokens + 128, dim], K after RoPE, and Q_l [query heads, tokens + 32, dim]: all positions of the
prompt and every fourth of the 128 after it. The model itself runs in fp32.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from make_model import smollm2  # noqa: E402

FOLLOWING = 128
STRIDE = 4


def licence() -> str:
    return pathlib.Path("/usr/share/common-licenses/GPL-3").read_text()


def manual() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


TEXTS = {"licence": licence, "manual": manual}


def capture(text: str, tokens: int) -> dict:
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = {}

    def attention(module, query, key, value, mask, **options):
        layer = module.layer_idx
        rows = [*range(tokens), *range(tokens + STRIDE - 1, tokens + FOLLOWING, STRIDE)]
        for name, rows_of in (("K", key[0]), ("V", value[0]), ("Q", query[0][:, rows])):
            seen[f"{name}_{layer}"] = rows_of.to(torch.bfloat16).contiguous()
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("capture", attention)
    folder = smollm2("float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="capture")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, : tokens + FOLLOWING]
    if ids.shape[1] < tokens + FOLLOWING:
        sys.exit(f"capture: the text has {ids.shape[1]} tokens, {tokens + FOLLOWING} are needed; use a smaller --tokens")
    with torch.no_grad():
        model.model(ids)
    config = model.config
    seen["positions"] = torch.arange(tokens + STRIDE - 1, tokens + FOLLOWING, STRIDE, dtype=torch.int32)
    seen["shape"] = torch.tensor([config.num_hidden_layers, tokens], dtype=torch.int32)
    theta = config.rope_parameters["rope_theta"] if hasattr(config, "rope_parameters") else config.rope_theta
    seen["rope_theta"] = torch.tensor([theta], dtype=torch.float64)
    return seen


def capture_all(tokens: int, output: pathlib.Path) -> list[pathlib.Path]:
    """The files of all texts, made where they are missing."""
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, read in TEXTS.items():
        path = output / f"{name}-{tokens}.safetensors"
        if not path.exists():
            from safetensors.torch import save_file

            print(f"capture: {name}, {tokens} tokens", flush=True)
            partial = path.with_suffix(".partial")
            save_file(capture(read(), tokens), partial)
            partial.rename(path)
        files.append(path)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "quality")
    arguments = parser.parse_args()
    print(json.dumps([str(path) for path in capture_all(arguments.tokens, arguments.output)]))


if __name__ == "__main__":
    main()
