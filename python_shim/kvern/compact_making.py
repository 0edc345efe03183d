"""Requests that ask for a compact cache of their prompt: the last queries are captured, and the whole prompt is handed over
once it is computed. What stands in the way refuses the cache and never the request."""

import array
import hashlib
import itertools
import logging
import re
import time
from collections.abc import Callable

from kvern import compactions, compat
from kvern.abilities import Abilities
from kvern.groups import Geometry
from kvern.guard import guarded, log_once
from kvern.handles import Handle
from kvern.metadata import CaptureOrder, CompactOrder, KvernMetadata
from kvern.page_holds import PageHolds
from kvern.request_state import RequestState
from kvern.stats import Recorder, label_of

# vLLM makes n requests of one that wants n choices, with the ids "0_ID", "1_ID" and so on.
_CHOICE = re.compile(r"\d+_(.+)", re.DOTALL)
# They arrive one after the other, so that one may come when those before it have ended; but hardly later than this.
_CHOICES_SECONDS = 60.0


class _Choices:
    """Requests for the choices of one, of which the first to arrive makes the compact cache of all."""

    def __init__(self, maker: RequestState):
        self.maker: RequestState | None = maker  # until it ends
        self.answer: dict | None = None  # from then on
        self.ended_at = 0.0
        self.requests = {maker.request.request_id}


