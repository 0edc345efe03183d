"""The vLLM servers behind the proxy: requests, streamed events, and errors as they came."""

import asyncio
import contextlib
import json
import logging

from aiohttp import ClientError, ClientSession, web

logger = logging.getLogger("kvern.proxy")

_DROPPED_HEADERS = ("content-length", "content-encoding", "transfer-encoding", "connection", "keep-alive", "date", "server")


def _kept(headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _DROPPED_HEADERS}


class ServerError(Exception):
    """What a server answered in place of an answer; told to the client as it came. payload: {"error": {…}}. headers:
    such as Retry-After, without those that describe the body."""

    def __init__(self, status: int, payload: dict, headers: dict[str, str] | None = None):
        super().__init__(str(payload["error"].get("message", payload)))
        self.status = status
        self.payload = payload
        self.headers = headers or {}


def error_payload(status: int, message: str, kind: str) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Server:
    """One vLLM server."""

    def __init__(self, session: ClientSession, url: str):
        self._session = session
        self.url = url

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, headers: dict, body: dict | None = None):
        try:
            async with self._session.request(method, self.url + path, json=body, headers=headers) as response:
                yield response
        except (ClientError, asyncio.TimeoutError) as error:
            message = f"{self.url} cannot be reached or went away: {error or type(error).__name__}"
            raise ServerError(502, error_payload(502, message, "BadGateway")) from error

    async def json(self, method: str, path: str, headers: dict, body: dict | None = None) -> dict:
        """Throws ServerError for every answer but 200."""
        async with self._request(method, path, headers, body) as response:
            if response.status != 200:
                raise await _server_error(response)
            return _parsed(await response.read(), self.url)

    async def healthy(self, headers: dict) -> bool:
        try:
            async with self._request("GET", "/health", headers) as response:
                return response.status == 200
        except ServerError:
            return False

    async def events(self, path: str, headers: dict, body: dict):
        """The events of a streamed answer. Throws ServerError, also in the middle."""
        async with self._request("POST", path, headers, body) as response:
            if response.status != 200:
                raise await _server_error(response)
            async for data in _event_data(response.content):
                event = _parsed(data, self.url)
                if event.get("error") or ("error" in event and not event.get("choices")):
                    payload = _as_openai(500, event, data.decode(errors="replace"))
                    code = payload["error"].get("code")
                    raise ServerError(code if type(code) is int and 400 <= code < 600 else 500, payload)
                yield event

    async def relay(self, request: web.Request, headers: dict, body: dict) -> web.StreamResponse:
        """Serves the client's request as it is, byte by byte."""
        async with self._request(request.method, request.path, headers, body) as answer:
            response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
            await response.prepare(request)
            try:
                async for data in answer.content.iter_any():
                    await response.write(data)
            except (ClientError, asyncio.TimeoutError) as error:
                # The headers are out: breaking off is all that tells the client.
                logger.warning("%s went away in the middle of an answer: %s", self.url, error)
                if request.transport is not None:
                    request.transport.abort()
                return response
            await response.write_eof()
            return response


async def _server_error(response) -> ServerError:
    text = await response.text(errors="replace")
    try:
        payload = json.loads(text)
    except ValueError:
        payload = None
    headers = {name: value for name, value in _kept(response.headers).items() if name.lower() != "content-type"}
    return ServerError(response.status, _as_openai(response.status, payload, text or response.reason or ""), headers)


def _as_openai(status: int, payload, text: str) -> dict:
    """The payload if OpenAI's clients can read it. Middlewares of vLLM and gateways answer {"error": "Unauthorized"},
    {"detail": …}, or text."""
    error = payload.get("error") if isinstance(payload, dict) else None
    if isinstance(error, dict):
        return payload
    told = [error] + [payload.get(name) for name in ("message", "detail") if isinstance(payload, dict)]
    message = next((one for one in told if isinstance(one, str) and one), text)
    return error_payload(status, message[:2000], "UpstreamError")


def _parsed(data: bytes, url: str) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        message = f"{url} answered with something else than a JSON object"
        raise ServerError(502, error_payload(502, message, "BadGateway"))
    return value


async def _event_data(content):
    """The data of server-sent events, until [DONE]. One line can be megabytes long."""
    pending = bytearray()
    async for part in content.iter_any():
        pending += part
        if b"\n" not in part:
            continue
        *lines, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return
            yield data
    error = "the server ended its answer before it was complete"
    raise ServerError(502, error_payload(502, error, "BadGateway"))
