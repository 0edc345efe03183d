"""The half of the connector that lives in each worker: hands pages to the native transfer threads and reports back."""

import collections
import dataclasses
import logging
import time

import torch

from kvern import compat, layout, tracing
from kvern.capture import QueryCapture
from kvern.config import Options
from kvern.groups import Geometry, Group, Refused
from kvern.guard import guarded, log_once
from kvern.metadata import (
    RAGGED_LAYOUTS,
    CompactOrder,
    KvernMetadata,
    KvernWorkerMetadata,
    LoadOrder,
    RankReport,
    StoreOrder,
)
from kvern.ragged_attention import RaggedAttention
from kvern.rotation_check import Observed, RotationCheck
from kvern.stats import Recorder

# Orders wait this long for their namespace to be registered with the daemon.
NAMESPACE_SECONDS = 10.0
SHUTDOWN_DRAIN_MS = 2000


@dataclasses.dataclass
class _Waiting:
    order: LoadOrder | StoreOrder
    until: float


class WorkerSide:
    def __init__(
        self,
        geometry: Geometry,
        options: Options,
        native,
        client,
        tensor_rank: int,
        pipeline_rank: int,
        *,
        refusal: str = "",
    ):
        """native: the module kvern._kvern, or anything that behaves like it. With a refusal both it and client are None,
        and every order gets a negative answer."""
        self.errors = 0
        self._geometry = geometry
        self._options = options
        self._native = native
        self._client = client
        self._tensor_rank = tensor_rank
        self.rank = pipeline_rank * geometry.tensor_parallel + tensor_rank
        self._writes = geometry.writes(tensor_rank)
        self._transfer = None
        self._refusal = refusal or "vLLM has registered no KV cache"
        self._refusal_told = False
        self._handles: dict[int, int] = {}
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._stores_due: list[StoreOrder] = []
        self._compactions_due: list[CompactOrder] = []
        self._loads: dict[int, LoadOrder] = {}
        self._stores: dict[int, StoreOrder] = {}
        self._capture: QueryCapture | None = None
        self._ragged: RaggedAttention | None = None
        self._no_moving = "this worker has not tested how the model turns its keys"
        self._abilities_told = False
        self._compactions: dict[int, tuple[CompactOrder, list]] = {}  # store job -> what waits for its end
        self._compacting: dict[int, list] = {}  # job -> queries that the native side may still read
        self._on_device = False
        # CUDA events by job: what was queued on the engine's stream when the job was handed over. The native threads
        # wait for them before the pages are touched, so they live until the job is done with the pages.
        self._ready: dict[int, object] = {}
        self._spans: dict[int, tracing.Span] = {}  # by job
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._report = RankReport()
        self._recorder = Recorder()
        self._reported_errors = 0

    # ---------------------------------------------------------------- set-up

    def _cannot_register(self, kv_caches, attention_layers, vllm_config) -> None:
        self._refuse("its KV cache could not be registered")

    @guarded(_cannot_register)
    def register_kv_caches(self, kv_caches: dict, attention_layers: dict, vllm_config) -> None:
        if self._client is None:
            return
        try:
            layouts = layout.describe(self._geometry, kv_caches, attention_layers)
            transfer = self._native.TransferWorker(
                self._client,
                threads=self._options.worker_threads(),
                load_timeout_ms=self._options.load_timeout_ms,
                store_timeout_ms=self._options.store_timeout_ms,
            )
            for group, found in zip(self._geometry.groups, layouts):
                transfer.register_group(
                    group=group.index,
                    packing=found.packing,
                    dtype=group.dtype,
                    block_tokens=group.block_tokens,
                    pages_per_block=found.pages_per_block,
                    heads=group.heads,
                    head_begin=self._geometry.head_begin(group, self._tensor_rank),
                    model_heads=group.model_heads,
                    layer_begin=group.layer_begin,
                    group_layers=group.group_layers,
                    key_dim=group.key_dim,
                    value_dim=group.value_dim,
                    layers=found.layers,
                    on_device=found.on_device,
                )
            self._on_device = any(found.on_device for found in layouts)
        except (Refused, ValueError) as refusal:
            self._refuse(str(refusal))
            return
        self._transfer, self._refusal = transfer, ""
        self._capture = QueryCapture(self._geometry, kv_caches, attention_layers, vllm_config)
        self._ragged = RaggedAttention(
            self._geometry, kv_caches, attention_layers, vllm_config, self._native.slot_pages
        )

    @guarded()
    def test_ragged(self, run_step) -> None:
        """run_step: see RaggedAttention.self_test()."""
        if self._ragged is not None:
            self._ragged.self_test(run_step)
            self._client.describe("query_capture", self._capture.problem or "self-test passed")
            self._client.describe("layer_budgets", self._ragged.verdict)

    @property
    def rotated_group(self) -> Group | None:
        """Whose keys compact caches move; models with several groups have no compact caches."""
        return self._geometry.groups[0] if len(self._geometry.groups) == 1 else None

    @guarded()
    def test_rotation(self, observed: Observed) -> None:
        if self._transfer is None:
            return
        if self.rotated_group is None:
            self._no_moving = ""  # there is another reason
            return
        check = RotationCheck(observed, self._native.rotation_frequencies)
        trusted = bool(check.problem) and not check.certain and self._options.trust_rotation
        if trusted:
            log_once(logging.WARNING, "Kvern: %s; kvern.trust_rotation is set, and compact caches are made.", check.problem)
        else:
            check.log()
        self._no_moving = "" if trusted or not check.problem else check.refusal
        verdict = "not tested, but trusted" if trusted else check.problem or "keys turn as configured, self-test passed"
        self._client.describe("key_rotation", verdict)

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        log_once(logging.WARNING, "Kvern: this worker neither loads nor stores: %s.", reason)

    # ---------------------------------------------------------------- a step

    @guarded()
    def bind(self, metadata: KvernMetadata) -> None:
        if self._ragged is not None:
            self._ragged.begin_step(metadata.ragged)
        # Stores wait for the end of the forward pass: only then are the pages complete.
        self._stores_due += metadata.stores
        if self._capture is not None:
            self._capture.begin_step(metadata.captures)
        self._compactions_due += metadata.compactions
        for key, facts in metadata.namespaces.items():
            if key not in self._handles and self._client is not None:
                self._handles[key] = self._client.add_namespace(facts)

    @property
    def ragged(self) -> RaggedAttention | None:
        """Where this step runs requests that decode from ragged compact caches, who gives the layers their tables."""
        return self._ragged if self._ragged is not None and self._ragged.active else None

    def submit_loads(self, metadata: KvernMetadata) -> None:
        for order in metadata.loads:
            self._submit(order)

    def submit_stores(self) -> None:
        due, self._stores_due = self._stores_due, []
        compactions, self._compactions_due = self._compactions_due, []
        for order in compactions:
            self._take_queries(order)
        for order in due:
            self._submit(order)

    @guarded()
    def _take_queries(self, order: CompactOrder) -> None:
        """The forward pass that captured the last of them has just ended; the request may be gone with this step."""
        queries = []
        if order.query_rows and self._capture is not None:
            queries = self._capture.take(order.request, getattr(torch, self._geometry.groups[order.group].dtype))
        self._compactions[order.store_job] = (order, queries)

    @guarded()
    def _compact(self, store_job: int) -> None:
        """Hands a prompt over whose blocks are with the daemon. Where some are not, or queries are missing, the daemon
        fails the cache and keeps the reason for those who ask for it."""
        waiting = self._compactions.pop(store_job, None)
        if waiting is None or self._transfer is None:
            return
        order, queries = waiting
        self._compacting[order.job] = queries
        self._transfer.submit_compaction(
            job=order.job,
            namespace=self._handles[order.namespace],
            handle=order.handle,
            spec=order.spec,
            group=order.group,
            prompt_tokens=order.prompt_tokens,
            slots=order.slots,
            expires_at=order.expires_at,
            hash_bytes=order.hash_bytes,
            source_hashes=order.source_hashes,
            slot_hashes=order.slot_hashes,
            query_rows=order.query_rows,
            query_heads=queries[0].shape[1] if queries else 0,
            queries=[_bytes_of(layer) for layer in queries],
            traceparent=order.traceparent,
        )

    def _drop(self, order: LoadOrder | StoreOrder, until: float | None = None) -> None:
        """Gives the order the end that vLLM waits for."""
        self._ready.pop(order.job, None)
        self._end_span(order.job, error=self._why())
        if isinstance(order, LoadOrder):
            self._loads.pop(order.job, None)
            self._load_ended(order, failed=True)
            self._recorder.count("load_failures", label=self._why())
        else:
            self._stores.pop(order.job, None)
            self._report.gathered.append(order.job)
            self._report.stored[order.job] = []
            self._recorder.count("store_failures", label=self._why())
            self._compact(order.job)

    def _why(self) -> str:
        return "worker refused" if self._refusal else "namespace not registered"

    @guarded(_drop)
    def _submit(self, order: LoadOrder | StoreOrder, until: float | None = None) -> None:
        if isinstance(order, StoreOrder) and not self._writes:
            # Another rank holds the same heads, stores them, and asks for what is to be made of them.
            self._compactions.pop(order.job, None)
            self._report.gathered.append(order.job)
            self._report.stored[order.job] = list(range(len(order.chunks)))
            return
        handle = self._handles.get(order.namespace)
        if self._transfer is None or handle is None:
            self._drop(order)
            return
        if self._client.namespace_id(handle) is None:
            now = time.monotonic()
            until = until or now + NAMESPACE_SECONDS
            if now >= until or self._client.namespace_refusal(handle):
                self._drop(order)
            else:
                self._waiting.append(_Waiting(order, until))
            return
        if isinstance(order, LoadOrder):
            self._loads[order.job] = order
            self._transfer.submit_load(
                order.job,
                handle,
                order.hash_bytes,
                order.pieces,
                self._ready_event(order.job),
                self._begin_span("kvern.load", order),
            )
        else:
            self._stores[order.job] = order
            self._transfer.submit_store(
                order.job,
                handle,
                order.group,
                order.codec,
                order.hash_bytes,
                order.chunks,
                self._ready_event(order.job),
                self._begin_span("kvern.store", order),
            )

    def _begin_span(self, name: str, order: LoadOrder | StoreOrder) -> str:
        """The traceparent for those who work on the order."""
        span = tracing.begin(name, order.traceparent, rank=self.rank)
        if order.traceparent:
            self._spans[order.job] = span
        return span.traceparent

    def _end_span(self, job: int, **facts) -> None:
        span = self._spans.pop(job, None)
        if span is not None:
            span.end(**facts)

    def _ready_event(self, job: int) -> int:
        """An event after all that the engine has queued so far; 0 where its pages are in host memory."""
        if not self._on_device:
            return 0
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._ready[job] = event
        return event.cuda_event

    @guarded()
    def poll(self) -> None:
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            self._submit(waiting.order, waiting.until)
        if self._transfer is None:
            return
        for job, event, chunks, reason, seconds, raw_bytes, encoded_bytes in self._transfer.poll():
            if event in ("loaded", "load_failed", "gathered"):
                self._ready.pop(job, None)
            if event in ("loaded", "load_failed"):
                order = self._loads.pop(job, None)
                failure = "" if event == "loaded" else reason
                self._end_span(job, seconds=seconds, error=failure, raw_bytes=raw_bytes, encoded_bytes=encoded_bytes)
                if order is not None:  # each load ends once, whatever the native side says
                    self._count_load(event, reason, seconds, raw_bytes, encoded_bytes)
                    self._load_ended(order, failed=event != "loaded")
            elif event == "gathered" and job in self._stores:
                self._report.gathered.append(job)
            elif event == "stored":
                order = self._stores.pop(job, None)
                if order is not None:
                    failure = reason if len(chunks) < len(order.chunks) else ""
                    self._end_span(job, seconds=seconds, error=failure, chunks=len(chunks), raw_bytes=raw_bytes)
                    self._report.stored[job] = list(chunks)
                    self._count_store(order, chunks, reason, seconds, raw_bytes)
                    self._compact(job)
            elif event in ("compacting", "compaction_failed") and self._compacting.pop(job, None) is not None:
                self._recorder.count("compactions")
                if event != "compacting":
                    self._recorder.count("compaction_failures", label=_short(reason))
                    log_once(logging.WARNING, "Kvern: a compact cache is not made: %s.", _short(reason))

    def _load_ended(self, order: LoadOrder, failed: bool) -> None:
        self._received.add(order.request)
        if failed:
            self._failed.add(order.request)
            self._failed_blocks.update(block for piece in order.pieces for block in piece[3] if block)

    def _count_load(self, event: str, reason: str, seconds: float, raw_bytes: int, encoded_bytes: int) -> None:
        if event != "loaded":
            self._recorder.count("load_failures", label=_short(reason))
            log_once(logging.WARNING, "Kvern: a load failed: %s.", _short(reason))
            return
        self._recorder.count("loads")
        self._recorder.count("load_bytes", raw_bytes)
        self._recorder.count("load_encoded_bytes", encoded_bytes)
        self._recorder.observe("load_seconds", seconds)

    def _count_store(self, order: StoreOrder, chunks, reason: str, seconds: float, raw_bytes: int) -> None:
        self._recorder.count("stores")
        self._recorder.count("stored_chunks", len(chunks))
        self._recorder.count("store_bytes", raw_bytes)
        self._recorder.observe("store_seconds", seconds)
        if len(chunks) < len(order.chunks):
            self._recorder.count("store_failures", label=_short(reason))
            log_once(logging.WARNING, "Kvern: some chunks were not stored: %s.", _short(reason))

    @guarded()
    def requests_ended(self, finished_requests: set[str]) -> None:
        """Those that were aborted while they wait for their load: its pages go to others as soon as it has ended."""
        if self._capture is not None and finished_requests:
            self._capture.forget(finished_requests)
        if not finished_requests or not self._loads:
            return
        for job, order in self._loads.items():
            if order.request in finished_requests:
                self._transfer.cancel_load(job)

    # ---------------------------------------------------------------- reports

    def take_transfers(self) -> tuple[set[str], set[str]]:
        """(received, of which failed). Each request is told once."""
        received, self._received = self._received, set()
        failed, self._failed = self._failed, set()
        return received, failed

    def take_failed_blocks(self) -> set[int]:
        """Of loads only for a vLLM that has no get_transfer_results(). Called once after each forward pass."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        ragged = self._ragged.end_step() if self._ragged is not None else set()
        return ragged if compat.HAS_TRANSFER_RESULTS else blocks | ragged

    @guarded()
    def take_report(self) -> KvernWorkerMetadata | None:
        report, self._report = self._report, RankReport()
        if self._refusal and not self._refusal_told:
            report.refusal, self._refusal_told = self._refusal, True
        if not self._abilities_told:
            self._abilities_told = True
            report.no_capture = self._capture.problem if self._capture is not None else "this worker has no cache to watch"
            report.no_moving = self._no_moving
            no_cache = dict.fromkeys(RAGGED_LAYOUTS, "this worker has no cache")
            report.no_layout = dict(self._ragged.problems) if self._ragged is not None else no_cache
        elif not report.gathered and not report.stored and not report.refusal:
            return None
        return KvernWorkerMetadata({self.rank: report})

    @guarded()
    def take_stats(self):
        if self.errors != self._reported_errors:
            self._recorder.count("callback_errors", self.errors - self._reported_errors)
            self._reported_errors = self.errors
        return self._recorder.take()

    @guarded()
    def shutdown(self) -> None:
        if self._transfer is not None:
            self._transfer.drain(SHUTDOWN_DRAIN_MS)
            self._transfer = None
            self._refusal = "the worker is shutting down"
        if self._client is not None:
            self._client.close()


def _bytes_of(tensor):
    """The tensor's memory as a flat buffer; NumPy does not know all of its dtypes."""
    return tensor.view(torch.uint8).reshape(-1).numpy()


def _short(reason: str) -> str:
    """A label: numbers and names of single chunks would make a metric per chunk."""
    return (reason or "unknown").split(":")[0][:60]
