"""Cuts an OpenAI request in two: one that computes the prompt and the first token, one that decodes the rest.

What cannot be cut without changing the answer is named by `obstacle()`. Fields that are not known here count as such.
"""

import dataclasses

# Of both halves as they are.
_SHARED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "return_tokens_as_token_ids",
    "priority",
    "session_id",
    "user",
)
# Only the chat template reads them.
_TEMPLATE = (
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "documents",
)
_TREATED = (
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "seed",
    "n",
    "logprobs",
    "top_logprobs",
    "return_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "request_id",
    "stop",
    "include_stop_str_in_output",
)
# Without influence on an answer of these servers.
_IDLE = ("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "length_penalty", "stream_interval")
# Values that ask for nothing.
_NEUTRAL = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "bad_words": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "include_reasoning": (True,),
    "logprob_token_ids": ([],),
}
_WHY = {
    "echo": "echo would return the prompt, of which the decode server sees placeholders",
    "prompt_logprobs": "prompt_logprobs need the prompt, of which the decode server sees placeholders",
    "presence_penalty": "presence_penalty counts generated tokens, and the decode server sees the first one as prompt",
    "frequency_penalty": "frequency_penalty counts generated tokens, and the decode server sees the first one as prompt",
    "tools": "tool calls are parsed by the server that sees the whole answer",
}
# What this module reads itself. The server reads some other values as such, too, and refuses the rest in its own words.
_TYPES = {
    "model": str,
    "stream": bool,
    "stream_options": dict,
    "return_token_ids": bool,
    "include_stop_str_in_output": bool,
    "chat_template_kwargs": dict,
    "cache_salt": str,
}
DEFAULT_COMPLETION_TOKENS = 16  # vLLM's default for completions
MOST_CHOICES = 128
_WISHES = ("compact", "ttl_seconds", "task")  # of kv_transfer_params["kvern"]: what making a compact cache reads
_SEED_STEP = 0x9E3779B97F4A7C15


def obstacle(chat: bool, body: dict) -> str:
    """Why the answer to this request cannot be made in two halves; empty when it can."""
    known = {*_SHARED, *_TREATED, *_IDLE, *_TEMPLATE}
    for name, value in body.items():
        if value is None or name in known or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
            continue
        return _WHY.get(name, f"{name} is not known to work across two servers")
    for name, kind in _TYPES.items():
        if body.get(name) is not None and not isinstance(body[name], kind):
            return f"{name} is {body[name]!r}"
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(_is_text(message) for message in messages):
            return "only messages of text are made compact"
    elif not isinstance(body.get("prompt"), str) and not _is_ids(body.get("prompt")):
        return "only a single prompt, as text or token ids, is made compact"
    for name, least, most in (("n", 1, MOST_CHOICES), ("max_tokens", 1, None), ("max_completion_tokens", 1, None),
                              ("min_tokens", 0, None), ("seed", None, None)):
        value = body.get(name)
        if value is not None and (type(value) is not int or (least is not None and value < least) or (most and value > most)):
            return f"{name} is {value!r}"
    if not _is_logprobs(chat, body):
        return "logprobs are not asked for as the server knows them"
    if stops(body) is None:
        return "stop is neither a text nor a list of texts"
    if stops(body) and body.get("min_tokens"):
        return "stop together with min_tokens is looked for in the whole answer"
    options = body.get("stream_options")
    readable = options is None or all(value in (None, True, False) for value in options.values())
    if not readable or (options and not body.get("stream")):
        return "stream_options are not as the server knows them, or without stream"
    if body.get("cache_salt") == "":
        return "cache_salt is empty"
    transfer = body.get("kv_transfer_params")
    if transfer is not None:
        ours = transfer.get("kvern") if isinstance(transfer, dict) else None
        if not isinstance(ours, dict) or set(transfer) != {"kvern"}:
            return "kv_transfer_params are for another connector"
        if "handle" in ours:
            return "the request names a handle itself"
    return ""


