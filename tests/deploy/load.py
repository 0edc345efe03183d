"""A stand-in for an engine: the native client of the Python package, over pages in memory that it makes itself."""

import hashlib
import pathlib
import sys
import time

import numpy as np

from engine import BUILD

sys.path.insert(0, str(pathlib.Path(BUILD) / "python"))
from kvern import _kvern  # noqa: E402

BLOCK_TOKENS = 16
CHUNK_BLOCKS = 16
HEADS, DIM, LAYERS = 4, 64, 4
HASH_BYTES = 32
JOB_SECONDS = 60


class Load:
    """Stores and loads prompts of `chunks` chunks, each of 2 MiB."""

    def __init__(self, address: str, chunks: int):
        self._chunks = chunks
        self._blocks = chunks * CHUNK_BLOCKS
        self.tokens = self._blocks * BLOCK_TOKENS
        options = {"data_plane": "shm", "staging_bytes": 32 << 20}
        self._scheduler = _kvern.Client(address, scheduler=True, client_name="load scheduler", **options)
        self._worker = _kvern.Client(address, scheduler=False, client_name="load worker", **options)
        facts = {
            "model": "synthetic",
            "weights": "00",
            "dtype": "float32",
            "kv_dtype": "float32",
            "block_tokens": str(BLOCK_TOKENS),
            "chunk_tokens": str(BLOCK_TOKENS * CHUNK_BLOCKS),
            "hash_algorithm": "sha256",
            "hash_seed": "00",
            "layers": str(LAYERS),
            "kv_heads": str(HEADS),
            "key_dim": str(DIM),
            "value_dim": str(DIM),
            "groups": f"full:{LAYERS}",
            "rope": "none",
        }
        self._namespace = self._scheduler.add_namespace(facts)
        self._worker_namespace = self._worker.add_namespace(facts)
        self._matcher = _kvern.PrefixMatcher(
            self._scheduler,
            block_tokens=BLOCK_TOKENS,
            chunk_blocks=CHUNK_BLOCKS,
            groups=[(0, 0)],
            prefetch_deadline_ms=10_000,
        )
        self._pages = np.random.default_rng(1).standard_normal(
            (LAYERS, self._blocks + 1, BLOCK_TOKENS, HEADS, 2, DIM), dtype=np.float32
        )
        head = 2 * DIM * 4
        token = HEADS * head
        page = BLOCK_TOKENS * token
        self._transfer = _kvern.TransferWorker(self._worker)
        self._transfer.register_group(
            group=0,
            packing="rows",
            dtype="float32",
            block_tokens=BLOCK_TOKENS,
            pages_per_block=1,
            heads=HEADS,
            head_begin=0,
            model_heads=HEADS,
            layer_begin=0,
            group_layers=LAYERS,
            key_dim=DIM,
            value_dim=DIM,
            layers=[
                (layer.ctypes.data, layer.nbytes, self._blocks + 1, page, head, token, DIM * 4) for layer in self._pages
            ],
        )
        self._jobs = 0
        for client in (self._scheduler, self._worker):
            assert client.wait_ready(10_000), client.problem
        for client, handle in ((self._scheduler, self._namespace), (self._worker, self._worker_namespace)):
            assert not client.namespace_refusal(handle), client.namespace_refusal(handle)

    def _hashes(self, prompt: int) -> list[bytes]:
        return [hashlib.sha256(f"{prompt} {block}".encode()).digest() for block in range(self._blocks)]

    def _finish(self, wanted: str) -> None:
        deadline = time.monotonic() + JOB_SECONDS
        while time.monotonic() < deadline:
            for _, event, _, reason, *_ in self._transfer.poll():
                assert event in (wanted, "gathered"), f"{event}: {reason}"
                if event == wanted:
                    return
            time.sleep(0.001)
        raise AssertionError(f"the job was not {wanted} after {JOB_SECONDS} s")

    def store(self, prompt: int, codec: str = "", traceparent: str = "") -> None:
        hashes = self._hashes(prompt)
        chunks = []
        for first in range(0, self._blocks, CHUNK_BLOCKS):
            ids = [1 + block for block in range(first, first + CHUNK_BLOCKS)]
            before = hashes[first - 1] if first else b""
            chunks.append((b"".join(hashes[first : first + CHUNK_BLOCKS]), ids, first, before))
        self._jobs += 1
        self._transfer.submit_store(
            self._jobs, self._worker_namespace, 0, codec, HASH_BYTES, chunks, traceparent=traceparent
        )
        self._finish("stored")

    def load(self, prompt: int, traceparent: str = "") -> int:
        """Looks the prompt up, loads what is there, and says how many tokens that was."""
        hashes = self._hashes(prompt)
        joined = b"".join(hashes)
        length = self.tokens
        deadline = time.monotonic() + JOB_SECONDS
        known = False
        while not known:  # chunks may be on their way up from a lower tier
            assert time.monotonic() < deadline, f"the look-up had no answer after {JOB_SECONDS} s"
            known, tokens, reason = self._matcher.match(
                str(prompt), self._namespace, joined, HASH_BYTES, 0, length, length + 1, traceparent
            )
            if not known:
                time.sleep(0.001)
        self._scheduler.report(tokens, length)
        if tokens:
            blocks = tokens // BLOCK_TOKENS
            ids = [1 + block for block in range(blocks)]
            self._jobs += 1
            self._transfer.submit_load(
                self._jobs,
                self._worker_namespace,
                HASH_BYTES,
                [(0, 0, b"".join(hashes[:blocks]), ids)],
                traceparent=traceparent,
            )
            self._finish("loaded")
        self._matcher.release(str(prompt))
        return tokens

    def close(self) -> None:
        self._transfer.drain(10_000)
        self._scheduler.close()
        self._worker.close()
