"""One request, as the scheduler side sees it."""

import concurrent.futures

from kvern import compactions, tracing
from kvern.config import RequestOptions
from kvern.handles import Handle
from kvern.metadata import RaggedSlots


class RequestState:
    """What the scheduler side knows of a request from its admission to its end, or to that of its load."""

    def __init__(self, request, options: RequestOptions, groups: int):
        self.request = request
        self.options = options
        self.traceparent = tracing.traceparent_of(request)
        self.lookup: tracing.Span | None = None  # until the first answer
        self.epoch = -1  # number of the epoch that the marks below belong to
        self.first_asked = 0.0
        self.answer: tuple | None = None  # (local tokens, hashes, session, time, answer)
        self.answered_local = 0
        self.found_tokens = 0  # leading tokens that were in the store at the last look-up
        self.hit_tokens = 0
        self.stored_tokens = 0
        self.claimed = False
        self.loading = False
        self.load_blocks: list[int] = []
        self.failed = False  # a load failed: it is not tried again, or a recomputing engine would loop
        self.stale = False  # its pages date from before a cache reset
        self.finished = False
        self.tables: tuple[list[int], ...] | None = None  # only where vLLM does not show its own
        self.next_cell = [0] * groups  # first chunk, on the grid, that is neither stored nor planned
        self.tail_done = False
        self.due_tokens = 0  # nothing becomes due before so many tokens are computed
        self.joined: tuple[int, bytes] = (0, b"")
        self.making: compactions.Making | None = None  # a compact cache that it asks for
        self.refusal = options.compact_refusal  # why it gets none
        self.decodes = False  # from a compact cache: its placeholders must never be computed, nothing of it is stored
        self.handle: Handle | None = None
        self.asked: concurrent.futures.Future | None = None  # what the chunks of a ragged cache say of its layers
        self.ragged_slots: RaggedSlots | None = None  # of such a cache, once they are known
        self.doomed = ""  # why it must fail

    def reset_marks(self, epoch: int) -> None:
        self.epoch = epoch
        self.next_cell = [0] * len(self.next_cell)
        self.tail_done = False
        self.due_tokens = 0
        self.found_tokens = 0
