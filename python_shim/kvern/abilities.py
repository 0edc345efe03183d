"""What the workers have said of their engine. They tell with their first step."""

import time

from kvern import compat
from kvern.metadata import RAGGED_LAYOUTS, RankReport


class Abilities:
    """The scheduler side's. Answers are (known, what stands in the way); not known: ask again, for so long at most as
    something takes to be set up."""

    def __init__(self, ranks: int, patience_seconds: float, clock=time.monotonic):
        self._ranks = ranks
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._capture: dict[int, str] = {}  # rank -> why it cannot capture queries, "": it can
        self._moving: dict[int, str] = {}  # rank -> why the keys cannot be moved, "": they can
        # layout of ragged compact caches -> rank -> why it cannot read them, "": it can
        self._layouts: dict[str, dict[int, str]] = {layout: {} for layout in RAGGED_LAYOUTS}

    def take(self, rank: int, report: RankReport) -> None:
        if report.no_capture is not None:
            self._capture[rank] = report.no_capture
        if report.no_moving is not None:
            self._moving[rank] = report.no_moving
        for layout, problem in (report.no_layout or {}).items():
            self._layouts[layout][rank] = problem

    def capture(self, asked_since: float) -> tuple[bool, str]:
        """Whether queries can be captured. asked_since: on the clock."""
        known, problem = self._all_of(self._capture, asked_since)
        if problem is None:
            return known, "the workers have not said whether they can capture queries"
        return known, problem and f"queries cannot be captured on this engine: {problem}"

    def moving(self, asked_since: float) -> tuple[bool, str]:
        """Whether the daemon can move the model's keys to the positions of the slots."""
        known, problem = self._all_of(self._moving, asked_since)
        return known, "the workers have not said how the model turns its keys" if problem is None else problem

    def layout(self, layout: str, asked_since: float) -> tuple[bool, str]:
        """Whether compact caches can be read whose layers keep different numbers of slots, in this layout."""
        if not compat.offers_block_tables():
            return True, "this vLLM does not show its connector the requests' blocks"
        known, problem = self._all_of(self._layouts[layout], asked_since)
        return known, "the workers have not said whether they can do else" if problem is None else problem

    def best_layout(self, asked_since: float) -> tuple[bool, str, str]:
        """(known, the best layout that can be read, why it is no better one)"""
        problem = ""
        for layout in RAGGED_LAYOUTS:
            known, why = self.layout(layout, asked_since)
            if not known or not why:
                return known, layout, problem
            problem = why
        return True, "rectangular", problem

    def _all_of(self, told: dict[int, str], asked_since: float) -> tuple[bool, str | None]:
        """The problem is None when not all ranks have told."""
        if len(told) < self._ranks:
            return self._clock() - asked_since >= self._patience_seconds, None
        return True, next(filter(None, told.values()), "")

    def surely_not(self, layout: str) -> bool:
        """Some worker has said that it cannot read such caches."""
        return any(self._layouts[layout].values())
