"""Native binding of libkvern. Every call releases the GIL for its C++ work and none blocks, except wait_ready, drain and
wait_gathered, which say so, and those of compact caches that ask the daemon. No exception but ValueError (bad arguments,
at construction or registration), and RuntimeError where it says so."""

__version__: str
PROTOCOL_VERSION: int

# A compact cache of a prompt of so many tokens, as the spec asks for it ("cake(budget=12%) | int8"): the canonical spec,
# the slots that a request claims in every layer, how many of the prompt's last queries the method reads (0: none), and
# the layout of the slots (base/slot_layout.h). layout, page_tokens: that in which the engine, with blocks of so many
# tokens, reads caches whose layers differ; "rectangular": equal budgets instead. Raises ValueError with the reason when
# there can be none.
def compaction_plan(
    spec: str, prompt_tokens: int, layout: str = "rectangular", page_tokens: int = 0
) -> tuple[str, int, int, str]: ...
# Of a fact `rotation`: whether pairs are neighbours (else they lie a half apart), and of each pair the radians per position.
# Raises ValueError with the reason for rotations that no daemon can move keys by.
def rotation_frequencies(rotation: str) -> tuple[bool, list[float]]: ...
# Where the pages of a compact cache lie: [layer][page] -> (layer, block of the request) (kernels/slot_pages.h). Raises
# ValueError when they do not fit the blocks.
def slot_pages(layout: str, pages_of_layers: list[int], blocks: int) -> list[list[tuple[int, int]]]: ...

class Client:
    def __init__(self, address: str, *, scheduler: bool, client_name: str = "",
                 attributes: dict[str, str] = {}, data_plane: str = "auto",
                 server_key_file: str = "", client_key_file: str = "", insecure: bool = False, profiles: str = "",
                 staging_bytes: int = 256 << 20, connect_timeout_ms: int = 2000, call_timeout_ms: int = 10_000,
                 backoff_min_ms: int = 100, backoff_max_ms: int = 5000) -> None: ...
    def add_namespace(self, fields: dict[str, str]) -> int: ...
    @property
    def state(self) -> str: ...  # connecting | ready | refused | closed
    @property
    def problem(self) -> str: ...
    @property
    def session_count(self) -> int: ...
    @property
    def data_plane(self) -> str: ...  # of the live session; "" without one
    @property
    def epoch(self) -> int: ...       # of the live session's daemon; 0 without one
    def namespace_id(self, handle: int) -> bytes | None: ...
    def namespace_refusal(self, handle: int) -> str: ...
    def wait_ready(self, timeout_ms: int) -> bool: ...
    # Removed chunks since the last call, collected by the client's own thread:
    # [(namespace_id, group, [block_hash, ...], reason), ...]; (lost: bool) tells that some were missed.
    def take_removed(self) -> tuple[bool, list[tuple[bytes, int, list[bytes], str]]]: ...
    # Chunks that the daemon holds of a namespace, gathered by the client's own thread after request_snapshot(handle):
    # None until it is there, then once (handle, [(group, [block_hash, ...], tokens), ...], whether these are all).
    def request_snapshot(self, handle: int) -> None: ...
    def take_snapshot(self) -> tuple[int, list[tuple[int, list[bytes], int]], bool] | None: ...
    # For `kvernctl status` and `doctor`: what was learnt since the client was made.
    def describe(self, attribute: str, value: str) -> None: ...
    def report(self, hit_tokens: int, requested_tokens: int) -> None: ...
    # What the daemon knows of a compact cache; waits for at most wait_ms while it is pending and, unless early, until its
    # error is measured, which takes longer than to make it. Keys: handle; state
    # (pending | ready | failed | unknown); reason (why it failed; unknown: there is none, it has expired or is another
    # tenant's, or no daemon answers); prompt_tokens; slots; method; namespace (id, 16 bytes); group; stored_bytes;
    # raw_bytes; error_mean, error_max (None: not measured, or not yet); expires_at (unix seconds); owner; seconds;
    # layer_slots (of each layer of a ragged cache that is ready, otherwise empty).
    def compaction(self, handle: str, wait_ms: int = 0, early: bool = False) -> dict: ...
    # Slots of each layer of a compact cache, from its stored chunks, whoever made it; empty: as many as the handle says.
    # block_hash: of its first slots, which a match must hold. RuntimeError with the reason, also when no daemon answers.
    def layer_slots(self, namespace_handle: int, group: int, block_hash: bytes) -> list[int]: ...
    # False when there is none. Its chunks leave all tiers. RuntimeError when no daemon answers, also of the next one.
    def delete_compaction(self, handle: str) -> bool: ...
    def compactions(self) -> list[dict]: ...  # of this tenant
    def close(self) -> None: ...

