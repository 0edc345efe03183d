"""The rest of an answer: each choice from its first tokens on, over the compact cache as long as there is one."""

import asyncio
import contextlib

from kvern import proxy_request as requests
from kvern.proxy_answer import Piece, StopText, joined
from kvern.proxy_caches import Caches, Compact, NotCompact
from kvern.proxy_server import Server, ServerError


class Choice:
    """One choice: its first tokens, one at a time, then what the decode server says of the rest."""

    def __init__(self, index: int, halves: requests.Halves):
        self.index = index
        self.tokens: list[int] = []  # the first ones
        self.complete = False
        self._halves = halves
        self._stops = requests.stops(halves.body) or []
        self._included = bool(halves.body.get("include_stop_str_in_output"))
        self._stop_text = StopText(self._stops, self._included)
        self._logprobs: list[dict] = []
        self._offset = 0
        self._finish: str | None = None
        self._reason: int | str | None = None

    def begin(self, told: dict) -> None:
        """told: the choice of a completion of one token. None is in it if the server aborted. Throws NotCompact."""
        self.tokens += told["token_ids"]
        if told.get("logprobs"):
            self._logprobs.append(told["logprobs"])
            self._offset += sum(map(len, told["logprobs"]["tokens"]))
        finish, reason = told["finish_reason"], told.get("stop_reason")
        # What the server cut off may hold the end of another stop string, begun by an earlier token, and complete first.
        cut_off = reason if reason in self._stops and not self._included else ""
        stop = self._stop_text.feed(told["text"] + cut_off)
        if stop is not None:
            finish, reason = "stop", stop
        self.complete = finish != "length" or not told["token_ids"] or len(self.tokens) >= self._halves.most_tokens
        if self.complete:
            self._finish, self._reason = finish, reason
        elif not told["text"]:
            # The decode server would begin its text with that of its prompt.
            raise NotCompact("first token", "the first token ends within a character, or is a mark without text")

    @property
    def may_stop(self) -> bool:
        """Whether the next token may complete a stop string that the first ones begin."""
        return not self.complete and self._stop_text.has_begun

    @property
    def first_piece(self) -> Piece:
        text, logprobs = self._stop_text.text, joined(self._logprobs)
        return Piece(self.index, text, len(self.tokens), self.tokens, logprobs, self._finish, self._reason)

    def piece(self, event: dict) -> Piece | None:
        """Of one streamed event; None if it carries nothing of the choice. The choice is complete once a piece has a
        finish_reason."""
        if not event.get("choices"):
            return None
        told = event["choices"][0]
        logprobs = told.get("logprobs")
        if logprobs:
            logprobs = {**logprobs, "text_offset": [self._offset + offset for offset in logprobs["text_offset"]]}
        finish = told.get("finish_reason")
        self.complete = finish is not None
        tokens = len(self.tokens) + (event.get("usage") or {}).get("completion_tokens", 0)
        text = told.get("text") or ""
        return Piece(self.index, text, tokens, told.get("token_ids"), logprobs, finish, told.get("stop_reason"))


class Decoding:
    """The answer to one request as pieces. give_up: told of a NotCompact, throws ServerError when the request shall not
    be served in full instead."""

    def __init__(self, server: Server, headers: dict, halves: requests.Halves, caches: Caches, give_up):
        self._server = server
        self._headers = headers
        self._halves = halves
        self._caches = caches
        self._give_up = give_up
        self.compact = False  # whether the cache is what the choices come from

    async def pieces(self, choices: list[Choice], compact: Compact | None, timeout_seconds: float):
        """First tokens at once, then the rest of all choices as it comes. Throws ServerError. Closing it ends the
        requests that are under way."""
        going = [choice for choice in choices if not choice.complete]
        self.compact = compact is not None and bool(going)
        for choice in choices:
            yield choice.first_piece
        queue: asyncio.Queue = asyncio.Queue()
        ready = asyncio.ensure_future(self._wait(compact if going else None, timeout_seconds))
        tasks = [asyncio.ensure_future(self._follow(choice, ready, queue)) for choice in going]
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in (*tasks, ready):
                task.cancel()
            await asyncio.gather(*tasks, ready, return_exceptions=True)

    async def _wait(self, compact: Compact | None, timeout_seconds: float) -> Compact | None:
        if compact is None:
            return None
        try:
            against = self._halves.against_slots(compact.handle.slots)
            if against:
                raise NotCompact("request", against)
            await self._caches.wait(compact.handle.text, timeout_seconds)
            return compact
        except NotCompact as error:
            self.compact = False
            self._give_up(error)
            return None

    async def _follow(self, choice: Choice, ready: asyncio.Future, queue: asyncio.Queue) -> None:
        try:
            async with contextlib.aclosing(self._events(choice, ready)) as events:
                async for event in events:
                    piece = choice.piece(event)
                    if piece is not None:
                        await queue.put(piece)
                    if choice.complete:
                        break
            await queue.put(None)
        except Exception as error:  # whoever reads the queue raises it
            await queue.put(error)

    async def _events(self, choice: Choice, ready: asyncio.Future):
        compact = await asyncio.shield(ready)
        if compact is not None:
            begun = False
            handle = compact.handle
            body = self._halves.compact_rest(choice.index, choice.tokens, handle.text, handle.slots)
            try:
                async with contextlib.aclosing(self._server.events("/v1/completions", self._headers, body)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except ServerError as error:
                if begun or error.status < 500:
                    raise
                self.compact = False
                self._give_up(NotCompact("decode", f"the decode server could not use the compact cache: {error}"))
        body = self._halves.full_rest(choice.index, choice.tokens)
        async with contextlib.aclosing(self._server.events("/v1/completions", self._headers, body)) as events:
            async for event in events:
                yield event
