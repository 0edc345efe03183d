"""The native binding's interface (python_shim/kvern/_kvern.pyi) over a store in this process.

It keeps to the contract that the connector relies on: nothing ends before poll(), every store job ends with "gathered"
and then "stored", every load with one of "loaded" and "load_failed". What ends when is the test's to say (Store.hold).
"""

import ctypes
import dataclasses
import hashlib
import re


@dataclasses.dataclass
class Chunk:
    hashes: list[bytes]
    planes: dict  # (layer, head) -> bytes of the chunk's blocks, one after the other


class Store:
    """What the daemon would hold."""

    def __init__(self):
        self.chunks: dict[tuple, Chunk] = {}  # (namespace id, group, last hash)
        self.blocks: dict[tuple, tuple] = {}  # (namespace id, group, hash) -> (key of the chunk, offset in it)
        self.removed: list = []
        self.state = "ready"
        self.refusals: dict[bytes, str] = {}
        self.registered = True  # False: namespaces stay unregistered
        self.hold = False  # True: jobs do not end
        self.fail_loads = False
        self.drop_stores = False
        self.complete_snapshots = True
        self.session_count = 1
        self.matches = 0
        self.retained: dict[tuple, int] = {}  # (namespace id, group, hash) -> seconds
        self.traceparents: list[tuple[str, str]] = []  # (kind of request, what came with it)
        self.compactions: dict[str, dict] = {}  # handle -> arguments of submit_compaction, of the last rank
        self.compaction_parts: dict[str, dict] = {}  # handle -> first head of a rank -> (its worker, arguments)

    def add(self, namespace: bytes, group: int, hashes: list[bytes], planes: dict) -> None:
        key = (namespace, group, hashes[-1])
        chunk = self.chunks.setdefault(key, Chunk(hashes, {}))
        chunk.planes.update(planes)
        for offset, block in enumerate(hashes):
            known = self.blocks.get((namespace, group, block))
            if known is None or len(self.chunks[known[0]].hashes) < len(hashes):
                self.blocks[namespace, group, block] = (key, offset)

    def has(self, namespace: bytes, group: int, block: bytes) -> bool:
        return (namespace, group, block) in self.blocks

    def groups(self) -> dict[int, int]:
        """group -> stored blocks"""
        counts: dict[int, int] = {}
        for _, group, _ in self.blocks:
            counts[group] = counts.get(group, 0) + 1
        return counts


