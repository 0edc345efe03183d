"""KV events: tells routers which blocks the store can give back to this engine."""

import array
import collections
import dataclasses

from vllm.distributed import kv_events

from kvern import compat

MEDIUM = getattr(kv_events, "MEDIUM_CPU", "CPU")
LOCALITY = "LOCAL"
# Chunks whose tokens are remembered, so that they can be announced anew after a reconnect. About 1.5 KB each.
MAX_REMEMBERED_CHUNKS = 1 << 15


@dataclasses.dataclass
class ChunkNote:
    """What an event says of a chunk; taken down when the store is planned, since the request may be gone later."""

    group: int
    hashes: list[bytes]
    parent: bytes | None
    tokens: array.array
    block_tokens: int
    lora_id: int | None
    lora_name: str | None
    extra_keys: list | None
    window: int
    session_id: str | None = None


def note_chunk(request, group, hashes: list[bytes], first_block: int, parent: bytes | None) -> ChunkNote:
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    first, last = first_block * group.block_tokens, (first_block + len(hashes)) * group.block_tokens
    extra_keys, mm_index = [], 0
    for start in range(first, last, group.block_tokens):
        keys, mm_index = generate_block_hash_extra_keys(request, start, start + group.block_tokens, mm_index)
        extra_keys.append(keys)
    lora = request.lora_request
    return ChunkNote(
        group=group.index,
        hashes=hashes,
        parent=parent,
        tokens=array.array("q", request.all_token_ids[first:last]),
        block_tokens=group.block_tokens,
        lora_id=getattr(lora, "lora_int_id", None),
        lora_name=getattr(lora, "lora_name", None),
        extra_keys=extra_keys,
        window=group.window,
        session_id=getattr(request, "session_id", None),
    )


def _external(block_hash: bytes | None):
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    return None if block_hash is None else maybe_convert_block_hash(BlockHash(block_hash))


def _event_extra_keys(extra_keys):
    from vllm.v1.core import kv_cache_utils

    convert = getattr(kv_cache_utils, "to_event_extra_keys", None)
    return convert(extra_keys) if convert is not None else extra_keys


class EventLog:
    """Chunks that were announced, and the events that are due. A block is announced as long as one chunk has it: when a
    longer chunk supersedes a short one, the blocks of the short one stay."""

    def __init__(self):
        self._chunks: collections.OrderedDict[tuple[bytes, int, bytes], ChunkNote] = collections.OrderedDict()
        self._block_uses: collections.Counter = collections.Counter()
        self._due: list = []

    def stored(self, namespace_id: bytes, note: ChunkNote) -> None:
        key = (namespace_id, note.group, note.hashes[-1])
        previous = self._chunks.pop(key, None)
        if previous is not None:
            self._forget(namespace_id, previous)
        self._chunks[key] = note
        self._block_uses.update((namespace_id, note.group, block) for block in note.hashes)
        self._announce(note)
        while len(self._chunks) > MAX_REMEMBERED_CHUNKS:
            (old_namespace, _, _), old = self._chunks.popitem(last=False)
            self._withdraw(old_namespace, old)

    def removed(self, namespace_id: bytes, group: int, hashes: list[bytes]) -> None:
        note = self._chunks.pop((namespace_id, group, hashes[-1]), None) if hashes else None
        if note is not None:
            self._withdraw(namespace_id, note)

    def snapshot(self, namespace_id: bytes, present: list[tuple[int, list[bytes]]], complete: bool) -> None:
        """After a reconnect: present is what the daemon has of the namespace, all of it if complete. What it lacks is
        withdrawn, what it has and this engine knows is announced anew. Of an incomplete one nothing can be said to be
        missing."""
        there = {(group, hashes[-1]) for group, hashes in present if hashes}
        for key in [key for key in self._chunks if key[0] == namespace_id]:
            if (key[1], key[2]) in there:
                self._announce(self._chunks[key])
            elif complete:
                self._withdraw(namespace_id, self._chunks.pop(key))

    def clear(self) -> None:
        """Nothing that was announced can be had any more."""
        for (namespace_id, _, _), note in self._chunks.items():
            self._withdraw(namespace_id, note)
        self._chunks.clear()

    def take(self) -> list:
        due, self._due = self._due, []
        return due

    def _announce(self, note: ChunkNote) -> None:
        self._due.append(
            compat.make_struct(
                kv_events.BlockStored,
                block_hashes=[_external(block) for block in note.hashes],
                parent_block_hash=_external(note.parent),
                token_ids=list(note.tokens),
                block_size=note.block_tokens,
                lora_id=note.lora_id,
                medium=MEDIUM,
                lora_name=note.lora_name,
                extra_keys=_event_extra_keys(note.extra_keys),
                group_idx=note.group,
                kv_cache_spec_kind="sliding_window" if note.window else "full_attention",
                kv_cache_spec_sliding_window=note.window or None,
                locality=LOCALITY,
                session_id=note.session_id,
            )
        )

    def _forget(self, namespace_id: bytes, note: ChunkNote) -> list[bytes]:
        """Takes the chunk's uses of its blocks back; returns the blocks that no other chunk has."""
        gone = []
        for block in note.hashes:
            key = (namespace_id, note.group, block)
            self._block_uses[key] -= 1
            if self._block_uses[key] <= 0:
                del self._block_uses[key]
                gone.append(block)
        return gone

    def _withdraw(self, namespace_id: bytes, note: ChunkNote) -> None:
        gone = self._forget(namespace_id, note)
        if gone:
            self._due.append(
                compat.make_struct(
                    kv_events.BlockRemoved,
                    block_hashes=[_external(block) for block in gone],
                    medium=MEDIUM,
                    group_idx=note.group,
                    locality=LOCALITY,
                )
            )
