"""Requests that decode from compact caches: their placeholders are never computed. Such a request gets all slots of its
cache or fails."""

import collections
import concurrent.futures
import logging
import time
from collections.abc import Callable

from kvern import compactions, compat, rewriting
from kvern.abilities import Abilities
from kvern.config import RequestOptions
from kvern.groups import Geometry
from kvern.guard import log_once, logger
from kvern.handles import HandleError
from kvern.metadata import KvernMetadata, RaggedOrder, RaggedSlots
from kvern.request_state import RequestState
from kvern.stats import Recorder, label_of

# A busy daemon or a slow tier costs others a hit, and these their answer: they wait as long as a client would.
_PATIENCE_MS = 10_000
_MOST_LEARNT = 4096  # handles whose layers' slots are known without asking


class CompactDecoding:
    """A part of the scheduler side, which finds, claims and loads what this one names."""

    def __init__(
        self,
        client,
        geometry: Geometry,
        abilities: Abilities,
        recorder: Recorder,
        *,
        rewrites: bool,
        hash_bytes: int,
        obstacle: Callable[[], str],
        ready: Callable[[], bool],
        namespace: Callable[..., tuple],
        find: Callable[..., tuple[bool, int, str]],
        release: Callable[[RequestState], None],
        clock=time.monotonic,
        wall_clock=time.time,
    ):
        """client: of the native binding. rewrites: prompts may give way to slots. obstacle: why this engine loads no
        compact caches, or nothing. ready, namespace, find, release: of the scheduler side."""
        self._client = client
        self._geometry = geometry
        self._abilities = abilities
        self._recorder = recorder
        self._rewrites = rewrites
        self._hash_bytes = hash_bytes
        self._obstacle = obstacle
        self._ready = ready
        self._namespace_of = namespace
        self._find = find
        self._release = release
        self._clock = clock
        self._wall_clock = wall_clock
        self._ragged: dict[str, RequestState] = {}  # requests that decode from ragged caches
        self._learnt: collections.OrderedDict[str, RaggedSlots] = collections.OrderedDict()  # by handle, the latest
        self._asking = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvern-ask")

    def rewrite(self, request, options: RequestOptions, new: bool) -> None:
        """Puts slots in the place of the prompt that they were made of. A request that cannot be rewritten has its whole
        prompt and is served as any other. new: it is being admitted."""
        try:
            if not self._rewrites:
                raise HandleError("this engine does not rewrite prompts; kvern.rewrite allows it")
            if not new:
                raise HandleError("this vLLM does not tell its connector of new requests")
            if obstacle := rewriting.obstacle() or self._obstacle() or ("" if self._ready() else "no daemon"):
                raise HandleError(obstacle)
            handle = compactions.handle_to_rewrite(request, options, self._wall_clock())
            if handle.ragged and self._abilities.surely_not(handle.layout):
                raise HandleError(f"this engine does not read caches of the layout {handle.layout}")
            rewriting.rewrite(request, handle)
        except HandleError as error:
            reason = label_of(str(error))
            log_once(logging.WARNING, "Kvern: requests are computed whole and not from their compact caches: %s.", reason)
            self._recorder.count("rewrites_refused", label=reason)

    def start(self, state: RequestState, request) -> None:
        state.decodes = True
        try:
            state.handle = compactions.handle_to_decode(request, state.options, self._wall_clock())
            if obstacle := self._obstacle():
                raise HandleError(obstacle)
        except HandleError as error:
            self._fail(state, request, str(error))
            return
        if state.handle.ragged:
            self._ragged[request.request_id] = state
        blocks = -(-state.handle.slots // self._geometry.block_tokens)
        state.joined = (blocks, state.handle.slot_hashes(blocks, self._hash_bytes))

    def match(self, state: RequestState, request, local_tokens: int) -> tuple[int | None, bool]:
        """All of the cache's slots or none: what is not claimed would be computed from placeholders."""
        handle, now = state.handle, self._clock()
        reason = state.doomed
        if not reason and state.failed:
            reason = "its load failed"
        reason = reason or self._obstacle()
        if not reason and handle.ragged and state.ragged_slots is None:
            known, reason = self._learn_slots(state, request, local_tokens, now)
            if not known:
                return None, False
        if not reason and local_tokens >= handle.slots:
            self._release(state)
            return 0, False
        if not reason:
            if state.answer is not None and (state.answer[0], state.answer[2]) == (local_tokens, self._client.session_count):
                return state.answer[4]
            known, reason = self._look_up(state, request, local_tokens, now)
            if not known:
                return None, False
            if handle.expires_at <= self._wall_clock():
                reason = "the handle has expired"
        if reason:
            self._fail(state, request, reason)
            return None, False
        state.answered_local = local_tokens
        answer = (handle.slots - local_tokens, True)
        state.answer = (local_tokens, 0, self._client.session_count, now, answer)
        return answer

    def passed_over(self, state: RequestState) -> None:
        """vLLM took nothing from this connector for the request. Where slots had been promised, it took another's tokens."""
        if state.decodes and state.answer is not None and state.answer[4][0]:
            self._recorder.count("handles_failed", label="another connector took its place")
            log_once(
                logging.ERROR,
                "Kvern: vLLM takes tokens of requests that decode from compact caches from another connector, and computes "
                "placeholders for the rest. Name KvernConnector first in MultiConnector, or alone.",
            )

    def _look_up(self, state: RequestState, request, local_tokens: int, now: float) -> tuple[bool, str]:
        """(known, why not all of its slots are there). Not known: ask again."""
        limit = state.joined[0] * self._geometry.block_tokens
        known, found, missing = self._find(state, request, local_tokens, limit, now, _PATIENCE_MS)
        lacks = known and found < limit
        return known, f"it is not stored, or not any more: {missing or 'not found'}" if lacks else ""

    def _learn_slots(self, state: RequestState, request, local_tokens: int, now: float) -> tuple[bool, str]:
        """(known, why there are none). Not known: ask again. The stored slots say it, which the daemon must have in DRAM:
        so they are looked up first, also those that vLLM has itself."""
        state.first_asked = state.first_asked or now
        handle = state.handle
        known, problem = self._abilities.layout(handle.layout, state.first_asked)
        if not known or problem:
            return known, f"this engine does not read caches of the layout {handle.layout}: {problem}"
        state.ragged_slots = self._learnt.get(handle.text)
        if state.ragged_slots is not None:
            return True, ""
        if state.asked is None:
            known, reason = self._look_up(state, request, local_tokens if local_tokens < handle.slots else 0, now)
            if not known or reason:
                return known, reason
            namespace = self._namespace_of(request.lora_request)[1].handle
            state.asked = self._asking.submit(self._client.layer_slots, namespace, 0, state.joined[1][: self._hash_bytes])
        if not state.asked.done():
            return False, ""
        try:
            state.ragged_slots = compactions.ragged_slots(handle, state.asked.result(), self._geometry)
        except (HandleError, RuntimeError) as error:
            return True, str(error)
        self._learnt[handle.text] = state.ragged_slots
        if len(self._learnt) > _MOST_LEARNT:
            self._learnt.popitem(last=False)
        return True, ""

    def plan_step(self, metadata: KvernMetadata, scheduler_output) -> int:
        """Tells the workers of every ragged request that runs: without its layers' tables it would read other pages than
        its own. Returns how many cannot be described; they fail the step."""
        undescribed = 0
        for request_id, state in self._ragged.items():
            if request_id not in scheduler_output.num_scheduled_tokens:
                continue
            try:
                ((first_block, *_),) = compat.block_tables(scheduler_output, request_id)
            except Exception:
                undescribed += 1
                first_block = -1
            slots = state.ragged_slots or RaggedSlots(state.handle.layout, 0, ())
            metadata.ragged.append(RaggedOrder(first_block, slots))
        return undescribed

    def _fail(self, state: RequestState, request, reason: str) -> None:
        if not state.doomed:
            name = f"the compact cache {state.handle.short}" if state.handle is not None else "a compact cache"
            logger.warning("Kvern: request %s fails: it decodes from %s, and %s.", request.request_id, name, reason)
            self._recorder.count("handles_failed", label=label_of(reason))
        state.doomed = reason
        self._release(state)
        compat.fail_request(request, reason)

    def ended(self, request_id: str) -> None:
        self._ragged.pop(request_id, None)

    def shutdown(self) -> None:
        self._asking.shutdown(wait=False, cancel_futures=True)
