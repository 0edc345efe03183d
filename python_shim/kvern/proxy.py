"""An OpenAI-compatible front that lets ordinary clients decode from compact caches.

usage: kvern proxy --prefill http://host:8000 [--decode http://host:8001] [--compact 'cake(budget=12%) | int8'] …

A prompt goes to the prefill server, which computes it, gives the first token and has a compact cache made of it; the
rest of the answer comes from the decode server, over the compact cache. Both are `vllm serve` with the KvernConnector
and one kvernd, and kv_load_failure_policy = fail on the decode server. One server can do both. What cannot be made
compact is served in full. Settings can stand in a TOML file (--config), with the same names.
"""

import asyncio
import contextlib
import json
import logging
import sys
import time

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvern import proxy_request as requests
from kvern.config import OptionError
from kvern.groups import Refused
from kvern.proxy_answer import Shape
from kvern.proxy_caches import Caches, Compact, NotCompact
from kvern.proxy_decode import Choice, Decoding
from kvern.proxy_server import Server, ServerError, error_payload
from kvern.proxy_settings import Settings, read
from kvern.task_kind import task_kind

logger = logging.getLogger("kvern.proxy")

MAX_REQUEST_BYTES = 256 << 20  # a million tokens as text, many times over
# Of connections to the servers. uvicorn closes idle ones after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), and a request that
# crosses with that fails.
IDLE_SECONDS = 4
# Tokens that one after the other may be the beginning of a stop string.
MOST_FIRST_TOKENS = 16
# Reasons that lie in the request or its answer, not in the state of the servers: asking again would not help.
_LASTING = ("request", "first token")
_PASSED_HEADERS = ("authorization", "x-request-id", "traceparent", "tracestate")


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self.requests = Counter("kvern_proxy_requests", "Requests by how they were answered", ["path"], **options)
        self.not_compact = Counter("kvern_proxy_not_compact", "Answers that were not compact", ["reason"], **options)
        self.prompt_tokens = Counter("kvern_proxy_prompt_tokens", "Prompt tokens of compact answers", **options)
        self.slots = Counter("kvern_proxy_slots", "Slots that stood for them", **options)
        self.in_flight = Gauge("kvern_proxy_in_flight", "Requests under way", **options)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        self.seconds = Histogram("kvern_proxy_seconds", "Time of each part", ["part"], buckets=buckets, **options)

    @contextlib.contextmanager
    def timed(self, part: str):
        start = time.monotonic()
        yield
        self.seconds.labels(part).observe(time.monotonic() - start)