def compaction_plan(spec, prompt_tokens, layout="rectangular", page_tokens=0):
    """streaming(slots=M) and snapkv(slots=M,window=W) stand for methods without and with queries; with `,ragged` the
    layers shall differ."""
    match = re.match(r"(streaming|snapkv)\(slots=(\d+)(?:,window=(\d+))?(,ragged)?\)", spec)
    if match is None:
        raise ValueError("compact cache: the daemon knows no such method")
    slots = min(int(match[2]), prompt_tokens)
    window = int(match[3] or 0)
    if window >= slots:
        raise ValueError(f"the budget of {slots} tokens does not hold the {window} that are always kept")
    if not match[4]:
        layout = "rectangular"
    if layout != "rectangular":
        slots = -(-slots // page_tokens) * page_tokens * (2 if layout == "shift" else 1)
    return spec.replace(" ", "").replace(",ragged", ",ragged" if layout != "rectangular" else ""), slots, window, layout


def rotation_frequencies(rotation):
    facts = dict(part.split("=") for part in rotation.split(","))
    if "scaling" in facts:
        raise ValueError("unrotate: keys turn by the length of the prompt")
    dim = int(facts["dim"])
    return facts["style"] == "interleaved", [float(facts["theta"]) ** (-2 * pair / dim) for pair in range(dim // 2)]


def slot_pages(layout, pages_of_layers, blocks):
    """As kernels/slot_pages.h has it."""
    layers = len(pages_of_layers)
    if layout == "shift" and 0 < min(pages_of_layers) and max(pages_of_layers) <= blocks:
        return [[(layer, block) for block in range(blocks - n, blocks)] for layer, n in enumerate(pages_of_layers)]
    if layout != "pool" or blocks * layers != sum(pages_of_layers) or 0 in pages_of_layers:
        raise ValueError("these pages do not fit")
    free = ((layer, block) for layer in range(layers) for block in range(pages_of_layers[layer], blocks))
    places = []
    for layer, pages in enumerate(pages_of_layers):
        own = [(layer, block) for block in range(min(pages, blocks))]
        places.append(own + [next(free) for _ in range(pages - len(own))])
    return places


class Client:
    store = None  # the test's Store

    def __init__(self, address="unix:///fake", **options):
        self.address, self.options = address, options
        self.namespaces: list[dict[str, str]] = []
        self.closed = False
        self.attributes: dict[str, str] = dict(options.get("attributes", {}))
        self.reports: list[tuple[int, int]] = []
        self._snapshots: list[int] = []

    def add_namespace(self, fields):
        assert all(isinstance(k, str) and isinstance(v, str) and v for k, v in fields.items()), fields
        assert bytes.fromhex(fields["weights"]), "kvernd takes nothing but hexadecimal digits"
        self.namespaces.append(dict(fields))
        return len(self.namespaces) - 1

    @property
    def state(self):
        return self.store.state

    @property
    def problem(self):
        return "" if self.store.state == "ready" else "the socket does not exist"

    @property
    def session_count(self):
        return self.store.session_count

    def id_of(self, handle):
        text = "\n".join(f"{k}={v}" for k, v in sorted(self.namespaces[handle].items()))
        return hashlib.sha256(text.encode()).digest()[:16]

    def namespace_id(self, handle):
        ready = self.store.state == "ready" and self.store.registered
        return self.id_of(handle) if ready and not self.namespace_refusal(handle) else None

    def namespace_refusal(self, handle):
        return self.store.refusals.get(self.id_of(handle), "")

    def take_removed(self):
        removed, self.store.removed = self.store.removed, []
        return False, removed

    def request_snapshot(self, handle):
        self._snapshots.append(handle)

    def take_snapshot(self):
        if not self._snapshots:
            return None
        handle = self._snapshots.pop(0)
        mine = self.id_of(handle)
        chunks = [(g, chunk.hashes, 0) for (n, g, _), chunk in self.store.chunks.items() if n == mine]
        return handle, chunks, self.store.complete_snapshots

    def describe(self, attribute, value):
        self.attributes[attribute] = value

    def report(self, hit_tokens, requested_tokens):
        self.reports.append((hit_tokens, requested_tokens))

    def close(self):
        self.closed = True


class PrefixMatcher:
    def __init__(self, client, *, block_tokens, chunk_blocks, groups, remote_deadline_ms=50, prefetch_deadline_ms=2000):
        self.client, self.block_tokens, self.groups = client, block_tokens, groups
        self.claimed: dict[str, int] = {}
        self.unknown = 0  # how many times more to say "not known yet"

    def match(self, request, namespace, hashes, hash_bytes, local_tokens, max_tokens, prompt_tokens, traceparent="", patience_ms=0):
        store = self.client.store
        store.traceparents.append(("match", traceparent))
        store.matches += 1
        if self.unknown > 0:
            self.unknown -= 1
            return False, 0, ""
        mine = self.client.namespace_id(namespace)
        blocks = [hashes[i : i + hash_bytes] for i in range(0, len(hashes), hash_bytes)]
        for count in range(min(len(blocks), max_tokens // self.block_tokens), 0, -1):
            tokens = count * self.block_tokens
            first = [max(0, tokens - window + 1) // self.block_tokens if window else 0 for _, window in self.groups]
            if tokens == prompt_tokens and any(
                window and tokens >= window and (tokens - window + 1) % self.block_tokens == 0
                for _, window in self.groups
            ):
                continue  # the last token is computed again, and its own window begins a block earlier
            if all(
                store.has(mine, group, block)
                for (group, _), begin in zip(self.groups, first)
                for block in blocks[begin:count]
            ):
                self.claimed[request] = tokens
                return True, tokens, ""
        self.claimed.pop(request, None)
        return True, 0, "not stored"

    def retain(self, namespace, group, hashes, hash_bytes, seconds):
        mine = self.client.namespace_id(namespace)
        for at in range(0, len(hashes), hash_bytes):
            block = hashes[at : at + hash_bytes]
            if self.client.store.has(mine, group, block):
                self.client.store.retained[mine, group, block] = seconds

    def release(self, request):
        self.claimed.pop(request, None)

    @property
    def claims(self):
        return len(self.claimed)


class Stream:
    """A GPU's queue of work. Jobs wait for what was queued on it before them."""

    def __init__(self):
        self.queued = self.done = 0
        self.workers: list[TransferWorker] = []

    def advance(self) -> None:
        self.done += 1
        for worker in self.workers:
            worker.run()


class TransferWorker:
    stream = None  # of the engine that makes one

    def __init__(self, client, *, threads=1, max_queued_jobs=4096, load_timeout_ms=30_000, store_timeout_ms=30_000):
        self.client = client
        self.registered: dict[int, dict] = {}
        self._jobs: list = []  # (queued work that it waits for, kind, job, ...)
        self._events: list = []
        self.stream = type(self).stream or Stream()
        self.stream.workers.append(self)
        self.cancelled: set[int] = set()

    def register_group(self, **arguments):
        if getattr(self.client.store, "refuse_layout", ""):
            raise ValueError(self.client.store.refuse_layout)
        self.registered[arguments["group"]] = arguments

    def _page(self, group, layer, head, block):
        """The bytes of one (layer, head, block), page by page; whatever order K and V have in it."""
        facts = self.registered[group]
        address, reachable, pages, page_stride, head_stride, token_stride, _ = facts["layers"][layer]
        ratio = facts["pages_per_block"]
        size = {"float32": 4}.get(facts["dtype"], 2) * (facts["key_dim"] + facts["value_dim"])
        size *= facts["block_tokens"] // ratio
        result = []
        for page in range(block * ratio, (block + 1) * ratio):
            offset = page * page_stride + head * head_stride
            assert 0 <= page < pages and offset + size <= reachable
            result.append((address + offset, size))
        return result

    def _planes(self, group):
        facts = self.registered[group]
        for layer in range(len(facts["layers"])):
            for head in range(facts["heads"]):
                yield layer, head, (facts["layer_begin"] + layer, facts["head_begin"] + head)

    def _add(self, kind: str, job: int, *arguments) -> None:
        self._jobs.append((self.stream.queued, kind, job, *arguments))

    def submit_store(self, job, namespace, group, codec, hash_bytes, chunks, ready_event=0, traceparent=""):
        self.client.store.traceparents.append(("store", traceparent))
        self._add("store", job, namespace, group, hash_bytes, chunks)

    def submit_load(self, job, namespace, hash_bytes, pieces, ready_event=0, traceparent=""):
        self.client.store.traceparents.append(("load", traceparent))
        self._add("load", job, namespace, hash_bytes, pieces)

    def _run_store(self, job, namespace, group, hash_bytes, chunks):
        store, stored = self.client.store, []
        for number, (hashes, block_ids, position, previous) in enumerate(chunks):
            assert len(previous) == (hash_bytes if position else 0), "a chunk is told which block comes before it"
            blocks = [hashes[i : i + hash_bytes] for i in range(0, len(hashes), hash_bytes)]
            assert len(blocks) == len(block_ids) and all(block_ids), "a null block in a store"
            if store.drop_stores:
                continue
            planes = {}
            for layer, head, key in self._planes(group):
                parts = [self._page(group, layer, head, block) for block in block_ids]
                planes[key] = [b"".join(ctypes.string_at(*span) for span in part) for part in parts]
            store.add(self.client.id_of(namespace), group, blocks, planes)
            stored.append(number)
        self._events.append((job, "gathered", [], "", 0.001, 0, 0))
        reason = "dropped by the test" if store.drop_stores else ""
        self._events.append((job, "stored", stored, reason, 0.002, 100, 50))

    def submit_compaction(self, **arguments):
        self._add("compact", arguments.pop("job"), arguments)

    def _run_compaction(self, job, arguments):
        """Once all ranks have asked, keeps the last M rows of each plane. What a rank needs must have been stored by then."""
        store, size = self.client.store, arguments["hash_bytes"]
        mine = self.client.id_of(arguments["namespace"])
        facts = self.registered[arguments["group"]]
        row = {"float32": 4}.get(facts["dtype"], 2) * (facts["key_dim"] + facts["value_dim"])
        store.compactions[arguments["handle"]] = arguments
        parts = store.compaction_parts.setdefault(arguments["handle"], {})
        assert facts["head_begin"] not in parts, "two ranks ask for the same heads"
        parts[facts["head_begin"]] = (self, arguments)
        sources = [arguments["source_hashes"][i : i + size] for i in range(0, len(arguments["source_hashes"]), size)]
        slots = [arguments["slot_hashes"][i : i + size] for i in range(0, len(arguments["slot_hashes"]), size)]
        if not all(store.has(mine, arguments["group"], block) for block in sources):
            self._events.append((job, "compaction_failed", [], "some of the prompt's chunks are missing", 0.001, 0, 0))
            return
        self._events.append((job, "compacting", [], "", 0.001, 0, 0))
        if sum(worker.registered[arguments["group"]]["heads"] for worker, _ in parts.values()) < facts["model_heads"]:
            return
        chunk_blocks = max(1, 256 // facts["block_tokens"])
        planes = {}
        for key in [key for worker, _ in parts.values() for _, _, key in worker._planes(arguments["group"])]:
            rows = b""
            for block in sources:
                chunk, offset = store.blocks[mine, arguments["group"], block]
                rows += store.chunks[chunk].planes[key][offset]
            kept = rows[: arguments["prompt_tokens"] * row][-arguments["slots"] * row :]
            page = facts["block_tokens"] * row
            kept += bytes(-len(kept) % page)
            planes[key] = [kept[i : i + page] for i in range(0, len(kept), page)]
        for first in range(0, len(slots), chunk_blocks):
            part = slots[first : first + chunk_blocks]
            store.add(
                mine, arguments["group"], part, {key: pages[first : first + len(part)] for key, pages in planes.items()}
            )
        for block in sources:
            key, _ = store.blocks.pop((mine, arguments["group"], block))
            store.chunks.pop(key, None)

    def _run_load(self, job, namespace, hash_bytes, pieces):
        store = self.client.store
        if store.fail_loads or job in self.cancelled:
            self._events.append((job, "load_failed", [], "failed by the test", 0.001, 0, 0))
            return
        mine = self.client.id_of(namespace)
        for group, blocks_before, hashes, block_ids in pieces:
            for i, block in enumerate(block_ids):
                if block == 0:
                    continue
                key, offset = store.blocks[mine, group, hashes[i * hash_bytes : (i + 1) * hash_bytes]]
                assert offset == blocks_before + i, "the piece does not lie where it says in its chunk"
                for layer, head, plane in self._planes(group):
                    data, done = store.chunks[key].planes[plane][offset], 0
                    for address, size in self._page(group, layer, head, block):
                        ctypes.memmove(address, data[done : done + size], size)
                        done += size
        self._events.append((job, "loaded", [], "", 0.001, 100, 50))

    def run(self) -> None:
        """All jobs whose time has come."""
        keep = []
        for event, kind, job, *arguments in self._jobs:
            if event > self.stream.done or (self.client.store.hold and job not in self.cancelled):
                keep.append((event, kind, job, *arguments))
            elif kind == "store":
                self._run_store(job, *arguments)
            elif kind == "compact":
                self._run_compaction(job, *arguments)
            else:
                self._run_load(job, *arguments)
        self._jobs = keep

    def poll(self):
        self.run()
        events, self._events = self._events, []
        return events

    def cancel_load(self, job):
        self.cancelled.add(job)

    def drain(self, timeout_ms):
        return True

    @property
    def in_flight(self):
        return len(self._jobs)