class PrefixMatcher:
    # groups: [(group, window_tokens or 0), ...]
    def __init__(self, client: Client, *, block_tokens: int, chunk_blocks: int, groups: list[tuple[int, int]],
                 remote_deadline_ms: int = 50,
                 prefetch_deadline_ms: int = 2000) -> None: ...
    # hashes: the block hashes joined, hash_bytes each. traceparent, here and below: of the work that asks, in the W3C form;
    # "": none. Returns (known, tokens, reason).
    def match(self, request: str, namespace: int, hashes: bytes, hash_bytes: int, local_tokens: int, max_tokens: int,
              prompt_tokens: int, traceparent: str = "") -> tuple[bool, int, str]: ...
    def release(self, request: str) -> None: ...
    # Wishes that the daemon keeps what it has of these blocks for so long. Never waits.
    def retain(self, namespace: int, group: int, hashes: bytes, hash_bytes: int, seconds: int) -> None: ...
    @property
    def claims(self) -> int: ...

class TransferWorker:
    def __init__(self, client: Client, *, threads: int = 1, max_queued_jobs: int = 4096, load_timeout_ms: int = 30_000,
                 store_timeout_ms: int = 30_000) -> None: ...
    # layers: [(address, reachable_bytes, pages, page_stride, head_stride, token_stride, value_offset), ...] in bytes.
    # packing: rows | cpu_vec | cpu_amx | opaque. Raises ValueError with the reason when the layout is refused.
    def register_group(self, *, group: int, packing: str, dtype: str, block_tokens: int, pages_per_block: int,
                       heads: int, head_begin: int, model_heads: int, layer_begin: int, group_layers: int,
                       key_dim: int, value_dim: int, layers: list[tuple[int, int, int, int, int, int, int]],
                       on_device: bool = False) -> None: ...
    # ready_event: a CUDA event (its handle) after which the pages may be touched; 0: at once
    # chunks: [(hashes joined, block_ids, position, hash of the block before or b""), ...]
    def submit_store(self, job: int, namespace: int, group: int, codec: str, hash_bytes: int,
                     chunks: list[tuple[bytes, list[int], int, bytes]], ready_event: int = 0,
                     traceparent: str = "") -> None: ...
    # pieces: [(group, blocks_before, hashes joined, block_ids), ...]
    def submit_load(self, job: int, namespace: int, hash_bytes: int,
                    pieces: list[tuple[int, int, bytes, list[int]]], ready_event: int = 0,
                    traceparent: str = "") -> None: ...
    # Asks for a compact cache once the prompt's blocks are stored, codec "raw", under source_hashes. The hashes are those
    # that the handle stands for, joined. queries: one buffer per layer of this rank, [query_rows][query_heads][key_dim]
    # of the group's dtype without gaps, in host memory (tensors, arrays, bytes); copied; [] when query_rows is 0.
    def submit_compaction(self, job: int, namespace: int, handle: str, spec: str, group: int, prompt_tokens: int,
                          slots: int, expires_at: int, hash_bytes: int, source_hashes: bytes, slot_hashes: bytes,
                          query_rows: int, query_heads: int, queries: list, traceparent: str = "") -> None: ...
    # [(job, event, stored_chunks, reason, seconds, raw_bytes, encoded_bytes), ...]
    # event: gathered | stored | loaded | load_failed | compacting | compaction_failed
    def poll(self) -> list[tuple[int, str, list[int], str, float, int, int]]: ...
    def wait_gathered(self, jobs: list[int], timeout_ms: int) -> bool: ...
    def cancel_load(self, job: int) -> None: ...
    def drain(self, timeout_ms: int) -> bool: ...
    @property
    def in_flight(self) -> int: ...
