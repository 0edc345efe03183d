"""Namespaces: all that decides what cached bytes mean. vLLM's block hashes name token ids alone, so that two models give
the same hashes; whatever is not in these facts would let one model read another's cache."""

import hashlib
import json
import os
import pathlib

from kvern import compat
from kvern.groups import Geometry, Refused, layer_number

# Weight files up to this many bytes in all are hashed completely (a second or so); of larger ones every tensor is
# sampled. Training moves practically every weight of the tensors that it touches, so samples tell versions apart.
FULL_HASH_BYTES = 1 << 30
_SAMPLE_BYTES = 4096
_SAMPLES_PER_TENSOR = 8
_SAMPLES_PER_FILE = 4096  # of files whose tensors cannot be told apart

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Of these, config.json says everything that matters to the values; the rest is names, labels and bookkeeping.
_IRRELEVANT_CONFIG = frozenset(
    "transformers_version torch_dtype dtype architectures id2label label2id auto_map use_cache "
    "return_dict output_attentions output_hidden_states torchscript problem_type finetuning_task task_specific_params "
    "bos_token_id eos_token_id pad_token_id sep_token_id attn_implementation".split()
)
# RoPE whose frequencies depend on how long the model is allowed to be.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---------------------------------------------------------------- weights


def _safetensors_ranges(file) -> list[tuple[int, int]] | None:
    """(begin, end) of every tensor in the file, or None if the header is not one."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    head = int.from_bytes(file.read(8), "little")
    if not 2 <= head <= min(size - 8, 100 << 20):
        return None
    try:
        header = json.loads(file.read(head))
        ranges = [
            (8 + head + entry["data_offsets"][0], 8 + head + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return ranges if all(8 + head <= begin <= end <= size for begin, end in ranges) else None


def _hash_range(digest, file, begin: int, end: int, samples: int) -> None:
    """Adds evenly spaced samples of the range, its first and last bytes among them, or all of it if that is less."""
    if end - begin <= samples * _SAMPLE_BYTES:
        positions, count = [begin], end - begin
    else:
        step = (end - begin - _SAMPLE_BYTES) // (samples - 1)
        positions, count = [begin + i * step for i in range(samples - 1)] + [end - _SAMPLE_BYTES], _SAMPLE_BYTES
    for position in positions:
        file.seek(position)
        digest.update(file.read(count))


def fingerprint_files(paths: list[pathlib.Path], full_hash_bytes: int = FULL_HASH_BYTES) -> str:
    """A name for the contents of these files: names, sizes and bytes, whatever folder they lie in."""
    paths = sorted(paths, key=lambda path: path.name)
    sizes = [path.stat().st_size for path in paths]
    full = sum(sizes) <= full_hash_bytes
    digest = hashlib.sha256(b"full" if full else b"sampled")
    for path, size in zip(paths, sizes):
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if full:
                while data := file.read(4 << 20):
                    digest.update(data)
                continue
            ranges = _safetensors_ranges(file) if path.suffix == ".safetensors" else None
            if ranges is None:
                _hash_range(digest, file, 0, size, _SAMPLES_PER_FILE)
                continue
            _hash_range(digest, file, 0, min(begin for begin, _ in ranges) if ranges else size, 1 << 30)
            for begin, end in sorted(ranges):
                _hash_range(digest, file, begin, end, _SAMPLES_PER_TENSOR)
    return digest.hexdigest()[:40]


def _model_folder(model_config, load_config) -> pathlib.Path | None:
    path = pathlib.Path(model_config.model)
    if path.exists():
        return path
    try:  # a repository name: vLLM has already downloaded it
        from huggingface_hub import snapshot_download

        return pathlib.Path(
            snapshot_download(
                model_config.model,
                revision=getattr(model_config, "revision", None),
                cache_dir=getattr(load_config, "download_dir", None),
                local_files_only=True,
            )
        )
    except Exception:  # whatever the reason, there are no files to read
        return None


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if folder.is_file():
        return [folder]
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES and path.is_file()]
    preferred = [path for path in files if path.suffix == ".safetensors"]
    return preferred or files


def weights_fingerprint(vllm_config, given: str) -> str:
    """In hexadecimal. Throws Refused where the weights cannot be told apart from others."""
    if given:
        return _digest(f"named {given}")
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    if str(getattr(load_config.load_format, "value", load_config.load_format)) == "dummy":
        import torch

        parallel = vllm_config.parallel_config
        return _digest(
            f"dummy {model_config.seed} {parallel.tensor_parallel_size} {parallel.pipeline_parallel_size} "
            f"{torch.__version__}"
        )
    folder = _model_folder(model_config, load_config)
    files = weight_files(folder) if folder is not None else []
    if not files:
        raise Refused(
            f"no weight files of {model_config.model!r} can be read on this machine, so retrained weights could not be "
            "told from these; set kvern.weights to a text that changes whenever they do"
        )
    return fingerprint_files(files)


class AdapterDigests:
    """Digests of LoRA adapters, worked out by a thread of its own. An adapter whose files have changed since they were
    first seen under the same id has no digest any more: nobody can tell which version the engine has loaded."""

    def __init__(self, executor):
        self._executor = executor
        self._known: dict[tuple[int, str], tuple[tuple, object]] = {}

    def get(self, lora_request) -> tuple[bool, str]:
        """(known, digest). Not known: ask again. Known and empty: this adapter cannot be cached."""
        path = pathlib.Path(getattr(lora_request, "lora_path", "") or "")
        try:
            files = weight_files(path) + ([path / "adapter_config.json"] if path.is_dir() else [])
            state = tuple((file.name, s.st_ino, s.st_size, s.st_mtime_ns) for file in files for s in [file.stat()])
        except OSError:
            return True, ""
        key = (lora_request.lora_int_id, str(path))
        if key not in self._known:
            self._known[key] = (state, self._executor.submit(fingerprint_files, files))
        first_state, future = self._known[key]
        if state != first_state:
            return True, ""
        if not future.done():
            return False, ""
        return True, "" if future.exception() else future.result()


# ---------------------------------------------------------------- facts


def _ranges(numbers) -> str:
    """0-3,5 for 0 1 2 3 5."""
    numbers = sorted(numbers)
    parts, start = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ",".join(parts)


def _describe_groups(geometry: Geometry) -> str:
    """For instance "0 full layers 0-29 dims 3x64+64 chunk 256"."""
    parts = []
    for group in geometry.groups:
        if geometry.pipeline_parallel > 1:
            layers = _ranges(range(group.group_layers))
        else:
            layers = _ranges(layer_number(name) for name in group.layer_names)
        kind = f"window {group.window}" if group.window else "full"
        parts.append(
            f"{group.index} {kind} layers {layers} dims {group.model_heads}x{group.key_dim}+{group.value_dim} "
            f"chunk {group.chunk_tokens}"
        )
    return "; ".join(parts)


def _model_name(model_config) -> str:
    """For people and for the daemon's rules: the repository's name, or that of the folder."""
    path = pathlib.Path(model_config.model)
    return path.resolve().name if path.exists() else model_config.model


# Models whose keys turn in pairs of neighbouring elements. All others pair the two halves of the turned part. A mistake
# here costs compression, never correctness: what is turned back is turned forward in the same way.
_NEIGHBOUR_PAIRS = ("ChatGLM", "Cohere", "Ernie4_5", "Glm", "GPTJ", "Llama4")
_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope"}
# Names of a scaling's numbers in the model's configuration and in the fact.
_SCALING_NUMBERS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "beta_fast": "fast",
        "beta_slow": "slow",
        "truncate": "truncate",
    },
}


def _plain(value) -> str:
    """A number or a truth value as the daemon reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if value == int(value) else repr(float(value))