class CompactMaking:
    """A part of the scheduler side, which stores what this one names."""

    def __init__(
        self,
        geometry: Geometry,
        abilities: Abilities,
        holds: PageHolds,
        recorder: Recorder,
        jobs: itertools.count,
        *,
        plan_compaction,
        hash_bytes: int,
        obstacle: Callable[[], str],
        namespace_of: Callable,
        open_store: Callable,
        clock=time.monotonic,
        wall_clock=time.time,
    ):
        """plan_compaction: of the native binding. obstacle: why this engine stores nothing, or nothing. namespace_of,
        open_store: of the scheduler side."""
        self.errors = 0
        self._geometry = geometry
        self._abilities = abilities
        self._holds = holds
        self._recorder = recorder
        self._jobs = jobs
        self._plan_compaction = plan_compaction
        self._hash_bytes = hash_bytes
        self._obstacle = obstacle
        self._namespace_of = namespace_of
        self._open_store = open_store
        self._clock = clock
        self._wall_clock = wall_clock
        self._pending: dict[str, RequestState] = {}  # requests whose compact cache has not been ordered yet
        self._choices: dict[tuple[str, bytes], _Choices] = {}
        self._choices_of: dict[str, _Choices] = {}  # by request
        self._skip_local: list = []  # requests that are to be asked about again without their local prefix hit

    def start(self, state: RequestState, request) -> None:
        if self._is_another_choice(state, request):
            return
        try:
            if obstacle := self._obstacle():
                raise ValueError(obstacle)
            state.making = compactions.plan_making(request, state.options, self._geometry, self._plan_compaction)
            self._pending[request.request_id] = state
        except ValueError as error:
            self._refuse(state, str(error))

    def _is_another_choice(self, state: RequestState, request) -> bool:
        """Whether the cache that the request asks for is that of another choice. Choices are told by their ids, so what
        the cache follows from must be the same, too: an id may be a client's own."""
        match = _CHOICE.fullmatch(request.request_id)
        if match is None:
            return False
        for key, choices in list(self._choices.items()):
            if choices.maker is None and self._clock() - choices.ended_at > _CHOICES_SECONDS:
                del self._choices[key]
        key = match[1], _wish(state, request)
        choices = self._choices.get(key)
        known = choices is not None and request.request_id not in choices.requests
        if known:
            choices.requests.add(request.request_id)
        else:
            choices = self._choices[key] = _Choices(state)
        self._choices_of[request.request_id] = choices
        return known

    def _refuse(self, state: RequestState, reason: str) -> None:
        state.making, state.refusal = None, reason
        self._pending.pop(state.request.request_id, None)
        self._recorder.count("compactions_refused", label=label_of(reason))

    # ---------------------------------------------------------------- before the prompt is computed

    def may_match(self, state: RequestState, request, local_tokens: int) -> bool:
        """Whether it is settled what will be made, if anything; False: ask again."""
        state.first_asked = state.first_asked or self._clock()
        able = self._is_able(state, self._abilities.moving)
        if not able:
            return able is False
        if state.making.layout != "rectangular" and not self._knows_layout(state, request):
            return False
        return state.making is None or self._leaves_queries(state, request, local_tokens)

    def _is_able(self, state: RequestState, ability) -> bool | None:
        """ability: of Abilities. False: it is not, and the wish is refused; None: not known yet."""
        known, problem = ability(state.first_asked)
        if known and problem:
            self._refuse(state, problem)
        return not problem if known else None

    def put_off(self, state: RequestState, request) -> None:
        """The request is asked about again."""
        if state.making is not None and state.making.skip_local:
            self._skip_local.append(request)

    def _knows_layout(self, state: RequestState, request) -> bool:
        """Whether it is settled how the layers of the cache differ, or that they do not; False: ask again."""
        known, layout, problem = self._abilities.best_layout(state.first_asked)
        if known and layout != state.making.layout:
            how = "claim the slots of the largest layer" if layout == "shift" else "get the same slots for all layers"
            log_once(logging.INFO, "Kvern: compact caches %s: %s.", how, problem)
            try:
                state.making = compactions.plan_making(
                    request, state.options, self._geometry, self._plan_compaction, layout
                )
            except ValueError as error:
                self._refuse(state, str(error))
        return known

    def _leaves_queries(self, state: RequestState, request, local_tokens: int) -> bool:
        """Whether the queries that the method reads will be computed here; False: ask again. A local prefix hit cannot be
        shortened, so one that leaves too little is passed over as a whole; what the store has is loaded up to there."""
        making = state.making
        if making.skip_local:
            request.skip_reading_prefix_cache = False
        if not making.query_rows:
            return True
        able = self._is_able(state, self._abilities.capture)
        if not able:
            return able is False
        if making.prompt_tokens - local_tokens < making.query_rows:
            making.skip_local = True
            return False
        return True

    # ---------------------------------------------------------------- a step

    def begin_step(self) -> None:
        for request in self._skip_local:
            request.skip_reading_prefix_cache = True  # until vLLM asks about it again
        self._skip_local = []

    def plan_step(self, metadata: KvernMetadata, scheduler_output, own_tables: bool) -> None:
        """own_tables: vLLM does not show the requests' blocks, and their states do."""
        for request_id, state in list(self._pending.items()):
            scheduled = scheduler_output.num_scheduled_tokens.get(request_id)
            tables = state.tables if own_tables else None
            if scheduled and tables is None:
                tables = compat.block_tables(scheduler_output, request_id)
            if tables is not None and scheduled:
                self._plan(metadata, state, scheduled, tables[0])

    @guarded()
    def _plan(self, metadata: KvernMetadata, state: RequestState, scheduled: int, table: list[int]) -> None:
        request, making = state.request, state.making
        if state.stale:
            self._refuse(state, "the engine's cache was reset while the prompt was computed")
            return
        begin = request.num_computed_tokens
        end = begin + scheduled
        first = making.prompt_tokens - making.query_rows
        if making.query_rows and first < end and begin < making.prompt_tokens:
            last_block = table[(end - 1) // self._geometry.block_tokens]
            metadata.captures.append(CaptureOrder(request.request_id, begin, end, last_block, first, making.query_rows))
        if end >= making.prompt_tokens:
            self._order(metadata, state, table)

    def _order(self, metadata: KvernMetadata, state: RequestState, table: list[int]) -> None:
        """Stores the whole prompt once more, under names that only the handle gives, for the daemon to make the cache of.
        Where something stands in the way now, the same is due again in the next step."""
        request, making, group = state.request, state.making, self._geometry.groups[0]
        namespace = self._namespace_of(request)
        if namespace is None:
            making.obstacle = "the daemon was not there when the prompt had been computed"
            return
        if not self._holds.has_room(PageHolds.MAX_SHARE_COMPACT):
            making.obstacle = "too many blocks waited to be stored when the prompt had been computed"
            self._recorder.count("stores_deferred")
            return
        blocks = -(-making.prompt_tokens // group.block_tokens)
        expires_at = int(self._wall_clock()) + making.ttl_seconds
        prompt = request.all_token_ids[: making.prompt_tokens]
        handle = Handle.make(prompt, making.slots, expires_at, making.layout)
        size = self._hash_bytes
        hashes = handle.source_hashes(blocks, size)
        chunks = []
        for first in range(0, blocks, group.chunk_blocks):
            last = min(first + group.chunk_blocks, blocks)
            previous = hashes[(first - 1) * size : first * size] if first else b""
            chunks.append((hashes[first * size : last * size], list(table[first:last]), first * group.block_tokens, previous))
        store = self._open_store(metadata, state, namespace, group, "raw", chunks, [0] * len(chunks), None)
        metadata.compactions.append(
            CompactOrder(
                job=next(self._jobs),
                store_job=store,
                request=request.request_id,
                namespace=namespace.key,
                group=group.index,
                handle=handle.text,
                spec=making.spec,
                prompt_tokens=making.prompt_tokens,
                slots=making.slots,
                expires_at=expires_at,
                query_rows=making.query_rows,
                hash_bytes=size,
                source_hashes=hashes,
                slot_hashes=handle.slot_hashes(-(-making.slots // group.block_tokens), size),
                traceparent=state.traceparent,
            )
        )
        making.handle = handle
        del self._pending[request.request_id]

    # ---------------------------------------------------------------- the end of the request

    def end(self, state: RequestState) -> dict | None:
        """What the request's answer says of its wish; None where it had none."""
        self._pending.pop(state.request.request_id, None)
        choices = self._choices_of.pop(state.request.request_id, None)
        if choices is None:
            return self._told(state)
        if choices.maker is state:
            choices.maker, choices.answer, choices.ended_at = None, self._told(state), self._clock()
        if choices.maker is None:
            return choices.answer
        return self._told(choices.maker, "another choice, which makes it, has not computed the prompt yet")

    def _told(self, state: RequestState, too_early: str = "") -> dict | None:
        making = state.making
        if making is None and not state.refusal:
            return None
        if making is None or making.handle is None:
            return {"state": "refused", "reason": state.refusal or self._obstacle() or too_early or making.obstacle}
        return {
            "state": "pending",
            "handle": making.handle.text,
            "prompt_tokens": making.prompt_tokens,
            "slots": making.slots,
            "method": making.spec,
            "expires_at": making.handle.expires_at,
        }


def _wish(state: RequestState, request) -> bytes:
    """A digest of all that a compact cache of the request follows from, and of who may have it."""
    lora = request.lora_request
    facts = (state.options, getattr(request, "cache_salt", None), getattr(lora, "lora_name", None))
    prompt = array.array("q", request.all_token_ids[: request.num_prompt_tokens])
    return hashlib.sha256(repr(facts).encode() + prompt.tobytes()).digest()
