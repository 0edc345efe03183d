"""The half of the connector that lives beside vLLM's scheduler: looks prompts up, plans loads and stores."""

import collections
import concurrent.futures
import itertools
import logging
import re
import time
import uuid

from kvern import compactions, compat, identity, rewriting, tracing
from kvern.config import Options, RequestOptions
from kvern.events import ChunkNote, EventLog, note_chunk
from kvern.groups import Geometry, Group
from kvern.guard import guarded, log_once, logger
from kvern.handles import Handle, HandleError
from kvern.metadata import CaptureOrder, CompactOrder, KvernMetadata, LoadOrder, RaggedOrder, StoreOrder
from kvern.page_holds import PageHolds
from kvern.stats import Recorder

# An answer stands this long before a waiting request is looked up again; vLLM asks once per step.
RECHECK_SECONDS = 0.1


class _Namespace:
    """One set of facts, registered with the daemon."""

    def __init__(self, key: int, facts: dict[str, str], handle: int):
        self.key = key
        self.facts = facts
        self.handle = handle


class _RequestState:
    def __init__(self, request, options: RequestOptions, groups: int):
        self.request = request
        self.options = options
        self.traceparent = tracing.traceparent_of(request)
        self.lookup: tracing.Span | None = None  # until the first answer
        self.epoch = -1  # number of the epoch that the marks below belong to
        self.first_asked = 0.0
        self.answer: tuple | None = None  # (local tokens, hashes, session, time, answer)
        self.answered_local = 0
        self.found_tokens = 0  # leading tokens that were in the store at the last look-up
        self.hit_tokens = 0
        self.stored_tokens = 0
        self.claimed = False
        self.loading = False
        self.load_blocks: list[int] = []
        self.failed = False  # a load failed: it is not tried again, or a recomputing engine would loop
        self.stale = False  # its pages date from before a cache reset
        self.finished = False
        self.tables: tuple[list[int], ...] | None = None  # only where vLLM does not show its own
        self.next_cell = [0] * groups  # first chunk, on the grid, that is neither stored nor planned
        self.tail_done = False
        self.due_tokens = 0  # nothing becomes due before so many tokens are computed
        self.joined: tuple[int, bytes] = (0, b"")
        self.making: compactions.Making | None = None  # a compact cache that it asks for
        self.refusal = options.compact_refusal  # why it gets none
        self.decodes = False  # from a compact cache: its placeholders must never be computed, nothing of it is stored
        self.handle: Handle | None = None
        self.asked: concurrent.futures.Future | None = None  # what the daemon knows of a ragged cache
        self.pages: tuple[int, ...] | None = None  # of each of its layers
        self.doomed = ""  # why it must fail

    def reset_marks(self, epoch: int) -> None:
        self.epoch = epoch
        self.next_cell = [0] * len(self.next_cell)
        self.tail_done = False
        self.due_tokens = 0
        self.found_tokens = 0


class _Store:
    """A store job until every rank has told its end. notes: what to announce of each chunk, if anything."""

    def __init__(self, state: _RequestState, namespace: _Namespace, group: int, chunk_tokens: list[int], notes):
        self.state = state
        self.group = group
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self.notes: list[ChunkNote] | None = notes
        self.hashes: list[bytes] = []  # of each chunk, where it is to be retained
        self.ranks: dict[int, set[int]] = {}  # rank -> chunks that it has stored


