"""Learns how keys of adjacent layers are brought together (aligned MiniCache) and writes a model profile.

usage: kvern calibrate MODEL --text FILE [--output FOLDER] [--tokens 4096] [--start LAYER]

MODEL is a folder or a name that transformers loads. For each pair of layers (start, start+1), (start+2, start+3) …
one orthogonal matrix R takes the position-free keys X of the first to those of the second, Y: R = U V^T of the SVD of
X^T Y, over all tokens of the text but the first four, means not removed; once for rows over all heads, once for each
head by itself, for shards that do not hold all heads. The matrices belong to the model, not to the text. The file is
named after the model and its checksum; the name is what the codec step minicache(profile=NAME) takes, and daemon and
engines find the file in the folder of codec.profiles and kvern.profiles, or in the one that the environment variable
KVERN_PROFILES names. Needs numpy, torch and
transformers.
"""

import argparse
import pathlib
import struct
import sys
import zlib

MAGIC = b"KVERNPRF"
VERSION = 1
SINKS = 4  # the first tokens, whose keys are unlike all others


def procrustes(x, y):
    """The orthogonal R that brings x R nearest to y; x, y [tokens, n]."""
    import numpy

    u, _, vt = numpy.linalg.svd(x.T.astype(numpy.float64) @ y.astype(numpy.float64))
    return (u @ vt).astype(numpy.float32)


def mean_angle_degrees(x, y) -> float:
    """Between the rows of x and y [..., dim]."""
    import numpy

    unit = [rows / numpy.maximum(numpy.linalg.norm(rows, axis=-1, keepdims=True), 1e-30) for rows in (x, y)]
    difference = numpy.linalg.norm(unit[0] - unit[1], axis=-1)
    total = numpy.linalg.norm(unit[0] + unit[1], axis=-1)
    return float(numpy.degrees(2 * numpy.arctan2(difference, total)).mean())


def align(x, y) -> dict:
    """Of position-free keys x, y [heads, tokens, dim]: matrices and angles before and after."""
    import numpy

    x, y = x[:, SINKS:], y[:, SINKS:]
    heads, tokens, dim = x.shape

    def joined(rows):
        return rows.transpose(1, 0, 2).reshape(tokens, heads * dim)

    whole = procrustes(joined(x), joined(y))
    blocks = numpy.stack([procrustes(x[head], y[head]) for head in range(heads)])
    by_whole = (joined(x) @ whole).reshape(tokens, heads, dim).transpose(1, 0, 2)
    return {
        "whole": whole,
        "blocks": blocks,
        "angle": mean_angle_degrees(x, y),
        "whole_angle": mean_angle_degrees(by_whole, y),
        "blocks_angle": mean_angle_degrees(x @ blocks, y),
    }


def encode_profile(model: str, layers: int, pairs: dict[int, dict]) -> bytes:
    """The bytes of a profile (docs/format.md); pairs by their first layer, as align() gives them."""
    heads, dim, _ = next(iter(pairs.values()))["blocks"].shape
    name = model.encode()
    parts = [MAGIC, struct.pack("<6I", VERSION, len(name), layers, heads, dim, len(pairs)), name]
    for layer, pair in sorted(pairs.items()):
        parts.append(struct.pack("<Iff", layer, pair["whole_angle"], pair["blocks_angle"]))
        parts += [pair["whole"].astype("<f4").tobytes(), pair["blocks"].astype("<f4").tobytes()]
    body = b"".join(parts)
    return body + struct.pack("<I", zlib.crc32(body))


def profile_name(model: str, data: bytes) -> str:
    """A name that a codec step can carry, with the profile's checksum."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in model)
    return f"{plain[:64]}-{struct.unpack('<I', data[-4:])[0]:08x}"


def unrotated(keys, cos, sin):
    """Keys [heads, tokens, dim] that were turned by cos, sin [tokens, rotary dim], halves paired (NeoX)."""
    import torch

    scale = (cos.square() + sin.square()).sqrt()  # YaRN scales them; a direction stays
    rotary = cos.shape[-1]
    turned, rest = keys[..., :rotary], keys[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * (cos / scale) - other * (sin / scale), rest), dim=-1)


def capture_keys(model_name: str, text: str, tokens: int):
    """Position-free fp32 keys of every layer [heads, tokens, dim]."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from kvern.identity import rotation

    keys, turns = {}, []

    def attention(module, query, key, value, mask, **options):
        keys[module.layer_idx] = key[0].float()
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("kvern_calibrate", attention)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32, attn_implementation="kvern_calibrate")
    config = model.config.get_text_config()
    key_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turn = rotation(config, key_dim, config.architectures or [])
    if not turn or "dynamic" in turn or "interleaved" in turn:
        sys.exit(f"calibrate: cannot take the positions out of the keys of {model_name} ({turn or 'no RoPE'})")
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.register_forward_hook(lambda _module, _inputs, output: turns.append(output))
    ids = AutoTokenizer.from_pretrained(model_name)(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] <= 2 * SINKS:
        sys.exit("calibrate: the text is too short; a few thousand tokens are right")
    with torch.no_grad():
        model.base_model(ids)
    cos, sin = (part[0].float() for part in turns[0])
    return [unrotated(keys[layer], cos, sin).numpy() for layer in sorted(keys)]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="kvern calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="a text like those that the model will read")
    parser.add_argument("--output", type=pathlib.Path, default=".", help="folder; default: this one")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--start", type=int, help="first layer of the first pair; default: half of the layers")
    arguments = parser.parse_args(given)

    from kvern.identity import fingerprint_files, weight_files

    folder = pathlib.Path(arguments.model)
    model = fingerprint_files(weight_files(folder)) if folder.exists() else arguments.model
    keys = capture_keys(arguments.model, arguments.text.read_text(), arguments.tokens)
    start = len(keys) // 2 if arguments.start is None else arguments.start
    pairs = {}
    print("layers      as they are   aligned   each head by itself   (mean angle, degrees)")
    for layer in range(start, len(keys) - 1, 2):
        if keys[layer].shape != keys[layer + 1].shape:
            print(f"{layer:3} {layer + 1:3}     of different shapes: left out")
            continue
        pairs[layer] = pair = align(keys[layer], keys[layer + 1])
        print(
            f"{layer:3} {layer + 1:3}     {pair['angle']:8.1f} {pair['whole_angle']:12.1f} {pair['blocks_angle']:14.1f}",
            flush=True,
        )
    if not pairs:
        sys.exit("calibrate: there is no pair of layers; use a smaller --start")
    data = encode_profile(model, len(keys), pairs)
    name = profile_name(folder.name, data)
    path = arguments.output / f"{name}.kvernprofile"
    path.write_bytes(data)
    print(f"calibrate: {path} ({len(data)} bytes); use it as unrotate | minicache(profile={name}) | int8")


if __name__ == "__main__":
    main()
