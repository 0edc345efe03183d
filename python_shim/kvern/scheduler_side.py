"""The half of the connector that lives beside vLLM's scheduler: looks prompts up, plans loads and stores."""

import collections
import concurrent.futures
import itertools
import logging
import time
import uuid

from kvern import compactions, compat, identity, tracing
from kvern.abilities import Abilities
from kvern.compact_decoding import CompactDecoding
from kvern.compact_making import CompactMaking
from kvern.config import Options, RequestOptions
from kvern.events import ChunkNote, EventLog, note_chunk
from kvern.groups import Geometry, Group
from kvern.guard import guarded, log_once, logger
from kvern.metadata import KvernMetadata, LoadOrder, StoreOrder
from kvern.page_holds import PageHolds
from kvern.request_state import RequestState
from kvern.stats import Recorder

# An answer stands this long before a waiting request is looked up again; vLLM asks once per step.
RECHECK_SECONDS = 0.1


class _Namespace:
    """One set of facts, registered with the daemon."""

    def __init__(self, key: int, facts: dict[str, str], handle: int):
        self.key = key
        self.facts = facts
        self.handle = handle


class _Store:
    """A store job until every rank has told its end. notes: what to announce of each chunk, if anything."""

    def __init__(self, state: RequestState, namespace: _Namespace, group: int, chunk_tokens: list[int], notes):
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
        connectors_before: int = 0,
        clock=time.monotonic,
        wall_clock=time.time,
    ):
        """client, matcher: of the native binding, or anything that behaves like them. weights: their fingerprint.
        hash_block_tokens: tokens that one entry of request.block_hashes stands for. plan_compaction: of the native
        binding. connectors_before: others that vLLM asks first. wall_clock: unix seconds."""
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
        self._states: dict[str, RequestState] = {}
        self._namespaces: dict[tuple[int, str], _Namespace] = {}
        self._announce: list[_Namespace] = []
        self._base_facts: dict[str, str] | None = None
        self._epoch = 0
        self._epoch_name = ""
        self._hash_ratio = geometry.block_tokens // hash_block_tokens
        self._hash_bytes = compat.hash_bytes(str(vllm_config.cache_config.prefix_caching_hash_algo))
        self._connectors_before = connectors_before
        self._jobs = itertools.count(1)
        self._loads_due: list[LoadOrder] = []
        self._loads: dict[str, RequestState] = {}
        self._stores: dict[int, _Store] = {}
        self._holds = PageHolds(geometry.ranks, clock)
        self._recorder = Recorder()
        self._reported_errors = 0
        self._sessions = 0
        self._connected = False
        self._said_absent = False
        self._abilities = Abilities(geometry.ranks, self._setup_seconds, clock)
        self._making = CompactMaking(
            geometry,
            self._abilities,
            self._holds,
            self._recorder,
            self._jobs,
            plan_compaction=plan_compaction,
            hash_bytes=self._hash_bytes,
            obstacle=self._storing_obstacle,
            namespace_of=self._registered_namespace,
            open_store=self._open_store,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._decoding = CompactDecoding(
            client,
            geometry,
            self._abilities,
            self._recorder,
            rewrites=options.rewrite,
            hash_bytes=self._hash_bytes,
            obstacle=self._decoding_obstacle,
            ready=self._ready,
            namespace=self._namespace_of,
            find=self._find,
            release=self._release,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvern-digest")
        self._adapters = identity.AdapterDigests(self._executor, wall_clock())
        identity.watch_loads(self._adapters)
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

    @property
    def all_errors(self) -> int:
        return self.errors + self._making.errors

    def refuse(self, reason: str) -> None:
        if not self._refused:
            self._refused = reason
            log_once(logging.WARNING, "Kvern: this engine runs without the store: %s.", reason)

    def _storing_obstacle(self) -> str:
        """Why this engine stores nothing."""
        return self._refused or ("" if self._may_store else "this engine does not store")

    def _decoding_obstacle(self) -> str:
        """Why no request of this engine can decode from a compact cache."""
        if not self._may_load:
            return "this engine does not load (kv_role)"
        fails_on_its_own = self._vllm_config.kv_transfer_config.kv_load_failure_policy == "fail"
        if not compat.can_fail_requests() and not fails_on_its_own:
            return "on this vLLM compact caches need kv_load_failure_policy 'fail'"
        if self._connectors_before:
            return "vLLM would take placeholders from a connector that MultiConnector asks first; name KvernConnector first"
        return self._refused and f"this engine runs without the store: {self._refused}"

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

    def _state_of(self, request, new: bool = False) -> RequestState:
        """new: the request is being admitted."""
        state = self._states.get(request.request_id)
        if state is None:
            options = RequestOptions.from_request(getattr(request, "kv_transfer_params", None), self._options.compact)
            if options.problem:
                log_once(logging.WARNING, "Kvern: %s.", options.problem)
            if options.rewrite and options.handle is not None and not compactions.names_handle(request, options):
                self._decoding.rewrite(request, options, new)
            state = RequestState(request, options, len(self._geometry.groups))
            self._states[request.request_id] = state
            if compactions.names_handle(request, options):
                self._decoding.start(state, request)
            elif options.compact:
                self._making.start(state, request)
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
            return self._decoding.match(state, request, local_tokens)
        if state.making is None:
            return self._match(state, request, local_tokens)
        answer = None, False
        if self._making.may_match(state, request, local_tokens):
            answer = self._match(state, request, local_tokens)
        if answer[0] is None:
            self._making.put_off(state, request)
        return answer

    def _match(self, state: RequestState, request, local_tokens: int) -> tuple[int | None, bool]:
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

    def _wants_load(self, state: RequestState, request) -> bool:
        return (
            self._may_load
            and not self._refused
            and state.options.load
            and not state.failed
            and not state.loading
            and not getattr(request, "skip_reading_prefix_cache", False)
        )

    def _find(
        self, state, request, local_tokens: int, limit: int, now: float, patience_ms: int = 0
    ) -> tuple[bool, int, str]:
        """(known, leading tokens that are stored, why not more). Not known: ask again. limit: whole blocks. patience_ms:
        for who has nothing without them."""
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
            patience_ms,
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

    def _joined_hashes(self, state: RequestState, request) -> bytes:
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

    def _release(self, state: RequestState) -> None:
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

    def _start_load(self, state: RequestState, order: LoadOrder) -> None:
        state.loading = True
        self._loads[order.request] = state
        self._loads_due.append(order)

    @guarded()
    def _retain_hits(self, state: RequestState, request) -> None:
        """Of the whole prompt: what is stored of it is what it hits, and the rest is passed over."""
        namespace = self._registered_namespace(request)
        if namespace is not None and not state.decodes:
            hashes = self._joined_hashes(state, request)
            for group in self._geometry.groups:
                self._retain(state, namespace, group.index, hashes)

    def _retain(self, state: RequestState, namespace: _Namespace, group: int, hashes: bytes) -> None:
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
            self._decoding.passed_over(state)
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
        self._making.begin_step()
        self.errors += self._decoding.plan_step(metadata, scheduler_output)
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
        self._making.plan_step(metadata, scheduler_output, own_tables)

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
    def _plan_stores(self, metadata, scheduler_output, state: RequestState, scheduled: int, own_tables: bool) -> None:
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
        codec = state.options.codec or self._options.codec
        job = self._open_store(metadata, state, namespace, group, codec, chunks, tokens, notes)
        if state.options.retain_seconds:
            self._stores[job].hashes = [chunk[0] for chunk in chunks]

    def _open_store(self, metadata, state, namespace: _Namespace, group: Group, codec: str, chunks, tokens, notes) -> int:
        """chunks: as in StoreOrder; tokens: of each, that count as stored; notes: see _Store."""
        job = next(self._jobs)
        self._holds.take(job, [block for chunk in chunks for block in chunk[1]])
        self._stores[job] = _Store(state, namespace, group.index, tokens, notes)
        metadata.stores.append(
            StoreOrder(job, namespace.key, group.index, codec, self._hash_bytes, chunks, state.traceparent)
        )
        return job

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
                self._abilities.take(rank, report)
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
        compact = self._making.end(state)
        self._decoding.ended(request.request_id)
        if not state.options.asked:
            return False, None
        answer = {"hit_tokens": state.hit_tokens, "stored_tokens": state.stored_tokens}
        if compact is not None:
            answer["compact"] = compact
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
            handle, chunks, complete = answer
            namespace_id = self._client.namespace_id(handle)
            if handle == self._snapshots_due[0].handle and namespace_id is not None:
                self._events.snapshot(namespace_id, [(group, hashes) for group, hashes, _ in chunks], complete)
                self._snapshots_due.popleft()
            if self._snapshots_due:
                self._client.request_snapshot(self._snapshots_due[0].handle)
        return self._events.take()

    @guarded()
    def take_stats(self):
        if self.all_errors != self._reported_errors:
            self._recorder.count("callback_errors", self.all_errors - self._reported_errors)
            self._reported_errors = self.all_errors
        self._recorder.gauge("jobs_in_flight", len(self._stores) + len(self._loads))
        self._recorder.gauge("held_blocks", self._holds.blocks)
        self._recorder.gauge("connected", int(self._client.state == "ready"))
        return self._recorder.take()

    @guarded()
    def shutdown(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._decoding.shutdown()
        self._client.close()
