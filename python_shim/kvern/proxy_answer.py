"""Puts the first token and the rest together again, as completions and chat completions answer."""

import dataclasses
import time


@dataclasses.dataclass
class Piece:
    """What one choice gained: of the first token, or of one event of the rest. Log-probabilities are as completions have
    them."""

    index: int
    text: str = ""
    tokens: int = 0  # of the choice so far
    token_ids: list[int] | None = None
    logprobs: dict | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class StopText:
    """The text of a choice's first tokens, which come one at a time, up to the stop string that is complete first, as
    vLLM has it. The decode server finds those in its own tokens; it sees the first ones as prompt."""

    def __init__(self, stops: list[str], included: bool):
        self._stops = stops
        self._included = included
        self.text = ""

    def feed(self, text: str) -> str | None:
        """The stop string that ends the answer here."""
        self.text += text
        ends = {}
        for stop in self._stops:
            begin = self.text.find(stop, max(0, len(self.text) - len(text) - len(stop) + 1))
            if begin >= 0:
                ends[stop] = begin + len(stop)
        if not ends:
            return None
        stop = min(ends, key=ends.__getitem__)  # the first in the list where two end together
        self.text = self.text[: ends[stop] - (0 if self._included else len(stop))]
        return stop

    @property
    def has_begun(self) -> bool:
        """Whether the text ends with the beginning of a stop string, which further text may complete."""
        longest = len(self.text) + 1
        return any(self.text.endswith(stop[:n]) for stop in self._stops for n in range(1, min(len(stop), longest)))


class Shape:
    """The form of one answer. usage: prompt tokens are the real ones, whatever the decode server counted."""

    def __init__(self, chat: bool, first: dict, prompt: list[int], with_ids: bool, top_logprobs: int):
        self.chat = chat
        self.id = first.get("id", "") if not chat else "chatcmpl-" + str(first.get("id", "")).removeprefix("cmpl-")
        self.model = first.get("model")
        self.created = first.get("created", int(time.time()))
        self._prompt = prompt
        self._ids = with_ids
        self._top = top_logprobs
        self._details = (first.get("usage") or {}).get("prompt_tokens_details")
        self._begun: set[int] = set()

    def usage(self, tokens: int) -> dict:
        usage = {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": tokens,
            "total_tokens": len(self._prompt) + tokens,
        }
        return usage | ({"prompt_tokens_details": self._details} if self._details else {})

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunks(self, piece: Piece) -> list[dict]:
        """The events of a stream that carry this piece."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        choice: dict = {"index": piece.index}
        begins = piece.index not in self._begun
        self._begun.add(piece.index)
        if self.chat:
            choice |= {"delta": {"content": piece.text}, "logprobs": self._chat_logprobs(piece.logprobs)}
        else:
            choice |= {"text": piece.text, "logprobs": piece.logprobs}
        choice |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if self._ids:
            choice["token_ids"] = piece.token_ids
        head = self._head(kind)
        if not self.chat:
            if self._ids and begins:
                choice["prompt_token_ids"] = self._prompt
            return [{**head, "choices": [choice]}]
        events = [{**head, "choices": [choice]}]
        if begins:
            role = {"index": piece.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                    "finish_reason": None}
            events.insert(0, {**head, "choices": [role]})
            if self._ids:
                events[0]["prompt_token_ids"] = self._prompt
        return events

    def last_chunk(self, tokens: int) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage(tokens)}

    def whole(self, choices: list[list[Piece]], compact: dict | None) -> dict:
        """The answer that is not streamed, of the pieces of each choice."""
        kind = "chat.completion" if self.chat else "text_completion"
        answer = {
            **self._head(kind),
            "choices": [self._whole_choice(index, pieces) for index, pieces in enumerate(choices)],
            "usage": self.usage(sum(pieces[-1].tokens for pieces in choices)),
        }
        if self.chat and self._ids:
            answer["prompt_token_ids"] = self._prompt
        if compact is not None:
            answer["kv_transfer_params"] = {"kvern": {"compact": compact}}
        return answer

    def _whole_choice(self, index: int, pieces: list[Piece]) -> dict:
        text = "".join(piece.text for piece in pieces)
        logprobs = joined([piece.logprobs for piece in pieces if piece.logprobs])
        choice: dict = {"index": index}
        if self.chat:
            choice |= {"message": {"role": "assistant", "content": text}, "logprobs": self._chat_logprobs(logprobs)}
        else:
            choice |= {"text": text, "logprobs": logprobs}
        choice |= {"finish_reason": pieces[-1].finish_reason, "stop_reason": pieces[-1].stop_reason}
        if self._ids:
            choice["token_ids"] = [token for piece in pieces for token in piece.token_ids or []]
            if not self.chat:
                choice["prompt_token_ids"] = self._prompt
        return choice

    def _chat_logprobs(self, logprobs: dict | None) -> dict | None:
        if logprobs is None:
            return None
        tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
        content = []
        for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops):
            ranked = sorted((top or {}).items(), key=lambda entry: -entry[1])[: self._top]
            content.append({**_entry(token, value), "top_logprobs": [_entry(*entry) for entry in ranked]})
        return {"content": content}


def joined(parts: list[dict]) -> dict | None:
    """Log-probabilities one after the other, with offsets into the whole text."""
    if not parts:
        return None
    result: dict = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    offset = 0
    for part in parts:
        for token in part["tokens"]:
            result["text_offset"].append(offset)
            offset += len(token)
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            result[name] += part.get(name) or [None] * len(part["tokens"])
    return result


def _entry(token: str, value: float | None) -> dict:
    return {"token": token, "logprob": -9999.0 if value is None else value, "bytes": list(token.encode("utf-8", "replace"))}
