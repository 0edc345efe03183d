"""A small server with vLLM's HTTP side, for tests of the proxy: tokens are characters, and the model says what the prompt
tells it to.

A prompt holds «text»: the answer is that text, letter by letter, then the end. What has been said is read off the
context after the last », so an answer that was cut in two comes out right only if the second half sees all of the first.
An emoji is two tokens, each of which is no text by itself; PARAGRAPH is one. Compact caches are kept in Caches, shared by servers.
"""

import asyncio
import json
import time

from aiohttp import web

END = 0
EMOJI = "😊"
EMOJI_HALVES = (0x110000, 0x110001)
PARAGRAPH = ".\n\n"
PARAGRAPH_TOKEN = 0x110002


_STANDS_FOR_PARAGRAPH = 0xE000


def _text_of(token: int) -> str:
    return PARAGRAPH if token == PARAGRAPH_TOKEN else chr(token) if END < token < EMOJI_HALVES[0] else ""


def encode(text: str) -> list[int]:
    ids = []
    for letter in text.replace(PARAGRAPH, chr(_STANDS_FOR_PARAGRAPH)):
        if ord(letter) == _STANDS_FOR_PARAGRAPH:
            ids.append(PARAGRAPH_TOKEN)
            continue
        ids += EMOJI_HALVES if letter == EMOJI else [ord(letter)]
    return ids


def decode(ids: list[int]) -> str:
    text, position = "", 0
    while position < len(ids):
        if tuple(ids[position : position + 2]) == EMOJI_HALVES:
            text, position = text + EMOJI, position + 2
        else:
            text += "\ufffd" if ids[position] in EMOJI_HALVES else _text_of(ids[position])
            position += 1
    return text


class Caches:
    """Stands in for the daemon: what the proxy asks through the native binding."""

    def __init__(self):
        self.prompts: dict[str, list[int]] = {}
        self.deleted: list[str] = []
        self.state, self.reason = "ready", ""
        self.unknown = 1  # so often a handle is not known yet

    def make(self, prompt: list[int], slots: int) -> str:
        handle = f"kvc1.{len(prompt)}.{slots}.{int(time.time()) + 60}.{len(self.prompts):064x}"
        self.prompts[handle] = prompt
        return handle

    def compaction(self, handle: str, wait_ms: int, early: bool) -> dict:
        assert early, "an answer does not wait for what is measured"
        if self.unknown > 0:
            self.unknown -= 1
            return {"state": "unknown", "reason": "there is none"}
        if self.state == "pending":
            time.sleep(wait_ms / 1000)
        return {"state": self.state, "reason": self.reason}

    def delete_compaction(self, handle: str) -> bool:
        if self.unknown > 0:
            self.unknown -= 1
            return False
        self.deleted.append(handle)
        return self.prompts.pop(handle, None) is not None

    def close(self) -> None:
        pass