class SchedulerSide:
    def __init__(
        self,
        vllm_config,
        geometry: Geometry,
        options: Options,
        client,
        matcher,
        weights: str,
        *,
        hash_block_tokens: int,
        plan_compaction,
        clock=time.monotonic,
        wall_clock=time.time,
    ):
        """client, matcher: of the native binding, or anything that behaves like them. weights: their fingerprint.
        hash_block_tokens: tokens that one entry of request.block_hashes stands for. plan_compaction: of the native
        binding. wall_clock: unix seconds."""
        self.errors = 0
        self._vllm_config = vllm_config
        self._geometry = geometry
        self._options = options
        self._client = client
        self._matcher = matcher
        self._weights = weights
        self._clock = clock
        self._started = self._clock()
        # While the first session or a namespace is being set up, requests are told "not known yet" for this long.
        self._setup_seconds = options.setup_timeout_ms / 1000
        role = vllm_config.kv_transfer_config.kv_role
        self._may_load = role in ("kv_both", "kv_consumer")
        self._may_store = role in ("kv_both", "kv_producer")
        self._refused = ""
        self._states: dict[str, _RequestState] = {}
        self._namespaces: dict[tuple[int, str], _Namespace] = {}
        self._announce: list[_Namespace] = []
        self._base_facts: dict[str, str] | None = None
        self._epoch = 0
        self._epoch_name = ""
        self._hash_ratio = geometry.block_tokens // hash_block_tokens
        self._hash_bytes = compat.hash_bytes(str(vllm_config.cache_config.prefix_caching_hash_algo))
        self._plan_compaction = plan_compaction
        self._wall_clock = wall_clock
        self._makings: dict[str, _RequestState] = {}  # requests whose compact cache has not been ordered yet
        self._skip_local: list = []  # requests that are to be asked about again without their local prefix hit
        self._ragged: dict[str, _RequestState] = {}  # requests that decode from ragged caches
        self._no_pool: dict[int, str] = {}  # rank -> why it cannot read such, "": it can
        self._no_capture: dict[int, str] = {}  # rank -> why it cannot capture queries, "": it can
        self._jobs = itertools.count(1)
        self._loads_due: list[LoadOrder] = []
        self._loads: dict[str, _RequestState] = {}
        self._stores: dict[int, _Store] = {}
        self._holds = PageHolds(geometry.ranks)
        self._recorder = Recorder()
        self._reported_errors = 0
        self._sessions = 0
        self._connected = False
        self._said_absent = False
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvern-digest")
        self._asking = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvern-ask")
        self._adapters = identity.AdapterDigests(self._executor)
        events = getattr(vllm_config, "kv_events_config", None)
        self._events = EventLog() if events is not None and events.enable_kv_cache_events else None
        self._snapshots_due: collections.deque[_Namespace] = collections.deque()
        if "xxhash" in str(vllm_config.cache_config.prefix_caching_hash_algo):
            log_once(
                logging.WARNING,
                "Kvern: prefix_caching_hash_algo is %s, whose hashes differ in every process unless PYTHONHASHSEED is set; "
                "without it nothing is found after a restart. Use sha256.",
                vllm_config.cache_config.prefix_caching_hash_algo,
            )
        self._namespace_of(None)

    # ---------------------------------------------------------------- set-up

    @guarded()
    def bind_block_pool(self, pool) -> None:
        self._holds.bind(pool)
        problem = self._holds.problem or ("" if compat.HAS_WORKER_METADATA else "workers cannot report to the scheduler")
        if problem and self._may_store:
            self._may_store = False
            log_once(logging.WARNING, "Kvern: this engine loads but does not store: %s.", problem)

    def refuse(self, reason: str) -> None:
        if not self._refused:
            self._refused = reason
            log_once(logging.WARNING, "Kvern: this engine runs without the store: %s.", reason)

    def _facts(self) -> dict[str, str] | None:
        if self._base_facts is None:
            seed = identity.hash_seed(self._vllm_config)
            if seed is None:
                return None
            self._base_facts = identity.namespace_facts(self._vllm_config, self._geometry, self._weights, seed)
        return self._base_facts

    def _namespace_of(self, lora_request) -> tuple[bool, _Namespace | None]:
        """(known, namespace). Not known: ask again. Known and None: this request has none."""
        adapter = ""
        if lora_request is not None:
            known, adapter = self._adapters.get(lora_request)
            if not known:
                return False, None
            if not adapter:
                return True, None
        namespace = self._namespaces.get((self._epoch, adapter))
        if namespace is None:
            facts = self._facts()
            if facts is None:
                return False, None
            if adapter:
                facts = identity.with_adapter(facts, adapter)
            if self._epoch_name:
                facts = identity.with_epoch(facts, self._epoch_name)
            namespace = _Namespace(len(self._namespaces), facts, self._client.add_namespace(facts))
            self._namespaces[self._epoch, adapter] = namespace
            self._announce.append(namespace)
        return True, namespace

    def _state_of(self, request, new: bool = False) -> _RequestState:
        """new: the request is being admitted."""
        state = self._states.get(request.request_id)
        if state is None:
            options = RequestOptions.from_request(getattr(request, "kv_transfer_params", None), self._options.compact)
            if options.problem:
                log_once(logging.WARNING, "Kvern: %s.", options.problem)
            if options.rewrite and options.handle is not None and not compactions.names_handle(request, options):
                self._rewrite(request, options, new)
            state = _RequestState(request, options, len(self._geometry.groups))
            self._states[request.request_id] = state
            if compactions.names_handle(request, options):
                self._start_decoding(state, request)
            elif options.compact:
                self._start_making(state, request)
            elif state.refusal:
                self._recorder.count("compactions_refused", label="malformed")
        if state.epoch != self._epoch:
            state.reset_marks(self._epoch)
        return state

    # ---------------------------------------------------------------- look-up

    @guarded()
    def on_new_request(self, request) -> None:
        self._state_of(request, new=True)
        if request.lora_request is not None:
            self._namespace_of(request.lora_request)  # starts the digest of a new adapter

    def _nothing_found(self, request, local_tokens: int) -> tuple[int | None, bool]:
        return compactions.nothing_found(request, "the look-up of a compact cache went wrong")

    @guarded(_nothing_found)
    def get_num_new_matched_tokens(self, request, local_tokens: int) -> tuple[int | None, bool]:
        state = self._state_of(request)
        state.stale = False  # asked for requests without computed tokens only: whatever it had is recomputed
        if state.decodes:
            return self._match_handle(state, request, local_tokens)
        if state.making is None:
            return self._match(state, request, local_tokens)
        answer = None, False
        if self._knows_layout(state, request) and (
            state.making is None or self._leaves_queries(state, request, local_tokens)
        ):
            answer = self._match(state, request, local_tokens)
        if answer[0] is None and state.making is not None and state.making.skip_local:
            self._skip_local.append(request)
        return answer

    def _match(self, state: _RequestState, request, local_tokens: int) -> tuple[int | None, bool]:
        block_tokens = self._geometry.block_tokens
        if not self._wants_load(state, request) or local_tokens % block_tokens:
            self._release(state)
            return 0, False
        now = self._clock()
        hashed = len(request.block_hashes) // self._hash_ratio * block_tokens
        if state.answer is not None:
            local, hashes, session, at, answer = state.answer
            fresh = answer[0] != 0 or now - at < RECHECK_SECONDS
            if fresh and (local, hashes, session) == (local_tokens, hashed, self._client.session_count):
                return answer
        limit = min(hashed, request.num_tokens)
        if state.options.max_load_tokens is not None:
            limit = min(limit, state.options.max_load_tokens // block_tokens * block_tokens)
        if state.making is not None:
            limit = min(limit, (state.making.prompt_tokens - state.making.query_rows) // block_tokens * block_tokens)
        known, found, reason = self._find(state, request, local_tokens, limit, now)
        # With at most one block to gain, the look-up only tells what need not be stored: nobody waits for it.
        worthwhile = limit - local_tokens > block_tokens
        if not known and worthwhile:
            return None, False
        state.found_tokens = found
        state.answered_local = local_tokens
        gain = found - local_tokens
        first_answer = state.answer is None
        if gain > block_tokens:
            answer = (gain, True)
        else:
            answer = (0, False)
            self._release(state)
            if worthwhile and first_answer:  # once per request, however often vLLM asks
                self._count_miss(request, reason or "gain of one block or less")
        state.answer = (local_tokens, hashed, self._client.session_count, now, answer)
        return answer

    def _wants_load(self, state: _RequestState, request) -> bool:
        return (
            self._may_load
            and not self._refused
            and state.options.load
            and not state.failed
            and not state.loading
            and not getattr(request, "skip_reading_prefix_cache", False)
        )

    def _find(self, state, request, local_tokens: int, limit: int, now: float) -> tuple[bool, int, str]:
        """(known, leading tokens that are stored, why not more). Not known: ask again. limit: whole blocks."""
        state.first_asked = state.first_asked or now
        if not self._ready():
            starting = self._client.session_count == 0 and now - self._started < self._setup_seconds
            return not (starting and self._client.state == "connecting"), 0, "no daemon"
        known, namespace = self._namespace_of(request.lora_request)
        if known and namespace is None:
            return True, 0, "adapter has no digest"
        if not known or self._client.namespace_id(namespace.handle) is None:
            refusal = self._client.namespace_refusal(namespace.handle) if namespace is not None else ""
            if refusal:
                log_once(logging.WARNING, "Kvern: the daemon refuses this engine's namespace: %s.", refusal)
                return True, 0, "namespace refused"
            return now - state.first_asked >= self._setup_seconds, 0, "namespace not registered"
        if limit <= local_tokens:
            return True, 0, ""
        if state.lookup is None:
            state.lookup = tracing.begin("kvern.lookup", state.traceparent, request=request.request_id)
        known, found, reason = self._matcher.match(
            request.request_id,
            namespace.handle,
            self._joined_hashes(state, request),
            self._hash_bytes,
            local_tokens,
            limit,
            request.num_tokens,
            state.lookup.traceparent,
        )
        if known:
            state.lookup.end(tokens=found, asked_tokens=limit, reason=reason)
        state.claimed = True
        return known, min(found, limit), reason

    def _ready(self) -> bool:
        if self._client.state == "ready":
            if self._said_absent:
                logger.info("Kvern: connected to the daemon.")
            self._connected, self._said_absent = True, False
            return True
        if self._connected:
            self._recorder.count("disconnections")
        grace = not self._connected and self._clock() - self._started < self._setup_seconds
        self._connected = False
        if not grace and not self._said_absent:
            self._said_absent = True
            logger.warning(
                "Kvern: no daemon at %s (%s). The engine serves without it and connects as soon as it can.",
                self._options.address or "the embedded daemon's socket",
                self._client.problem,
            )
        return False

    def _joined_hashes(self, state: _RequestState, request) -> bytes:
        if state.handle is not None:
            return state.joined[1]
        count = len(request.block_hashes)
        if state.joined[0] != count:
            state.joined = (count, b"".join(request.block_hashes[self._hash_ratio - 1 :: self._hash_ratio]))
        return state.joined[1]

    def _count_miss(self, request, reason: str) -> None:
        logger.debug("Kvern: request %s is a miss: %s.", request.request_id, reason)
        self._recorder.count("misses", label=reason)
        self._recorder.count("requested_tokens", request.num_tokens)
        self._client.report(0, request.num_tokens)

    def _release(self, state: _RequestState) -> None:
        """Gives the claim on what was found back; an answer that rested on it is void."""
        if state.claimed and not state.loading:
            state.claimed = False
            state.answer = None
            self._matcher.release(state.request.request_id)

    # ---------------------------------------------------------------- loads

    def _load_cannot_be_planned(self, request, blocks, external_tokens: int) -> None:
        """vLLM now waits for a load that was promised: let the workers report it as failed."""
        state = self._states.get(request.request_id)
        if external_tokens > 0 and state is not None and not state.loading:
            self._start_load(state, LoadOrder(next(self._jobs), request.request_id, -1, 0, [], state.traceparent))

    def _start_load(self, state: _RequestState, order: LoadOrder) -> None:
        state.loading = True
        self._loads[order.request] = state
        self._loads_due.append(order)

    @guarded()
    def _retain_hits(self, state: _RequestState, request) -> None:
        """Of the whole prompt: what is stored of it is what it hits, and the rest is passed over."""
        namespace = self._registered_namespace(request)
        if namespace is not None and not state.decodes:
            hashes = self._joined_hashes(state, request)
            for group in self._geometry.groups:
                self._retain(state, namespace, group.index, hashes)

    def _retain(self, state: _RequestState, namespace: _Namespace, group: int, hashes: bytes) -> None:
        if hashes and self._ready():
            self._matcher.retain(namespace.handle, group, hashes, self._hash_bytes, state.options.retain_seconds)

    @guarded(_load_cannot_be_planned)
    def update_state_after_alloc(self, request, blocks, external_tokens: int) -> None:
        state = self._states.get(request.request_id)
        if state is not None and state.options.retain_seconds:
            self._retain_hits(state, request)
        if state is None or state.loading:
            return
        if external_tokens <= 0:
            if state.decodes and state.answer is not None and state.answer[4][0]:
                self._recorder.count("handles_failed", label="another connector took its place")
                log_once(
                    logging.ERROR,
                    "Kvern: vLLM takes tokens of requests that decode from compact caches from another connector, and computes "
                    "placeholders for the rest. Compact caches need an engine whose only connector is Kvern's.",
                )
            self._release(state)
            return
        _, namespace = self._namespace_of(request.lora_request)
        tables = blocks.get_block_ids()
        block_tokens = self._geometry.block_tokens
        first = state.answered_local // block_tokens
        last = -(-(state.answered_local + external_tokens) // block_tokens)
        pieces, block_ids = [], []
        for group in self._geometry.groups:
            for piece in self._pieces(state, request, group, tables[group.index], first, last):
                pieces.append(piece)
                block_ids += [block for block in piece[3] if block]
        self._recorder.count("hit_tokens", external_tokens)
        self._recorder.count("requested_tokens", request.num_tokens)
        self._client.report(external_tokens, request.num_tokens)
        order = LoadOrder(
            next(self._jobs), request.request_id, namespace.key, self._hash_bytes, pieces, state.traceparent
        )
        state.load_blocks = block_ids
        state.answer = None
        state.hit_tokens = external_tokens
        self._start_load(state, order)

    def _pieces(self, state, request, group: Group, table: list[int], first: int, last: int):
        """The group's blocks in [first, last), cut at the chunk grid, without the leading null blocks of each cut."""
        size = group.chunk_blocks
        hash_bytes = self._hash_bytes
        hashes = self._joined_hashes(state, request)
        for cell in range(first // size, -(-last // size)):
            begin, end = max(first, cell * size), min(last, (cell + 1) * size)
            while begin < end and table[begin] == 0:
                begin += 1
            if begin < end:
                yield (
                    group.index,
                    begin - cell * size,
                    hashes[begin * hash_bytes : end * hash_bytes],
                    list(table[begin:end]),
                )

    def _load_ended(self, request_id: str) -> None:
        state = self._loads.pop(request_id, None)
        if state is None:
            return
        state.loading = False
        if state.failed:
            state.reset_marks(self._epoch)
        if state.finished:
            self._states.pop(request_id, None)
        self._release(state)

    # ---------------------------------------------------------------- a step

    def build_connector_meta(self, scheduler_output) -> KvernMetadata:
        """Loads first: a load that vLLM waits for must reach the workers whatever happens below."""
        loads, self._loads_due = self._loads_due, []
        metadata = KvernMetadata(loads=loads)
        if self._skip_local:
            for request in self._skip_local:
                request.skip_reading_prefix_cache = True  # until vLLM asks about it again
            self._skip_local = []
        self._plan_ragged(metadata, scheduler_output)
        self._plan_step(metadata, scheduler_output)
        self._describe_namespaces(metadata)
        return metadata

    @guarded()
    def _describe_namespaces(self, metadata: KvernMetadata) -> None:
        used = {order.namespace for order in metadata.loads} | {order.namespace for order in metadata.stores}
        used.update(namespace.key for namespace in self._announce)
        self._announce = []
        if used:
            facts = {namespace.key: namespace.facts for namespace in self._namespaces.values()}
            metadata.namespaces = {key: facts[key] for key in used if key in facts}

    @guarded()
    def _plan_step(self, metadata: KvernMetadata, scheduler_output) -> None:
        if not self._may_store or self._refused:
            return
        own_tables = not compat.has_block_tables(scheduler_output)
        if own_tables:
            self._mirror_tables(scheduler_output)
        if self._ready():
            for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
                state = self._states.get(request_id)
                if state is not None:
                    self._plan_stores(metadata, scheduler_output, state, scheduled, own_tables)
        if self._makings:
            self._plan_makings(metadata, scheduler_output, own_tables)

    def _mirror_tables(self, scheduler_output) -> None:
        """Block tables from what is new in each step. They do not show blocks that a sliding window has given away, so
        only models with full attention alone are stored then."""
        for new in scheduler_output.scheduled_new_reqs:
            state = self._states.get(new.req_id)
            if state is not None:
                state.tables = tuple(list(blocks) for blocks in new.block_ids)
        cached = scheduler_output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", set())
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids):
            state = self._states.get(request_id)
            if state is None or new_blocks is None:
                continue
            if request_id in resumed or state.tables is None:
                state.tables = tuple(list(blocks) for blocks in new_blocks)
            else:
                for table, blocks in zip(state.tables, new_blocks):
                    table.extend(blocks)

    @guarded()
    def _plan_stores(self, metadata, scheduler_output, state: _RequestState, scheduled: int, own_tables: bool) -> None:
        request = state.request
        if state.epoch != self._epoch:
            state.reset_marks(self._epoch)
        if not state.options.store or state.stale or state.decodes:
            return
        block_tokens = self._geometry.block_tokens
        computed = request.num_computed_tokens + scheduled
        limit = min(computed, len(request.block_hashes) // self._hash_ratio * block_tokens)
        if not self._options.store_generated:
            limit = min(limit, request.num_prompt_tokens)
        if state.options.max_store_tokens is not None:
            limit = min(limit, state.options.max_store_tokens)
        tail_due = not state.tail_done and computed >= request.num_prompt_tokens
        if limit < state.due_tokens and not tail_due:
            return
        tables, namespace = None, None
        for number, group in enumerate(self._geometry.groups):
            # What was found in the store needs no second copy.
            cell = max(state.next_cell[number], state.found_tokens // group.chunk_tokens)
            last_cell = limit // group.chunk_tokens
            spans = [(c * group.chunk_blocks, (c + 1) * group.chunk_blocks) for c in range(cell, last_cell)]
            if tail_due:
                begin = max(cell, last_cell) * group.chunk_blocks
                end = min(limit, request.num_prompt_tokens) // block_tokens
                if begin < end and end * block_tokens > state.found_tokens:
                    spans.append((begin, end))
            if not spans:
                continue
            if tables is None:
                # Where something stands in the way now, the same is due again in the next step.
                namespace = self._registered_namespace(request)
                if namespace is None:
                    return
                if not self._holds.has_room():
                    self._recorder.count("stores_deferred")
                    return
                tables = state.tables if own_tables else compat.block_tables(scheduler_output, request.request_id)
                if tables is None:
                    return
            if not (own_tables and group.window):
                self._store_spans(metadata, state, namespace, group, tables[group.index], spans)
            state.next_cell[number] = max(cell, last_cell)
        state.tail_done |= tail_due
        state.due_tokens = min(
            (max(cell, state.found_tokens // group.chunk_tokens) + 1) * group.chunk_tokens
            for cell, group in zip(state.next_cell, self._geometry.groups)
        )

    def _registered_namespace(self, request) -> _Namespace | None:
        known, namespace = self._namespace_of(request.lora_request)
        ready = known and namespace is not None and self._client.namespace_id(namespace.handle) is not None
        return namespace if ready else None

    def _store_spans(self, metadata, state, namespace: _Namespace, group: Group, table: list[int], spans) -> None:
        """One job for these blocks of the group; spans are (first block, end)."""
        request = state.request
        hash_bytes = self._hash_bytes
        hashes = self._joined_hashes(state, request)
        chunks, tokens, notes = [], [], [] if self._events is not None else None
        for begin, end in spans:
            block_ids = list(table[begin:end])
            if len(block_ids) < end - begin or 0 in block_ids:
                self._recorder.count("stores_skipped", label="blocks left the window")
                continue
            previous = hashes[(begin - 1) * hash_bytes : begin * hash_bytes] if begin else b""
            chunks.append((hashes[begin * hash_bytes : end * hash_bytes], block_ids, begin * group.block_tokens, previous))
            tokens.append((end - begin) * group.block_tokens)
            if notes is not None:
                own = [hashes[i * hash_bytes : (i + 1) * hash_bytes] for i in range(begin, end)]
                notes.append(note_chunk(request, group, own, begin, previous or None))
        if not chunks:
            return
        job = next(self._jobs)
        codec = state.options.codec or self._options.codec
        order = StoreOrder(job, namespace.key, group.index, codec, hash_bytes, chunks, state.traceparent)
        self._holds.take(job, [block for chunk in chunks for block in chunk[1]])
        self._stores[job] = _Store(state, namespace, group.index, tokens, notes)
        if state.options.retain_seconds:
            self._stores[job].hashes = [chunk[0] for chunk in chunks]
        metadata.stores.append(order)

    # ---------------------------------------------------------------- compact caches: decoding from one

    def _rewrite(self, request, options: RequestOptions, new: bool) -> None:
        """A request that cannot be rewritten has its whole prompt and is served as any other."""
        try:
            if not self._options.rewrite:
                raise HandleError("this engine does not rewrite prompts; kvern.rewrite allows it")
            if not new:
                raise HandleError("this vLLM does not tell its connector of new requests")
            if obstacle := rewriting.obstacle() or self._decoding_obstacle() or ("" if self._ready() else "no daemon"):
                raise HandleError(obstacle)
            handle = compactions.handle_to_rewrite(request, options, self._wall_clock())
            if handle.ragged and any(self._no_pool.values()):
                raise HandleError("this engine gives all layers the same slots")
            rewriting.rewrite(request, handle)
        except HandleError as error:
            reason = _label(str(error))
            log_once(logging.WARNING, "Kvern: requests are computed whole and not from their compact caches: %s.", reason)
            self._recorder.count("rewrites_refused", label=reason)

    def _decoding_obstacle(self) -> str:
        """Why no request of this engine can decode from a compact cache."""
        if not self._may_load:
            return "this engine does not load (kv_role)"
        fails_on_its_own = self._vllm_config.kv_transfer_config.kv_load_failure_policy == "fail"
        if not compat.can_fail_requests() and not fails_on_its_own:
            return "on this vLLM compact caches need kv_load_failure_policy 'fail'"
        return self._refused and f"this engine runs without the store: {self._refused}"

    def _start_decoding(self, state: _RequestState, request) -> None:
        state.decodes = True
        try:
            state.handle = compactions.handle_to_decode(request, state.options, self._wall_clock())
            if obstacle := self._decoding_obstacle():
                raise HandleError(obstacle)
        except HandleError as error:
            self._fail(state, request, str(error))
            return
        if state.handle.ragged:
            self._ragged[request.request_id] = state
        blocks = -(-state.handle.slots // self._geometry.block_tokens)
        state.joined = (blocks, state.handle.slot_hashes(blocks, self._hash_bytes))

    def _match_handle(self, state: _RequestState, request, local_tokens: int) -> tuple[int | None, bool]:
        """All of the cache's slots or none: what is not claimed would be computed from placeholders."""
        handle, now = state.handle, self._clock()
        reason = state.doomed
        if not reason and state.failed:
            reason = "its load failed"
        reason = reason or self._decoding_obstacle()
        if not reason and handle.ragged and state.pages is None:
            known, reason = self._learn_pages(state, now)
            if not known:
                return None, False
        if not reason and local_tokens >= handle.slots:
            self._release(state)
            return 0, False
        if not reason:
            if state.answer is not None and (state.answer[0], state.answer[2]) == (local_tokens, self._client.session_count):
                return state.answer[4]
            limit = state.joined[0] * self._geometry.block_tokens
            known, found, missing = self._find(state, request, local_tokens, limit, now)
            if not known:
                return None, False
            if found < limit:
                reason = f"it is not stored, or not any more: {missing or 'not found'}"
            if handle.expires_at <= self._wall_clock():
                reason = "the handle has expired"
        if reason:
            self._fail(state, request, reason)
            return None, False
        state.answered_local = local_tokens
        answer = (handle.slots - local_tokens, True)
        state.answer = (local_tokens, 0, self._client.session_count, now, answer)
        return answer

    def _learn_pages(self, state: _RequestState, now: float) -> tuple[bool, str]:
        """(known, why there are none). Not known: ask again."""
        state.first_asked = state.first_asked or now
        known, problem = self._pool_problem(state, now)
        if not known or problem:
            return known, f"this engine gives all layers the same slots: {problem}"
        if state.asked is None:
            if not self._ready():
                return now - state.first_asked >= self._setup_seconds, "no daemon"
            state.asked = self._asking.submit(self._client.compaction, state.handle.text, 0)
        if not state.asked.done():
            return False, ""
        try:
            state.pages = compactions.layer_pages(state.handle, state.asked.result(), self._geometry)
        except HandleError as error:
            return True, str(error)
        return True, ""

    def _pool_problem(self, state: _RequestState, now: float) -> tuple[bool, str]:
        """(known, why this engine cannot read ragged caches). Not known: ask again."""
        if not compat.offers_block_tables():
            return True, "this vLLM does not show its connector the requests' blocks"
        if len(self._no_pool) < self._geometry.ranks:  # they tell with their first step
            return now - state.first_asked >= self._setup_seconds, "the workers have not said whether they can do else"
        return True, next(filter(None, self._no_pool.values()), "")

    def _plan_ragged(self, metadata: KvernMetadata, scheduler_output) -> None:
        """Tells the workers of every ragged request that runs: without its layers' tables it would read other pages than
        its own. One that cannot be described fails the step."""
        for request_id, state in self._ragged.items():
            if request_id not in scheduler_output.num_scheduled_tokens:
                continue
            try:
                ((first_block, *_),) = compat.block_tables(scheduler_output, request_id)
            except Exception:
                self.errors += 1
                first_block = -1
            metadata.ragged.append(RaggedOrder(first_block, state.pages or ()))

    def _fail(self, state: _RequestState, request, reason: str) -> None:
        if not state.doomed:
            name = f"the compact cache {state.handle.short}" if state.handle is not None else "a compact cache"
            logger.warning("Kvern: request %s fails: it decodes from %s, and %s.", request.request_id, name, reason)
            self._recorder.count("handles_failed", label=_label(reason))
        state.doomed = reason
        self._release(state)
        compat.fail_request(request, reason)

    # ---------------------------------------------------------------- compact caches: making one

    def _start_making(self, state: _RequestState, request) -> None:
        try:
            if not self._may_store or self._refused:
                raise ValueError(self._refused or "this engine does not store")
            state.making = compactions.plan_making(request, state.options, self._geometry, self._plan_compaction)
            self._makings[request.request_id] = state
        except ValueError as error:
            self._refuse_making(state, str(error))

    def _refuse_making(self, state: _RequestState, reason: str) -> None:
        state.making, state.refusal = None, reason
        self._makings.pop(state.request.request_id, None)
        self._recorder.count("compactions_refused", label=_label(reason))

    def _knows_layout(self, state: _RequestState, request) -> bool:
        """Whether it is settled that the layers of the cache differ, or that they do not; False: ask again."""
        if not state.making.ragged:
            return True
        now = self._clock()
        state.first_asked = state.first_asked or now
        known, problem = self._pool_problem(state, now)
        if known and problem:
            log_once(logging.INFO, "Kvern: compact caches get the same slots for all layers: %s.", problem)
            self._plan_anew(state, request)
        return known

    def _plan_anew(self, state: _RequestState, request) -> None:
        try:
            state.making = compactions.plan_making(
                request, state.options, self._geometry, self._plan_compaction, can_be_ragged=False
            )
        except ValueError as error:
            self._refuse_making(state, str(error))

    def _leaves_queries(self, state: _RequestState, request, local_tokens: int) -> bool:
        """Whether the queries that the method reads will be computed here; False: ask again. A local prefix hit cannot be
        shortened, so one that leaves too little is passed over as a whole; what the store has is loaded up to there."""
        making = state.making
        if making.skip_local:
            request.skip_reading_prefix_cache = False
        if not making.query_rows:
            return True
        now = self._clock()
        state.first_asked = state.first_asked or now
        if len(self._no_capture) < self._geometry.ranks:  # they tell with their first step
            if now - state.first_asked < self._setup_seconds:
                return False
            self._refuse_making(state, "the workers have not said whether they can capture queries")
            return True
        problem = next(filter(None, self._no_capture.values()), "")
        if problem:
            self._refuse_making(state, f"queries cannot be captured on this engine: {problem}")
            return True
        if making.prompt_tokens - local_tokens < making.query_rows:
            making.skip_local = True
            return False
        return True

    def _plan_makings(self, metadata: KvernMetadata, scheduler_output, own_tables: bool) -> None:
        for request_id, state in list(self._makings.items()):
            scheduled = scheduler_output.num_scheduled_tokens.get(request_id)
            tables = state.tables if own_tables else None
            if scheduled and tables is None:
                tables = compat.block_tables(scheduler_output, request_id)
            if tables is not None and scheduled:
                self._plan_making(metadata, state, scheduled, tables[0])

    @guarded()
    def _plan_making(self, metadata: KvernMetadata, state: _RequestState, scheduled: int, table: list[int]) -> None:
        request, making = state.request, state.making
        if state.stale:
            self._refuse_making(state, "the engine's cache was reset while the prompt was computed")
            return
        begin = request.num_computed_tokens
        end = begin + scheduled
        first = making.prompt_tokens - making.query_rows
        if making.query_rows and first < end and begin < making.prompt_tokens:
            last_block = table[(end - 1) // self._geometry.block_tokens]
            metadata.captures.append(CaptureOrder(request.request_id, begin, end, last_block, first, making.query_rows))
        if end >= making.prompt_tokens:
            self._order_compaction(metadata, state, table)

    def _order_compaction(self, metadata: KvernMetadata, state: _RequestState, table: list[int]) -> None:
        """Stores the whole prompt once more, under names that only the handle gives, for the daemon to make the cache of.
        Where something stands in the way now, the same is due again in the next step."""
        request, making, group = state.request, state.making, self._geometry.groups[0]
        namespace = self._registered_namespace(request)
        if namespace is None:
            making.obstacle = "the daemon was not there when the prompt had been computed"
            return
        if not self._holds.has_room(PageHolds.MAX_SHARE_COMPACT):
            making.obstacle = "too many blocks waited to be stored when the prompt had been computed"
            self._recorder.count("stores_deferred")
            return
        blocks = -(-making.prompt_tokens // group.block_tokens)
        block_ids = list(table[:blocks])
        expires_at = int(self._wall_clock()) + making.ttl_seconds
        prompt = request.all_token_ids[: making.prompt_tokens]
        handle = Handle.make(prompt, making.slots, expires_at, making.ragged)
        size = self._hash_bytes
        hashes = handle.source_hashes(blocks, size)
        chunks = []
        for first in range(0, blocks, group.chunk_blocks):
            last = min(first + group.chunk_blocks, blocks)
            previous = hashes[(first - 1) * size : first * size] if first else b""
            chunks.append((hashes[first * size : last * size], block_ids[first:last], first * group.block_tokens, previous))
        store, job = next(self._jobs), next(self._jobs)
        self._holds.take(store, block_ids)
        self._stores[store] = _Store(state, namespace, group.index, [0] * len(chunks), None)
        metadata.stores.append(StoreOrder(store, namespace.key, group.index, "raw", size, chunks, state.traceparent))
        metadata.compactions.append(
            CompactOrder(
                job=job,
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
        del self._makings[request.request_id]

    def _told_of_making(self, state: _RequestState) -> dict:
        making = state.making
        if making is None or making.handle is None:
            return {"state": "refused", "reason": state.refusal or self._refused or making.obstacle}
        return {
            "state": "pending",
            "handle": making.handle.text,
            "prompt_tokens": making.prompt_tokens,
            "slots": making.slots,
            "method": making.spec,
            "expires_at": making.handle.expires_at,
        }

    # ---------------------------------------------------------------- results

    @guarded()
    def update_connector_output(self, output) -> None:
        failed = set(getattr(output, "failed_recving", None) or ())
        invalid = getattr(output, "invalid_block_ids", None)
        if invalid:  # older vLLM: failures are told per block
            failed |= {r for r, s in self._loads.items() if not invalid.isdisjoint(s.load_blocks)}
        for request_id in failed:
            state = self._loads.get(request_id)
            if state is not None:
                state.failed = True
        for request_id in output.finished_recving or ():
            self._load_ended(request_id)
        reports = getattr(output, "kv_connector_worker_meta", None)
        if reports is not None:
            for rank, report in reports.reports.items():
                if report.refusal:
                    self.refuse(report.refusal)
                if report.no_capture is not None:
                    self._no_capture[rank] = report.no_capture
                if report.no_pool is not None:
                    self._no_pool[rank] = report.no_pool
                for job in report.gathered:
                    self._holds.gathered(job, rank)
                for job, chunks in report.stored.items():
                    self._store_ended(job, rank, chunks)

    def _store_ended(self, job: int, rank: int, chunks: list[int]) -> None:
        store = self._stores.get(job)
        if store is None:
            return
        store.ranks[rank] = set(chunks)
        if len(store.ranks) < self._geometry.ranks:
            return
        del self._stores[job]
        stored = set.intersection(*store.ranks.values())
        if store.group == 0:  # the tokens are the same in every group
            store.state.stored_tokens += sum(store.chunk_tokens[chunk] for chunk in stored)
        if store.hashes:
            self._retain(store.state, store.namespace, store.group, b"".join(store.hashes[c] for c in sorted(stored)))
        if self._events is not None and store.notes is not None:
            namespace_id = self._client.namespace_id(store.namespace.handle)
            if namespace_id is not None:
                for chunk in sorted(stored):
                    self._events.stored(namespace_id, store.notes[chunk])

    @guarded((False, None))
    def request_finished(self, request, block_ids) -> tuple[bool, dict | None]:
        """Never keeps the request's blocks: stores have references of their own, and vLLM itself keeps the blocks of a
        load that is under way until the workers report its end."""
        state = self._states.get(request.request_id)
        if state is None:
            return False, None
        state.finished = True
        if not state.loading:
            del self._states[request.request_id]
        self._release(state)
        if state.lookup is not None:
            state.lookup.end(reason="the request ended before the answer")
        self._makings.pop(request.request_id, None)
        self._ragged.pop(request.request_id, None)
        if not state.options.asked:
            return False, None
        answer = {"hit_tokens": state.hit_tokens, "stored_tokens": state.stored_tokens}
        if state.making is not None or state.refusal:
            answer["compact"] = self._told_of_making(state)
        return False, {"kvern": answer}

    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping until its stores have ended: their reports come with steps alone."""
        return self._holds.jobs > 0 or bool(self._stores)

    @guarded(False)
    def has_pending_block_frees(self) -> bool:
        return self._holds.frees_soon()

    @guarded(True)
    def reset_cache(self) -> bool:
        """The engine's weights may be others from now on: it leaves its namespace for a new one of its own. What others
        share is not touched."""
        self._epoch += 1
        self._epoch_name = uuid.uuid4().hex
        for state in self._states.values():
            state.stale = state.request.num_computed_tokens > 0 or state.loading
            state.answer = None
            self._release(state)
        if self._events is not None:
            self._events.clear()
        self._namespace_of(None)
        return True

    @guarded(())
    def take_events(self):
        if self._events is None:
            return ()
        lost, removed = self._client.take_removed()
        for namespace_id, group, hashes, _ in removed:
            self._events.removed(namespace_id, group, hashes)
        if lost or self._client.session_count != self._sessions:
            if self._sessions or lost:
                self._snapshots_due = collections.deque(self._namespaces.values())
                self._client.request_snapshot(self._snapshots_due[0].handle)
            self._sessions = self._client.session_count
        if self._snapshots_due and (answer := self._client.take_snapshot()) is not None:
            handle, chunks = answer
            namespace_id = self._client.namespace_id(handle)
            if handle == self._snapshots_due[0].handle and namespace_id is not None:
                self._events.snapshot(namespace_id, [(group, hashes) for group, hashes, _ in chunks])
                self._snapshots_due.popleft()
            if self._snapshots_due:
                self._client.request_snapshot(self._snapshots_due[0].handle)
        return self._events.take()

    @guarded()
    def take_stats(self):
        if self.errors != self._reported_errors:
            self._recorder.count("callback_errors", self.errors - self._reported_errors)
            self._reported_errors = self.errors
        self._recorder.gauge("jobs_in_flight", len(self._stores) + len(self._loads))
        self._recorder.gauge("held_blocks", self._holds.blocks)
        self._recorder.gauge("connected", int(self._client.state == "ready"))
        return self._recorder.take()

    @guarded()
    def shutdown(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._asking.shutdown(wait=False, cancel_futures=True)
        self._client.close()


def _label(reason: str) -> str:
    """Of a metric: numbers would make one for each request."""
    return re.sub(r"\d+", "N", reason.split(":")[0])[:60]
