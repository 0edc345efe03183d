"""Namespaces: all that decides what cached bytes mean. vLLM's block hashes name token ids alone, so that two models give
the same hashes; whatever is not in these facts would let one model read another's cache."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import time
import weakref

from kvern import compat
from kvern.groups import Geometry, Refused, layer_number
from kvern.guard import log_once, logger

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


# ---------------------------------------------------------------- adapters

# Files that changed so shortly before an engine's start count as changed after it: file servers have their own clocks.
_CLOCK_MARGIN_SECONDS = 5


@dataclasses.dataclass
class _Adapter:
    """state: of its files when it was first seen. problem: why nobody can tell which version the engine has."""

    state: tuple
    digest: concurrent.futures.Future | None
    problem: str = ""


class AdapterDigests:
    """Digests of LoRA adapters, worked out by a thread of its own.

    vLLM reads an adapter's files when it is loaded, perhaps long before the first request, and again whenever it has
    been pushed out. So an adapter has a digest only if its files are known to be what they were before the engine could
    first read them, and only as long as they stay so: they had not changed since before the engine's start when they
    were first seen here, or they were seen right before vLLM loaded them (watch_loads)."""

    def __init__(self, executor, started: float | None = None):
        """started: unix seconds; no adapter was loaded before."""
        self._executor = executor
        self._trusted_before = (time.time() if started is None else started) - _CLOCK_MARGIN_SECONDS
        # By name and path, as vLLM's block hashes know them: what is cached locally of one is found by its successor.
        self._known: dict[tuple[str, str], _Adapter] = {}
        self._path_of_id: dict[int, str] = {}  # vLLM finds what it has loaded by the id alone

    def get(self, lora_request) -> tuple[bool, str]:
        """(known, digest). Not known: ask again. Known and empty: this adapter cannot be cached."""
        try:
            adapter = self._look(lora_request, loading=False)
        except OSError:
            return True, ""
        if adapter.problem:
            log_once(
                logging.WARNING,
                "Kvern: nothing is cached for the LoRA adapter %r (%s): %s. Load it again from a new path and with a "
                "new id, by /v1/load_lora_adapter or add_lora() once its files are complete, or restart the engine.",
                lora_request.lora_name,
                lora_request.lora_path,
                adapter.problem,
            )
            return True, ""
        if not adapter.digest.done():
            return False, ""
        return True, "" if adapter.digest.exception() else adapter.digest.result()

    def loading(self, lora_request) -> None:
        """The engine is about to read the adapter's files, unless it has them."""
        try:
            self._look(lora_request, loading=True)
        except OSError:  # nothing to read: vLLM will say so
            pass

    def _look(self, lora_request, loading: bool) -> _Adapter:
        """Throws OSError."""
        path = pathlib.Path(getattr(lora_request, "lora_path", "") or "")
        files = weight_files(path) + ([path / "adapter_config.json"] if path.is_dir() else [])
        stats = [(file.name, file.stat()) for file in files]
        state = tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)
        key = (lora_request.lora_name, str(path))
        adapter = self._known.get(key)
        if adapter is None:
            if loading or _changed_at(path, files) < self._trusted_before:
                adapter = _Adapter(state, self._executor.submit(fingerprint_files, files))
            else:
                problem = "its files changed after the engine's start, and it was not seen when vLLM read them"
                adapter = _Adapter(state, None, problem)
            self._known[key] = adapter
        if state != adapter.state:  # for good: files may become again what they were
            adapter.problem = "its files have changed since it was first seen under this name and path"
        elif getattr(lora_request, "load_inplace", False):
            self._path_of_id[lora_request.lora_int_id] = str(path)
        elif self._path_of_id.setdefault(lora_request.lora_int_id, str(path)) != str(path):
            adapter.problem = "its id is that of another adapter"
        return adapter


def _changed_at(path: pathlib.Path, files: list[pathlib.Path]) -> float:
    """Unix seconds of the last change to the files, to links in their place, and to the folder, which shows that an
    entry was replaced and, on Linux, that the folder was renamed. What was replaced further up does not show."""
    stats = [place.stat() for place in (path, *files)] + [place.lstat() for place in (path, *files)]
    return max(max(s.st_ctime, s.st_mtime) for s in stats)


_watching: weakref.WeakSet[AdapterDigests] = weakref.WeakSet()


def watch_loads(digests: AdapterDigests) -> None:
    """Has digests look at each adapter right before vLLM loads it on request (--lora-modules, /v1/load_lora_adapter,
    add_lora), which passes through the scheduler's process but not through the connector. Never raises."""
    try:
        from vllm.v1.executor.abstract import Executor

        original = Executor.add_lora
        if not hasattr(original, "tells_kvern"):
            Executor.add_lora = _announcing(original)
        _watching.add(digests)
    except Exception:  # another vLLM: adapters must then be older than the engine
        logger.debug("Kvern: cannot see when adapters are loaded.", exc_info=True)


def _announcing(add_lora):
    @functools.wraps(add_lora)
    def wrapper(self, lora_request, *args, **kwargs):
        for digests in list(_watching):
            try:
                digests.loading(lora_request)
            except Exception:
                logger.exception("Kvern: cannot look at an adapter that is being loaded.")
        return add_lora(self, lora_request, *args, **kwargs)

    wrapper.tells_kvern = True
    return wrapper


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