class FakeVllm:
    def __init__(self, caches: Caches, max_model_len: int = 4096):
        self.caches = caches
        self.max_model_len = max_model_len
        self.refusal = ""
        self.failure: tuple[int, dict] | None = None  # status and payload of every completion
        self.failure_headers: dict[str, str] = {}
        self.break_after: int | None = None  # tokens, after which a stream ends with an error
        self.break_with: bytes = json.dumps(_error(500, "the engine died")).encode()
        self.merged = 1  # tokens of one event, as when whoever reads it lags behind
        self.aborts = False  # completions end before their first token
        self.stall = False  # a stream stops after its first token, until the client hangs up
        self.healthy = True
        self.seen: list[dict] = []
        self.aborted = 0

    def application(self) -> web.Application:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_post("/v1/completions", self.completions)
        application.router.add_post("/v1/chat/completions", self.chat)
        application.router.add_post("/tokenize", self.tokenize)
        application.router.add_get("/v1/models", self.models)
        application.router.add_get("/health", self.health)
        return application

    async def health(self, _request):
        return web.Response(status=200 if self.healthy else 503)

    async def models(self, _request):
        return web.json_response({"object": "list", "data": [{"id": "model", "max_model_len": self.max_model_len}]})

    async def tokenize(self, request):
        body = await request.json()
        ids = encode(body["prompt"]) if "prompt" in body else encode(self._template(body))
        return web.json_response({"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids})

    @staticmethod
    def _template(body: dict) -> str:
        def text(content):
            return content if isinstance(content, str) else "".join(part["text"] for part in content)

        return "".join(f"<{one['role']}>{text(one['content'])}" for one in body["messages"]) + "<assistant>"

    async def completions(self, request):
        body = await request.json()
        prompt = body["prompt"] if isinstance(body["prompt"], list) else encode(body["prompt"])
        return await self._answer(request, body, prompt, chat=False)

    async def chat(self, request):
        body = await request.json()
        return await self._answer(request, body, encode(self._template(body)), chat=True)

    async def _answer(self, request, body, prompt, chat):
        self.seen.append({"path": request.path, "headers": dict(request.headers), **body})
        if self.failure:
            status, payload = self.failure
            return web.json_response(payload, status=status, headers=self.failure_headers)
        if self.aborts:
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "abort", "stop_reason": None, "token_ids": []}
            return web.json_response({"id": "cmpl-fake", "created": 1, "choices": [choice], "usage": _usage(prompt, 0)})
        ours = (body.get("kv_transfer_params") or {}).get("kvern", {})
        context = prompt
        if "handle" in ours:
            handle = ours["handle"]
            slots = int(handle.split(".")[2])
            if body.get("cache_salt") != handle or handle not in self.caches.prompts or len(prompt) <= slots:
                return web.json_response(_error(500, "Internal server error"), status=500)
            context = self.caches.prompts[handle] + prompt[slots:]
        try:
            choices = [self._say(body, context, prompt, chat, index) for index in range(body.get("n") or 1)]
            if body.get("stream"):
                return await self._stream(request, body, prompt, choices, chat)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        answer = {"id": "cmpl-fake", "object": "chat.completion" if chat else "text_completion", "created": 1, "model": "model"}
        answer["choices"] = [self._whole(index, steps, body, chat, prompt) for index, steps in enumerate(choices)]
        answer["usage"] = _usage(prompt, sum(len(steps) for steps in choices))
        if "compact" in ours:
            answer["kv_transfer_params"] = {"kvern": {"compact": self._make(prompt)}}
        return web.json_response(answer)

    def _make(self, prompt):
        if self.refusal:
            return {"state": "refused", "reason": self.refusal}
        slots = len(prompt) // 4 + 1
        handle = self.caches.make(prompt, slots)
        return {"state": "pending", "handle": handle, "prompt_tokens": len(prompt), "slots": slots, "method": "cake | int8"}

    def _say(self, body, context, prompt, chat, index):
        """One choice, token by token: (token, text that can be given out, finish, stop reason)."""
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or (self.max_model_len - len(prompt) if chat else 16)
        known = decode(context)
        script = known[known.rindex("«") + 1 : known.rindex("»")]
        begin = len(context) - 1 - context[::-1].index(ord("»"))
        said = context[begin + 1 :]
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        held_back = max(map(len, stops), default=1) - 1
        steps, generated, given = [], [], 0
        target = encode(script) + [END]
        # As vLLM's detokeniser: with half a character at its end, the prompt is part of the first text.
        leak = decode(prompt[:-1]) if prompt[-1] == EMOJI_HALVES[0] else ""
        while True:
            position = len(said) + len(generated)
            token = target[position % len(target)]
            generated.append(token)
            lead = [prompt[-1]] if leak else []
            text = leak + decode(lead + generated)
            if text.endswith("\ufffd"):
                text = text[:-1]
            finish = reason = None
            if token == END and not body.get("ignore_eos"):
                finish = "stop"
            elif len(generated) == limit:
                finish = "length"
            fresh = len(text) - len(decode([token]))
            founds = [(text.find(stop, max(0, fresh - len(stop) + 1)), stop) for stop in stops]
            ends = [(found + len(stop), stop) for found, stop in founds if found >= 0]
            if ends:
                end, stop = min(ends, key=lambda one: one[0])
                text = text[: end if body.get("include_stop_str_in_output") else end - len(stop)]
                finish, reason = "stop", stop
            out = text[given:] if finish else text[given : max(given, len(text) - held_back)]
            given += len(out)
            steps.append((token, out, finish, reason))
            if finish:
                return steps

    @staticmethod
    def _logprobs(steps, body, chat, offset=0):
        if body.get("logprobs") in (None, False):
            return None
        tokens = [_text_of(step[0]) for step in steps]
        top = body.get("top_logprobs" if chat else "logprobs") or 0
        tops = [{chr(ord("a") + i): -0.5 - i for i in range(top)} for _ in steps]
        if chat:
            def entry(token, value):
                return {"token": token, "logprob": value, "bytes": list(token.encode())}

            return {"content": [{**entry(token, -0.25), "top_logprobs": [entry(*one) for one in best.items()]}
                                for token, best in zip(tokens, tops)]}
        offsets = [offset + sum(len(one) for one in tokens[:i]) for i in range(len(tokens))]
        return {"text_offset": offsets, "token_logprobs": [-0.25] * len(steps), "tokens": tokens, "top_logprobs": tops}

    def _whole(self, index, steps, body, chat, prompt):
        text = "".join(step[1] for step in steps)
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": index, **content, "logprobs": self._logprobs(steps, body, chat),
                  "finish_reason": steps[-1][2], "stop_reason": steps[-1][3]}
        if body.get("return_token_ids"):
            choice["token_ids"] = [step[0] for step in steps]
            if not chat:
                choice["prompt_token_ids"] = prompt
        return choice

    async def _stream(self, request, body, prompt, choices, chat):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event):
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        options = body.get("stream_options") or {}
        head = {"id": "cmpl-fake", "object": "chat.completion.chunk" if chat else "text_completion", "created": 1, "model": "model"}
        for index, steps in enumerate(choices):
            offset = 0
            groups = [steps[begin : begin + self.merged] for begin in range(0, len(steps), self.merged)]
            count = 0
            for group in groups:
                count, step, first = count + len(group), group[-1], count == 0
                if self.break_after is not None and count > self.break_after:
                    await response.write(b"data: " + self.break_with + b"\n\n")
                    await response.write(b"data: [DONE]\n\n")
                    return response
                if self.stall and not first:
                    await asyncio.Event().wait()
                if chat and first:
                    await send({**head, "choices": [{"index": index, "delta": {"role": "assistant", "content": ""}}]})
                text = "".join(one[1] for one in group)
                choice = {"index": index, **({"delta": {"content": text}} if chat else {"text": text})}
                choice |= {"logprobs": self._logprobs(group, body, chat, offset), "finish_reason": step[2], "stop_reason": step[3]}
                offset += sum(len(_text_of(one[0])) for one in group)
                event = {**head, "choices": [choice]}
                if options.get("continuous_usage_stats"):
                    event["usage"] = _usage(prompt, count)
                if body.get("return_token_ids"):
                    choice["token_ids"] = [one[0] for one in group]
                    if first and not chat:
                        choice["prompt_token_ids"] = prompt
                await send(event)
        if options.get("include_usage"):
            await send({**head, "choices": [], "usage": _usage(prompt, sum(map(len, choices)))})
        await response.write(b"data: [DONE]\n\n")
        return response


def _usage(prompt, tokens):
    return {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}


def _error(status, message):
    return {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}
