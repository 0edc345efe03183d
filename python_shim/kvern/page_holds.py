"""References on the engine's KV blocks while workers still read them."""

import time

from kvern import compat


class PageHolds:
    """A store planned in one step is gathered after that step's forward pass, by threads; the request may have ended by
    then, or a sliding window may have given the blocks away. A reference on the block pool keeps their content. Every
    hold ends when all ranks have said that they have gathered the job's pages."""

    # With this share of the pool held, no further stores are planned until some have ended.
    MAX_SHARE = 0.25
    # A prompt that becomes a compact cache cannot be put off for long, and its ordinary store holds the same blocks.
    MAX_SHARE_COMPACT = 0.75
    # A full pool waits for a hold rather than preempt a request, since gathering takes milliseconds. One that is older
    # than this waits for a daemon that hangs, which may take until a time-out of tens of seconds.
    SOON_SECONDS = 0.5

    def __init__(self, ranks: int, clock=time.monotonic):
        self._ranks = ranks
        self._clock = clock
        self._pool = None
        self._jobs: dict[int, tuple[list, set[int], float]] = {}  # job -> (blocks, ranks that have gathered, begin)
        self._blocks = 0
        self.problem = "vLLM has not shown its block pool"

    def bind(self, pool) -> None:
        self.problem = compat.can_hold(pool)
        self._pool = None if self.problem else pool

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    @property
    def blocks(self) -> int:
        return self._blocks

    def has_room(self, share: float = MAX_SHARE) -> bool:
        return self._pool is not None and self._blocks < len(self._pool.blocks) * share

    def take(self, job: int, block_ids: list[int]) -> None:
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self._pool.touch(blocks)
        self._jobs[job] = (blocks, set(), self._clock())
        self._blocks += len(blocks)

    def gathered(self, job: int, rank: int) -> None:
        entry = self._jobs.get(job)
        if entry is None:
            return
        blocks, ranks, _ = entry
        ranks.add(rank)
        if len(ranks) < self._ranks:
            return
        del self._jobs[job]
        self._blocks -= len(blocks)
        # In this order the end of the prompt is evicted first, as vLLM itself does it.
        self._pool.free_blocks(reversed(blocks))

    def frees_soon(self) -> bool:
        """Whether some block has no other user any more, so that it becomes free when its hold ends, which is soon."""
        since = self._clock() - self.SOON_SECONDS
        return any(
            block.ref_cnt == 1 for blocks, _, taken_at in self._jobs.values() if taken_at > since for block in blocks
        )
