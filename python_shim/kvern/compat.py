"""Everything that differs between vLLM versions, found out by looking, never by a version's number."""

import dataclasses
import functools
import inspect
import sys

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base

# To tell people, never to decide by.
VLLM_VERSION = getattr(vllm, "__version__", "unknown")
# A base class that came later than the connector API itself.
WorkerMetadataBase = getattr(base, "KVConnectorWorkerMetadata", object)
TransferResults = getattr(base, "KVConnectorTransferResults", None)
SupportsHMA = base.SupportsHMA

# Failed loads are told per request; without it they are told per block, which works for a single KV-cache group.
HAS_TRANSFER_RESULTS = TransferResults is not None and hasattr(base.KVConnectorBase_V1, "get_transfer_results")
# Workers can tell the scheduler side that pages may be reused. Without it nothing can be stored.
HAS_WORKER_METADATA = hasattr(base.KVConnectorBase_V1, "build_connector_worker_meta")

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HIT_SOURCE = CacheHitSource.HOST
except ImportError:
    HIT_SOURCE = None


def block_tables(scheduler_output, request_id: str) -> tuple[list[int], ...] | None:
    """The request's block ids by group, with 0 for blocks that are gone; None where this vLLM does not offer them."""
    state = getattr(scheduler_output, "kv_connector_block_state", None)
    return state.get_block_ids(request_id) if state is not None else None


def offers_block_tables() -> bool:
    """Whether has_block_tables() will hold, before there is a step."""
    from vllm.v1.core.sched.output import SchedulerOutput

    return "kv_connector_block_state" in getattr(SchedulerOutput, "__dataclass_fields__", {})


def has_block_tables(scheduler_output) -> bool:
    return getattr(scheduler_output, "kv_connector_block_state", None) is not None


def can_hold(pool) -> str:
    """Empty if references can be taken on the pool's blocks, otherwise what is missing."""
    for name in ("blocks", "touch", "free_blocks"):
        if not hasattr(pool, name):
            return f"this vLLM's block pool has no {name}"
    touch = [p.name for p in inspect.signature(pool.touch).parameters.values()]
    if touch != ["blocks"]:
        return f"this vLLM's BlockPool.touch takes {touch}, not a list of blocks"
    return ""


@functools.cache
def _fails_by_grammar() -> bool:
    """Whether vLLM ends a waiting request whose grammar could not be compiled with an error of its own."""
    try:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.request import RequestStatus
        from vllm.v1.structured_output.request import StructuredOutputRequest
    except ImportError:
        return False
    names = {"grammar_compile_error_reqs", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"}
    seen = {name for method in vars(Scheduler).values() if inspect.isfunction(method) for name in method.__code__.co_names}
    return names <= seen and hasattr(RequestStatus, "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR") and hasattr(
        StructuredOutputRequest, "grammar"
    )


def can_fail_requests() -> bool:
    """Whether a request whose load failed is asked for again, and can then be failed, whatever the load-failure policy:
    otherwise nothing keeps a recomputing engine from computing placeholders."""
    return _fails_by_grammar() and HAS_TRANSFER_RESULTS


def fail_request(request, reason: str) -> None:
    """Has vLLM end a request that waits to be scheduled with finish_reason "error" (HTTP 500) instead of running it. The
    caller must answer None when asked for its tokens.

    There is no call for this. A request whose grammar did not compile ends so, and no step ever runs it; so this one gets
    such a grammar. Where vLLM does not know that end, the request waits until its client gives up; it does not run."""
    request.skip_reading_prefix_cache = False  # with it vLLM would not heed the answer None
    if not _fails_by_grammar():
        return
    from vllm.v1.request import RequestStatus
    from vllm.v1.structured_output.request import StructuredOutputRequest

    failed = StructuredOutputRequest(params=None)
    failed.grammar = RuntimeError(reason)
    request.structured_output_request = failed
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


def connectors_before() -> int:
    """How many others a MultiConnector asks for a request's tokens before the connector that it is making just now; 0 where
    none is making one. It does not tell its children, so this looks who has called."""
    makers = {}
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if any(base.__name__ == "MultiConnector" for base in type(maker).__mro__):
            makers[id(maker)] = len(getattr(maker, "_connectors", (None,)))
        frame = frame.f_back
    return sum(makers.values())


def hash_bytes(algorithm: str) -> int:
    """Of one entry of request.block_hashes."""
    return 16 if "xxhash" in algorithm else 32


def hash_block_tokens(vllm_config, kv_cache_config, block_tokens: int) -> int:
    """Tokens that one entry of request.block_hashes stands for."""
    value = getattr(kv_cache_config, "hash_block_size", None)
    if value is None:
        value = getattr(vllm_config.cache_config, "hash_block_size", None)
    return value or block_tokens


def hash_seed(algorithm: str) -> str | None:
    """NONE_HASH in hexadecimal, the hash that every first block is chained to. None when it is not known yet."""
    from vllm.v1.core import kv_cache_utils

    value = getattr(kv_cache_utils, "NONE_HASH", None)
    if value is not None:
        return bytes(value).hex()
    # The scheduler side is made before vLLM sets it; for seeds that are not drawn at random it is known all the same.
    if "xxhash" in algorithm or not hasattr(kv_cache_utils, "resolve_none_hash_seed"):
        return None
    from vllm.utils.hashing import get_hash_fn_by_name

    hash_fn = get_hash_fn_by_name(algorithm)
    return bytes(hash_fn(kv_cache_utils.resolve_none_hash_seed(hash_fn))).hex()


def make_struct(cls, **values):
    """An instance of a msgspec struct or dataclass from those values that this version of the class knows."""
    known = getattr(cls, "__struct_fields__", None)
    if known is None:
        known = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: value for name, value in values.items() if name in known})
