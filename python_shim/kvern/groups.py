"""The model's KV-cache groups as Kvern sees them; both sides of the connector work this out alike."""

import dataclasses
import re

CHUNK_TOKENS = 256  # a chunk is as many whole blocks as fit in it, at least one

# Specs of exactly these types hold plain keys and values of every token. Subclasses (latent attention, recurrent state,
# compressed tokens) mean something else.
_FULL = "FullAttentionSpec"
_WINDOW = "SlidingWindowSpec"
_DTYPES = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}
# Speculation that adds no layers of another model to the cache.
_MODEL_FREE_SPECULATION = ("ngram", "ngram_gpu", "suffix")


class Refused(Exception):
    """Kvern cannot work with this model or configuration; the text says why and what to set, if anything helps."""


@dataclasses.dataclass(frozen=True)
class Group:
    index: int
    window: int  # tokens; 0: full attention
    block_tokens: int
    chunk_blocks: int
    heads: int  # on this rank
    model_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    layer_names: tuple[str, ...]  # of this rank, in the order of their numbers
    layer_begin: int  # first of them within the group
    group_layers: int  # layers of the group over all ranks

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_blocks * self.block_tokens

    def first_needed_block(self, tokens: int) -> int:
        """First block whose content matters to a request that goes on after so many tokens."""
        return max(0, tokens - self.window + 1) // self.block_tokens if self.window else 0


@dataclasses.dataclass(frozen=True)
class Geometry:
    groups: tuple[Group, ...]
    block_tokens: int
    chunk_blocks: int  # of groups with full attention
    tensor_parallel: int
    pipeline_parallel: int
    replicas: int  # neighbouring tensor-parallel ranks that hold the same heads

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def head_begin(self, group: Group, tensor_rank: int) -> int:
        return tensor_rank // self.replicas * group.heads

    def writes(self, tensor_rank: int) -> bool:
        """One of the ranks that hold the same heads stores them."""
        return tensor_rank % self.replicas == 0


def layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)(?:\.|$)", name)
    return int(numbers[0]) if numbers else 0


def group_chunk_blocks(block_tokens: int, window: int) -> int:
    """Blocks per chunk. While a chunk of a group with a short window fills up, its first blocks leave the window and
    are given away: such a group is stored block by block."""
    blocks = max(1, CHUNK_TOKENS // block_tokens)
    return 1 if 0 < window < blocks * block_tokens else blocks


def analyse(vllm_config, kv_cache_config) -> Geometry:
    """Throws Refused."""
    parallel = vllm_config.parallel_config
    tensor_parallel = parallel.tensor_parallel_size
    pipeline_parallel = parallel.pipeline_parallel_size
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Refused(f"{name} is {getattr(parallel, name)}; Kvern does not know how context parallelism cuts blocks")
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and getattr(speculative, "method", None) not in _MODEL_FREE_SPECULATION:
        raise Refused(
            f"speculative decoding with {getattr(speculative, 'method', 'a draft model')!r} puts another model's layers "
            "into the cache; use ngram or suffix speculation, or none"
        )
    specs = kv_cache_config.kv_cache_groups
    if not specs:
        raise Refused("this model has no KV cache")
    if pipeline_parallel > 1 and len(specs) > 1:
        raise Refused("pipeline parallelism with several KV-cache groups is not supported")

    total_heads = vllm_config.model_config.get_total_num_kv_heads()
    replicas = max(1, tensor_parallel // total_heads)
    groups = []
    for index, spec_group in enumerate(specs):
        spec = spec_group.kv_cache_spec
        kind = type(spec).__name__
        if kind not in (_FULL, _WINDOW):
            raise Refused(f"KV-cache group {index} is of the kind {kind}; Kvern knows {_FULL} and {_WINDOW}")
        if not getattr(spec_group, "enable_kv_transfer", True) or getattr(spec_group, "host_resident", False):
            raise Refused(f"KV-cache group {index} cannot be transferred")
        if getattr(spec_group, "is_eagle_group", False):
            raise Refused(f"KV-cache group {index} belongs to a draft model")
        dtype = _DTYPES.get(str(spec.dtype))
        if dtype is None or getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE") != "NONE":
            raise Refused(
                f"KV-cache group {index} is quantised ({spec.dtype}); set kv_cache_dtype=auto, Kvern quantises by itself"
            )
        if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "num_head_slots", None) is not None:
            raise Refused(f"KV-cache group {index} does not keep one key and one value per token and head")
        if getattr(spec, "attention_chunk_size", None):
            raise Refused(f"KV-cache group {index} uses chunked local attention")
        window = spec.sliding_window if kind == _WINDOW else 0
        names = sorted(spec_group.layer_names, key=lambda name: (layer_number(name), name))
        layer_begin, group_layers = 0, len(names)
        if pipeline_parallel > 1:
            layer_begin = layer_number(names[0])
            group_layers = vllm_config.model_config.get_total_num_hidden_layers()
        groups.append(
            Group(
                index=index,
                window=window,
                block_tokens=spec.block_size,
                chunk_blocks=group_chunk_blocks(spec.block_size, window),
                heads=spec.num_kv_heads,
                model_heads=spec.num_kv_heads * (tensor_parallel // replicas),
                key_dim=spec.head_size,
                value_dim=getattr(spec, "head_size_v", None) or spec.head_size,
                dtype=dtype,
                layer_names=tuple(names),
                layer_begin=layer_begin,
                group_layers=group_layers,
            )
        )
    sizes = {group.block_tokens for group in groups}
    if len(sizes) > 1:
        raise Refused(f"the KV-cache groups have blocks of different sizes ({sorted(sizes)} tokens)")
    for name in ("model_heads", "key_dim", "value_dim", "dtype"):
        values = sorted({str(getattr(group, name)) for group in groups})
        if len(values) > 1:
            raise Refused(f"the KV-cache groups differ in {name} ({', '.join(values)})")
    block_tokens = sizes.pop()
    return Geometry(
        groups=tuple(groups),
        block_tokens=block_tokens,
        chunk_blocks=max(1, CHUNK_TOKENS // block_tokens),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        replicas=replicas,
    )