def rotation(text_config, key_dim: int, architectures: list[str]) -> str:
    """How the model turns its keys, for the daemon's unrotate step; empty where it does not or not in one way."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    if not rope and getattr(text_config, "rope_theta", None):
        rope = {"rope_theta": text_config.rope_theta, **(getattr(text_config, "rope_scaling", None) or {})}
    theta = rope.get("rope_theta")
    if not isinstance(theta, (int, float)):  # none, or one for each kind of layer
        return ""
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = "mrope" if "mrope_section" in rope else _SCALINGS.get(kind, "dynamic")
    share = rope.get("partial_rotary_factor", getattr(text_config, "partial_rotary_factor", None)) or 1
    dim = getattr(text_config, "rotary_dim", None) or int(key_dim * share)
    neighbours = any(name.startswith(_NEIGHBOUR_PAIRS) for name in architectures)
    parts = {"style": "interleaved" if neighbours else "neox", "theta": _plain(theta), "dim": str(dim)}
    if scaling != "none":
        parts["scaling"] = scaling
    for name, ours in _SCALING_NUMBERS.get(scaling, {}).items():
        if rope.get(name) is not None:
            parts[ours] = _plain(rope[name])
    return ",".join(f"{name}={value}" for name, value in parts.items())


def rotation_of(model_config, key_dim: int) -> str:
    return rotation(model_config.hf_text_config, key_dim, getattr(model_config, "architectures", None) or [])


def namespace_facts(vllm_config, geometry: Geometry, weights: str, hash_seed: str) -> dict[str, str]:
    """The facts of the model itself; with_adapter and with_epoch add to them."""
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    text_config = model_config.hf_text_config
    config = model_config.hf_config.to_dict()
    rope = getattr(text_config, "rope_parameters", None) or {
        "theta": getattr(text_config, "rope_theta", None),
        "scaling": getattr(text_config, "rope_scaling", None),
    }
    first = geometry.groups[0]  # the groups agree in all that is taken from it
    facts = {
        "model": _model_name(model_config),
        "weights": weights,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "kv_dtype": first.dtype,
        "block_tokens": str(geometry.block_tokens),
        "chunk_tokens": str(geometry.chunk_blocks * geometry.block_tokens),
        "hash_algorithm": str(cache_config.prefix_caching_hash_algo),
        "hash_seed": hash_seed,
        "layers": str(sum(group.group_layers for group in geometry.groups)),
        "kv_heads": str(first.model_heads),
        "key_dim": str(first.key_dim),
        "value_dim": str(first.value_dim),
        "groups": _describe_groups(geometry),
        "rope": _canonical(rope),
        "max_position": str(getattr(text_config, "max_position_embeddings", 0)),
        "extra.architecture": "+".join(getattr(model_config, "architectures", None) or []),
        "extra.config": _digest(_canonical({k: v for k, v in config.items() if k not in _IRRELEVANT_CONFIG and not k.startswith("_")})),
    }
    if any(kind in facts["rope"] for kind in _LENGTH_DEPENDENT_ROPE):
        facts["extra.max_model_len"] = str(model_config.max_model_len)
    turns = rotation_of(model_config, first.key_dim)
    if turns:
        facts["rotation"] = turns
    if getattr(model_config, "quantization", None):
        facts["quantization"] = str(model_config.quantization)
    return facts


def with_adapter(facts: dict[str, str], digest: str) -> dict[str, str]:
    return {**facts, "lora": digest}


def with_epoch(facts: dict[str, str], epoch: str) -> dict[str, str]:
    return {**facts, "epoch": epoch}


def hash_seed(vllm_config) -> str | None:
    return compat.hash_seed(str(vllm_config.cache_config.prefix_caching_hash_algo))
