"""What the workers have said of their engine. They tell with their first step."""

import time

from kvern import compat
from kvern.metadata import RankReport


class Abilities:
    """The scheduler side's. Answers are (known, what stands in the way); not known: ask again, for so long at most as
    something takes to be set up."""

    def __init__(self, ranks: int, patience_seconds: float, clock=time.monotonic):
        self._ranks = ranks
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._capture: dict[int, str] = {}  # rank -> why it cannot capture queries, "": it can
        self._pool: dict[int, str] = {}  # rank -> why it cannot read ragged compact caches, "": it can

    def take(self, rank: int, report: RankReport) -> None:
        if report.no_capture is not None:
            self._capture[rank] = report.no_capture
        if report.no_pool is not None:
            self._pool[rank] = report.no_pool

    def capture(self, asked_since: float) -> tuple[bool, str]:
        """Whether queries can be captured. asked_since: on the clock."""
        known, problem = self._all_of(self._capture, asked_since)
        if problem is None:
            return known, "the workers have not said whether they can capture queries"
        return known, problem and f"queries cannot be captured on this engine: {problem}"

    def pool(self, asked_since: float) -> tuple[bool, str]:
        """Whether layers may keep different numbers of slots."""
        if not compat.offers_block_tables():
            return True, "this vLLM does not show its connector the requests' blocks"
        known, problem = self._all_of(self._pool, asked_since)
        return known, "the workers have not said whether they can do else" if problem is None else problem

    def _all_of(self, told: dict[int, str], asked_since: float) -> tuple[bool, str | None]:
        """The problem is None when not all ranks have told."""
        if len(told) < self._ranks:
            return self._clock() - asked_since >= self._patience_seconds, None
        return True, next(filter(None, told.values()), "")

    @property
    def surely_no_pool(self) -> bool:
        """Some worker has said that its layers cannot keep different numbers of slots."""
        return any(self._pool.values())
