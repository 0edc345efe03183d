"""What the two sides of the connector send each other. vLLM pickles these objects every step: plain types only."""

import dataclasses
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvern import compat


@dataclasses.dataclass
class LoadOrder:
    job: int
    request: str
    namespace: int  # key in KvernMetadata.namespaces, now or earlier; -1: nothing can be loaded, report a failure
    hash_bytes: int
    pieces: list[tuple[int, int, bytes, list[int]]]  # (group, blocks_before, hashes, block_ids), see _kvern.pyi
    traceparent: str = ""  # of the request


@dataclasses.dataclass
class StoreOrder:
    job: int
    namespace: int
    group: int
    codec: str
    hash_bytes: int
    chunks: list[tuple[bytes, list[int], int, bytes]]  # (hashes, block_ids, position, previous), see _kvern.pyi
    traceparent: str = ""  # of the request


@dataclasses.dataclass
class CaptureOrder:
    """Of one step: the request's tokens [begin, end) are computed, and the queries of those in [first, first + rows) are
    wanted."""

    request: str
    begin: int
    end: int
    last_block: int  # of token end - 1
    first: int
    rows: int


RAGGED_LAYOUTS = ("pool", "shift")  # the better one first


class RaggedSlots(NamedTuple):
    """Of a compact cache whose layers keep different numbers of pages."""

    layout: str
    blocks: int  # that a request claims
    pages: tuple[int, ...]  # of each layer


class RaggedOrder(NamedTuple):
    """Of one step: a request that it runs decodes from a ragged compact cache."""

    first_block: int  # which no other request has, but those with the same cache; -1: not known, and the step must fail
    slots: RaggedSlots


@dataclasses.dataclass
class CompactOrder:
    """The daemon is to make a compact cache of a prompt, once the store job has ended."""

    job: int
    store_job: int
    request: str
    namespace: int
    group: int
    handle: str
    spec: str  # canonical
    prompt_tokens: int
    slots: int
    expires_at: int
    query_rows: int
    hash_bytes: int
    source_hashes: bytes
    slot_hashes: bytes
    traceparent: str = ""  # of the request


@dataclasses.dataclass
class KvernMetadata(KVConnectorMetadata):
    """Scheduler side to every worker, once per step."""

    namespaces: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    loads: list[LoadOrder] = dataclasses.field(default_factory=list)
    stores: list[StoreOrder] = dataclasses.field(default_factory=list)
    captures: list[CaptureOrder] = dataclasses.field(default_factory=list)
    compactions: list[CompactOrder] = dataclasses.field(default_factory=list)
    ragged: list[RaggedOrder] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RankReport:
    """What one rank has finished since its last report."""

    gathered: list[int] = dataclasses.field(default_factory=list)  # jobs whose pages are not read any more
    stored: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # job -> chunks that others can read
    refusal: str = ""  # why this rank can neither load nor store, ever
    no_capture: str | None = None  # once: why this rank cannot capture queries; "": it can
    no_moving: str | None = None  # once: why keys of this model cannot be moved to other positions; "": they can
    no_layout: dict[str, str] | None = None  # once: layout -> why this rank cannot read such compact caches; "": it can


class KvernWorkerMetadata(compat.WorkerMetadataBase):
    """Workers to the scheduler side. vLLM adds the ranks' objects up, in no particular order."""

    def __init__(self, reports: dict[int, RankReport]):
        self.reports = reports

    def aggregate(self, other: "KvernWorkerMetadata") -> "KvernWorkerMetadata":
        return KvernWorkerMetadata({**self.reports, **other.reports})
