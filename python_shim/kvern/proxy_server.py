"""The vLLM servers behind the proxy: requests, streamed events, and errors as they came."""

import asyncio
import contextlib
import json
import logging

from aiohttp import ClientError, ClientSession, web

logger = logging.getLogger("kvern.proxy")

_DROPPED_HEADERS = ("content-length", "content-encoding", "transfer-encoding", "connection", "keep-alive", "date", "server")


class ServerError(Exception):
    """What a server answered in place of an answer; told to the client as it came."""

    def __init__(self, status: int, payload: dict):
        super().__init__(str(payload.get("error", {}).get("message", payload)))
        self.status = status
        self.payload = payload


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
            return await response.json(content_type=None)

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
                event = json.loads(data)
                if "error" in event:
                    code = event["error"].get("code") if isinstance(event["error"], dict) else None
                    raise ServerError(code if isinstance(code, int) else 500, event)
                yield event

    async def relay(self, request: web.Request, headers: dict, body: dict) -> web.StreamResponse:
        """Serves the client's request as it is, byte by byte."""
        async with self._request(request.method, request.path, headers, body) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _DROPPED_HEADERS}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            try:
                async for data in answer.content.iter_any():
                    await response.write(data)
            except ClientError as error:
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
    if not isinstance(payload, dict):
        payload = error_payload(response.status, text[:2000] or response.reason or "", "UpstreamError")
    return ServerError(response.status, payload)


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