def ours_of(body: dict) -> dict:
    """What the client's kv_transfer_params say of this store."""
    transfer = body.get("kv_transfer_params")
    ours = transfer.get("kvern") if isinstance(transfer, dict) else None
    return ours if isinstance(ours, dict) else {}


def wants_full(body: dict) -> bool:
    """The client's own kv_transfer_params say {"kvern": {"compact": false}}."""
    return not ours_of(body).get("compact", True)


def _without_wishes(ours: dict) -> dict:
    return {key: value for key, value in ours.items() if key not in _WISHES}


def without_wish(body: dict) -> dict:
    """The request without a wish for a compact cache: a server would make one that nobody deletes."""
    ours = ours_of(body)
    if not ours:
        return body
    return {**body, "kv_transfer_params": {**body["kv_transfer_params"], "kvern": _without_wishes(ours)}}


def stops(body: dict) -> list[str] | None:
    """None: what the server does not know as stop strings."""
    value = body.get("stop")
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value else None
    return value if isinstance(value, list) and all(isinstance(one, str) and one for one in value) else None


def question_text(chat: bool, body: dict) -> str:
    """The text that says what is asked for."""
    if not chat:
        return body["prompt"] if isinstance(body["prompt"], str) else ""
    asked = [message for message in body["messages"] if message.get("role") in ("user", "system")]
    return "\n".join(_text(message.get("content")) for message in asked)


def tokenize_body(chat: bool, body: dict) -> dict:
    """For POST /tokenize: the prompt as the server would read it."""
    if not chat:
        fields = ("model", "prompt", "add_special_tokens")
        return {name: body[name] for name in fields if body.get(name) is not None}
    fields = ("model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template")
    result = {name: body[name] for name in fields if body.get(name) is not None}
    keywords = dict(body.get("chat_template_kwargs") or {})
    for name in ("documents", "reasoning_effort"):
        if body.get(name) is not None:
            keywords.setdefault(name, body[name])
    if body.get("reasoning_effort") is not None:
        keywords.setdefault("enable_thinking", body["reasoning_effort"] != "none")
    if keywords:
        result["chat_template_kwargs"] = keywords
    return result


def wanted_tokens(chat: bool, body: dict) -> int | None:
    """How many tokens the client asks for at most; None: as many as fit."""
    if chat:
        return body["max_completion_tokens"] if body.get("max_completion_tokens") is not None else body.get("max_tokens")
    return body["max_tokens"] if body.get("max_tokens") is not None else DEFAULT_COMPLETION_TOKENS


def seed_after(seed: int, tokens: int) -> int:
    """Each request to a server starts its random numbers at its seed. What follows the first tokens takes another one,
    so that its first draw is not the draw of the first token again."""
    return (seed + tokens * _SEED_STEP) & ((1 << 63) - 1) if tokens else seed