class Proxy:
    def __init__(self, settings: Settings, caches: Caches):
        self.settings = settings
        self.caches = caches
        self.metrics = Metrics()
        self._background: set[asyncio.Task] = set()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_errors_as_openai])
        application.cleanup_ctx.append(self._servers)
        application.router.add_post("/v1/completions", self.completions)
        application.router.add_post("/v1/chat/completions", self.chat_completions)
        application.router.add_get("/v1/models", self.models)
        application.router.add_get("/health", self.health)
        application.router.add_get("/metrics", self.metrics_text)
        return application

    async def _servers(self, _application):
        timeout = ClientTimeout(total=None, sock_connect=self.settings.connect_timeout_seconds)
        connector = TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        async with ClientSession(connector=connector, timeout=timeout) as session:
            self.prefill = Server(session, self.settings.prefill)
            self.decode = Server(session, self.settings.decode)
            yield
            if self._background:
                await asyncio.wait(self._background, timeout=self.settings.connect_timeout_seconds)
        self.caches.close()

    # ---- what clients call

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=False)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, chat=True)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(await self.decode.json("GET", "/v1/models", _headers(request)))

    async def health(self, request: web.Request) -> web.Response:
        servers = {server.url: server for server in (self.prefill, self.decode)}
        healthy = await asyncio.gather(*(server.healthy(_headers(request)) for server in servers.values()))
        sick = [url for url, well in zip(servers, healthy) if not well]
        return web.Response(status=503 if sick else 200, text="".join(f"{url} is not healthy\n" for url in sick))

    async def metrics_text(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain")

    # ---- one request

    async def _serve(self, request: web.Request, chat: bool) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            raise ServerError(400, error_payload(400, f"the request is not JSON: {error}", "BadRequestError")) from None
        if not isinstance(body, dict):
            raise ServerError(400, error_payload(400, "the request is not a JSON object", "BadRequestError"))
        headers = _headers(request)
        with self.metrics.in_flight.track_inprogress():
            if not requests.wants_full(body):
                try:
                    return await self._serve_compact(request, headers, chat, body)
                except NotCompact as error:
                    self._give_up(error)
            self.metrics.requests.labels("ordinary").inc()
            return await self.decode.relay(request, headers, requests.without_wish(body))

    def _give_up(self, error: NotCompact) -> None:
        """Returns when the request shall be served in full; throws ServerError when it shall fail."""
        self.metrics.not_compact.labels(error.code).inc()
        if error.code == "short":
            return
        logger.info("Not compact: %s", error)
        if self.settings.on_failure == "error":
            status, kind = (400, "BadRequestError") if error.code in _LASTING else (503, "ServiceUnavailableError")
            raise ServerError(status, error_payload(status, f"no compact cache: {error}", kind))

    async def _serve_compact(self, request, headers: dict, chat: bool, body: dict) -> web.StreamResponse:
        """Throws NotCompact as long as nothing has been answered."""
        against = requests.obstacle(chat, body)
        if against:
            raise NotCompact("request", against)
        halves = await self._tokenised(headers, chat, body)
        with self.metrics.timed("prefill"):
            first = await self.prefill.json("POST", "/v1/completions", headers, halves.first(self._making(chat, body)))
        compact = None
        try:
            try:
                compact = Compact.promised(first, len(halves.prompt))
            except NotCompact as error:
                self._give_up(error)
            told = first["choices"]
            if halves.choices > 1:
                told += (await self.prefill.json("POST", "/v1/completions", headers, halves.other_firsts()))["choices"]
            choices = [Choice(index, halves) for index in range(halves.choices)]
            for choice, choice_told in zip(choices, told, strict=True):
                choice.begin(choice_told)
                await self._past_stop(headers, halves, choice)
            return await self._answer(request, headers, halves, first, choices, compact)
        finally:
            if compact is not None:
                self._in_background(self.caches.delete(compact.handle.text))

    async def _past_stop(self, headers: dict, halves: requests.Halves, choice: Choice) -> None:
        """Goes on token by token while the text may be the beginning of a stop string. So the decode server sees either
        all of one or nothing, and no token has been given out that belongs behind it. Throws NotCompact."""
        while choice.may_stop:
            if len(choice.tokens) >= MOST_FIRST_TOKENS:
                raise NotCompact("first token", f"{MOST_FIRST_TOKENS} tokens are the beginning of a stop string")
            body = halves.one_more(choice.index, choice.tokens)
            choice.begin((await self.prefill.json("POST", "/v1/completions", headers, body))["choices"][0])

    async def _tokenised(self, headers: dict, chat: bool, body: dict) -> requests.Halves:
        with self.metrics.timed("tokenise"):
            if not chat and isinstance(body["prompt"], list):
                prompt = body["prompt"]
                models = (await self.prefill.json("GET", "/v1/models", headers))["data"]
                known = {model["id"]: model.get("max_model_len") for model in models}
                longest = known.get(body.get("model"), next(iter(known.values()), None))
            else:
                answer = await self.prefill.json("POST", "/tokenize", headers, requests.tokenize_body(chat, body))
                prompt, longest = answer["tokens"], answer["max_model_len"]
        if len(prompt) < self.settings.min_prompt_tokens:
            raise NotCompact("short", f"the prompt has {len(prompt)} tokens, fewer than {self.settings.min_prompt_tokens}")
        if longest is None or len(prompt) >= longest:
            raise NotCompact("request", "the prompt is too long for the model")
        wanted, room = requests.wanted_tokens(chat, body), longest - len(prompt)
        if wanted is not None and wanted > room:
            raise NotCompact("request", f"the answer may have {wanted} tokens, the model has room for {room}")
        most = room if wanted is None else wanted
        if (body.get("min_tokens") or 0) > most:
            raise NotCompact("request", f"min_tokens is {body['min_tokens']}, the answer may have {most}")
        return requests.Halves(chat, body, prompt, most)

    def _making(self, chat: bool, body: dict) -> dict:
        """kv_transfer_params["kvern"] that ask for the compact cache: the client's own wishes, otherwise the settings."""
        own = requests.ours_of(body)
        making = {"compact": self.settings.compact, "ttl_seconds": self.settings.ttl_seconds}
        making |= {name: own[name] for name in ("compact", "ttl_seconds", "task") if name in own}
        if "task" not in making and str(making["compact"]).lstrip().startswith("windowkv"):
            auto = self.settings.task == "auto"
            making["task"] = task_kind(requests.question_text(chat, body)) if auto else self.settings.task
        return making

    async def _answer(self, request, headers, halves, first, choices, compact) -> web.StreamResponse:
        shape = Shape(halves.chat, first, halves.prompt, bool(halves.body.get("return_token_ids")), halves.logprobs or 0)
        decoding = Decoding(self.decode, headers, halves, self.caches, self._give_up)
        start = time.monotonic()
        collected = [[] for _ in choices]
        async with contextlib.aclosing(
            decoding.pieces(choices, compact, self.settings.ready_timeout_seconds)
        ) as pieces:
            if halves.body.get("stream"):
                response = await _stream(request, shape, pieces, halves.body.get("stream_options") or {})
            else:
                async for piece in pieces:
                    collected[piece.index].append(piece)
                told = compact.told() if decoding.compact else None
                response = web.json_response(shape.whole(collected, told))
        self.metrics.seconds.labels("decode").observe(time.monotonic() - start)
        self.metrics.requests.labels("compact" if decoding.compact else "full").inc()
        if decoding.compact:
            self.metrics.prompt_tokens.inc(compact.handle.prompt_tokens)
            self.metrics.slots.inc(compact.handle.slots)
        return response

    def _in_background(self, coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _headers(request: web.Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() in _PASSED_HEADERS}


_OWN_FAILURE = error_payload(500, "kvern proxy failed; its log says why", "InternalServerError")


async def _send(response: web.StreamResponse, event: dict) -> None:
    await response.write(b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")


async def _stream(request: web.Request, shape: Shape, pieces, options: dict) -> web.StreamResponse:
    """Server-sent events; once they have begun, an error is one of them."""
    tokens: dict[int, int] = {}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for piece in pieces:
            tokens[piece.index] = piece.tokens
            for event in shape.chunks(piece):
                if options.get("continuous_usage_stats"):
                    event["usage"] = shape.usage(piece.tokens)
                await _send(response, event)
        if options.get("include_usage"):
            await _send(response, shape.last_chunk(sum(tokens.values())))
    except ServerError as error:
        await _send(response, error.payload)
    except ConnectionResetError:  # the client has left
        raise
    except Exception:
        logger.exception("%s %s failed in the middle of its answer", request.method, request.path)
        await _send(response, _OWN_FAILURE)
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


@web.middleware
async def _errors_as_openai(request: web.Request, handler):
    try:
        return await handler(request)
    except ServerError as error:
        return web.json_response(error.payload, status=error.status, headers=error.headers)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}"
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        return web.json_response(error_payload(error.status, message, kind), status=error.status)
    except ConnectionResetError:  # the client has left
        raise
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return web.json_response(_OWN_FAILURE, status=500)


def main(given: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = read(sys.argv[2:] if given is None else given, __doc__)
        proxy = Proxy(settings, Caches.connect(settings))
    except (OptionError, Refused) as error:
        sys.exit(f"kvern proxy: {error}")
    host, _, port = settings.listen.rpartition(":")
    logger.info("%s: prompts to %s, answers from %s, %s", settings.listen, settings.prefill, settings.decode, settings.compact)
    # A client that hangs up ends what is done for it, on both servers.
    web.run_app(
        proxy.application(), host=host.strip("[]"), port=int(port), handler_cancellation=True, access_log=None, print=None
    )
