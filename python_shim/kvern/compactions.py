"""What a request may ask for around compact caches, judged before anything is computed: to make one of its prompt, or to
decode from one."""

import dataclasses
import logging
import re

from kvern import compat, rewriting
from kvern.config import RequestOptions
from kvern.groups import Geometry
from kvern.guard import log_once
from kvern.handles import Handle, HandleError, is_handle_salt
from kvern.metadata import RAGGED_LAYOUTS, RaggedSlots


@dataclasses.dataclass
class Making:
    """A compact cache that is to be made of a request's prompt."""

    spec: str  # canonical
    prompt_tokens: int
    slots: int
    query_rows: int  # last queries of the prompt that the method reads
    ttl_seconds: int
    layout: str = "rectangular"  # in others layers keep different numbers of pages
    skip_local: bool = False  # the local prefix hit left too few tokens to compute
    obstacle: str = "the request ended before its prompt was computed"  # why nothing has been handed over yet
    handle: Handle | None = None  # once the order has gone out


def plan_making(
    request, options: RequestOptions, geometry: Geometry, plan_compaction, layout: str = RAGGED_LAYOUTS[0]
) -> Making:
    """plan_compaction: of the native binding. layout: in which the engine reads caches whose layers differ, where it can.
    Throws ValueError with the reason of a refusal."""
    if len(geometry.groups) > 1 or geometry.groups[0].window:
        raise ValueError("compact caches are made for models whose layers all have full attention")
    if geometry.pipeline_parallel > 1:
        raise ValueError("compact caches are made where every rank has all layers; this engine is pipeline-parallel")
    if getattr(request, "sampling_params", None) is None or getattr(request, "resumable", False):
        raise ValueError("compact caches are made of prompts of ordinary generation requests")
    plan = plan_compaction(options.compact, request.num_prompt_tokens, layout, geometry.block_tokens)
    if options.task:
        spec = _for_task(plan[0], options)
        plan = plan_compaction(spec, request.num_prompt_tokens, layout, geometry.block_tokens)
    spec, slots, query_rows, layout = plan
    if query_rows and geometry.replicas > 1:
        raise ValueError("ranks that share KV heads see a part of their queries each; methods without queries work")
    return Making(spec, request.num_prompt_tokens, slots, query_rows, options.ttl_seconds, layout)


def _for_task(spec: str, options: RequestOptions) -> str:
    """The canonical spec as WindowKV wants it for the task: for localisation a window's score is that of all its tokens,
    for aggregation that of the better half. A request that says `top` itself is left alone."""
    omega = re.match(r"windowkv\(.*?\bomega=(\d+)", spec)
    if omega is None:
        raise ValueError("task is for windowkv alone")
    if options.task == "localisation" or re.search(r"\btop=", options.compact):
        return spec
    return re.sub(r"\btop=\d+", f"top={max(1, int(omega[1]) // 2)}", spec)


def names_handle(request, options: RequestOptions) -> bool:
    """Whether the request's tokens are placeholders. One that brings its whole prompt has such only once it is rewritten,
    and a salt that says so."""
    return (options.handle is not None and not options.rewrite) or is_handle_salt(getattr(request, "cache_salt", None))


def handle_to_decode(request, options: RequestOptions, now: float) -> Handle:
    """The handle of a request that names one, when its placeholders can be trusted never to be computed. Throws
    HandleError, and the request must fail. now: unix seconds."""
    if options.handle is None:
        raise HandleError("its cache_salt is a handle, but kv_transfer_params['kvern']['handle'] names none")
    if options.rewrite and not rewriting.is_rewritten(request):
        raise HandleError("its cache_salt is a handle, and it says that it brings the whole prompt")
    handle = Handle.parse(options.handle)
    if request.cache_salt != handle.text:
        raise HandleError("its cache_salt must be the handle itself, which keeps prefix caches apart")
    _check_decoding(request, options, handle, now)
    if request.num_prompt_tokens <= handle.slots:
        raise HandleError(
            f"the prompt must be {handle.slots} placeholders and at least one token after them; it has "
            f"{request.num_prompt_tokens} tokens"
        )
    return handle


def handle_to_rewrite(request, options: RequestOptions, now: float) -> Handle:
    """The handle whose slots shall stand for the beginning of the request's prompt. Throws HandleError, and the request is
    an ordinary one. now: unix seconds."""
    handle = Handle.parse(options.handle)
    _check_decoding(request, options, handle, now)
    if getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None:
        raise HandleError("its prompt is not of tokens alone")
    structured = getattr(request, "structured_output_request", None)
    if getattr(request.sampling_params, "thinking_token_budget", None) is not None or (
        structured is not None and getattr(structured, "reasoning_ended", None) is None
    ):
        raise HandleError("vLLM would look for marks of reasoning in its prompt")
    if request.num_prompt_tokens <= handle.prompt_tokens:
        raise HandleError(
            f"at least one token must follow the {handle.prompt_tokens} that the cache was made of; the prompt has "
            f"{request.num_prompt_tokens}"
        )
    if not handle.begins(request.prompt_token_ids):
        raise HandleError("its prompt does not begin with the one that the cache was made of")
    return handle


def _check_decoding(request, options: RequestOptions, handle: Handle, now: float) -> None:
    if handle.expires_at <= now:
        raise HandleError("the handle has expired")
    if options.compact or options.compact_refusal:
        raise HandleError("a request that decodes from a compact cache cannot ask for one")
    sampling = getattr(request, "sampling_params", None)
    if sampling is None or getattr(request, "resumable", False):
        raise HandleError("only ordinary generation requests decode from a compact cache")
    if set(request.kv_transfer_params or ()) - {"kvern"}:
        raise HandleError("its kv_transfer_params are for other connectors too, whose tokens would be the prompt's own")
    if any(getattr(sampling, name, None) is not None for name in ("prompt_logprobs", "prompt_logprob_token_ids")):
        raise HandleError("prompt_logprobs (echo with logprobs) would need the prompt's tokens, and there are placeholders")
    if request.skip_reading_prefix_cache:
        raise HandleError("a request that does not read caches cannot decode from one")


def ragged_slots(handle: Handle, slots: list[int], geometry: Geometry) -> RaggedSlots:
    """Pages of each layer of a ragged cache. slots: of each layer, as its chunks say. Throws HandleError."""
    group = geometry.groups[0]
    whole = all(count > 0 and count % group.block_tokens == 0 for count in (*slots, handle.slots))
    if handle.layout == "pool":
        fits = sum(slots) == len(slots) * handle.slots
    else:
        fits = max(slots, default=0) <= handle.slots
    if len(slots) != group.group_layers or not whole or not fits:
        raise HandleError("its chunks do not say how many slots its layers keep")
    pages = tuple(count // group.block_tokens for count in slots)
    return RaggedSlots(handle.layout, handle.slots // group.block_tokens, pages)


def nothing_found(request, trouble: str) -> tuple[int | None, bool]:
    """The answer of an engine in trouble to how many of the request's tokens are stored: none, unless it decodes from a
    compact cache, which must then fail rather than have its placeholders computed."""
    if not names_handle(request, RequestOptions.from_request(getattr(request, "kv_transfer_params", None))):
        return 0, False
    log_once(logging.WARNING, "Kvern: requests that decode from compact caches fail: %s.", trouble)
    compat.fail_request(request, trouble)
    return None, False