@dataclasses.dataclass
class Halves:
    """One request whose prompt is known as tokens."""

    chat: bool
    body: dict
    prompt: list[int]
    most_tokens: int  # of the answer

    @property
    def choices(self) -> int:
        return self.body.get("n") or 1

    @property
    def logprobs(self) -> int | None:
        """As completions ask for them."""
        if not self.chat:
            return self.body.get("logprobs")
        return (self.body.get("top_logprobs") or 0) if self.body.get("logprobs") else None

    def _common(self) -> dict:
        result = {name: self.body[name] for name in _SHARED if self.body.get(name) is not None}
        if self.logprobs is not None:
            result["logprobs"] = self.logprobs
        return result

    def _own_transfer(self) -> dict:
        """What the client's kv_transfer_params say of this store, without a compact cache."""
        return _without_wishes(ours_of(self.body))

    def _salted(self, request: dict) -> dict:
        return {**request, "cache_salt": self.body["cache_salt"]} if self.body.get("cache_salt") else request

    def _seeded(self, request: dict, index: int, begun: list[int]) -> dict:
        seed = self.body.get("seed")
        # index: as vLLM does for its choices
        return request if seed is None else {**request, "seed": seed_after(seed + index, len(begun))}

    def _stops(self) -> dict:
        return {name: self.body[name] for name in ("stop", "include_stop_str_in_output") if self.body.get(name)}

    def first(self, compact: dict) -> dict:
        """The completion of one token that computes the prompt. compact: kv_transfer_params["kvern"] of the making."""
        return self._one_token(0, 1, compact, [])

    def other_firsts(self) -> dict:
        """The first tokens of the further choices; their prompt is in the server's prefix cache by now."""
        return self._one_token(1, self.choices - 1, {"store": False}, [])

    def one_more(self, index: int, begun: list[int]) -> dict:
        """The next token of a choice that has begun."""
        return self._one_token(index, 1, {"store": False}, begun)

    def _one_token(self, index: int, choices: int, transfer: dict, begun: list[int]) -> dict:
        request = {
            **self._common(),
            **self._stops(),
            "prompt": [*self.prompt, *begun],
            "max_tokens": 1,
            "min_tokens": min(1, self.body.get("min_tokens") or 0),
            "n": choices,
            "return_token_ids": True,
            "kv_transfer_params": {"kvern": {**self._own_transfer(), **transfer}},
        }
        return self._seeded(self._salted(request), index, begun)

    def _rest(self, index: int, begun: list[int]) -> dict:
        request = {
            **self._common(),
            **self._stops(),
            "max_tokens": self.most_tokens - len(begun),
            "min_tokens": max(0, (self.body.get("min_tokens") or 0) - len(begun)),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.body.get("return_token_ids"):
            request["return_token_ids"] = True
        return self._seeded(request, index, begun)

    def compact_rest(self, index: int, begun: list[int], handle: str, slots: int) -> dict:
        return {
            **self._rest(index, begun),
            "prompt": [*placeholders(self.prompt, slots), *begun],
            "cache_salt": handle,
            "kv_transfer_params": {"kvern": {"handle": handle}},
        }

    def full_rest(self, index: int, begun: list[int]) -> dict:
        request = {**self._rest(index, begun), "prompt": [*self.prompt, *begun]}
        if self._own_transfer():
            request["kv_transfer_params"] = {"kvern": self._own_transfer()}
        return self._salted(request)

    def against_slots(self, slots: int) -> str:
        """Why so many placeholders will not do; empty when they will."""
        penalty = self.body.get("repetition_penalty")
        if penalty is not None and penalty != 1 and len(set(self.prompt)) > slots:
            return "repetition_penalty needs all of the prompt's words, and there are more than slots"
        return ""


def placeholders(prompt: list[int], slots: int) -> list[int]:
    """Tokens of the prompt in the place of its slots: the last occurrence of each word first, then whatever comes last.
    A repetition penalty then sees every word of the prompt as long as the slots hold them, and the text before the answer
    ends as the prompt does."""
    last = {token: position for position, token in enumerate(prompt)}
    chosen = sorted(last.values())[-slots:]
    taken = set(chosen)
    others = [position for position in range(len(prompt)) if position not in taken]
    chosen += others[len(others) - (slots - len(chosen)) :] if slots > len(chosen) else []
    return [prompt[position] for position in sorted(chosen)]


def _is_logprobs(chat: bool, body: dict) -> bool:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        return top is None and (wanted is None or (type(wanted) is int and wanted >= 0))
    return wanted in (None, True, False) and (top is None or (type(top) is int and top >= 0 and (wanted or top == 0)))


def _is_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _is_text(message) -> bool:
    content = message.get("content") if isinstance(message, dict) else 0
    if content is None or isinstance(content, str):
        return isinstance(message, dict) and not message.get("tool_calls")
    return isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content)


def _text(content) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""
