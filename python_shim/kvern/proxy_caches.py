"""Compact caches as the proxy sees them: made by a prefill server, waited for and deleted through the daemon."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import time

from kvern.handles import Handle, HandleError
from kvern.proxy_settings import Settings

logger = logging.getLogger("kvern.proxy")

_WAIT_MS = 500  # of one call of the daemon, so that a client that left is not waited for
# The prefill server answers before the daemon has been asked: the prompt's chunks are stored in between, which takes
# milliseconds on one host, and many seconds for a long prompt over a slow network.
_APPEAR_POLL_SECONDS = (0.005, 0.1)  # at first, and at most
_DELETE_POLL_SECONDS = 0.5
_CONNECT_MS = 2000  # at the start, to tell of a daemon that is not there
_DAEMON_THREADS = 64  # as many requests wait for their caches at once


class NotCompact(Exception):
    """Why this answer does not come from a compact cache. code: a word for the metrics."""

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Compact:
    """A compact cache that a prefill server has promised."""

    handle: Handle
    method: str

    @classmethod
    def promised(cls, answer: dict, prompt_tokens: int) -> "Compact":
        """By the answer to the request for the first token. Throws NotCompact."""
        told = answer.get("kv_transfer_params")
        for key in ("kvern", "compact"):
            told = told.get(key) if isinstance(told, dict) else None
        if not isinstance(told, dict):
            raise NotCompact("refused", "the prefill server says nothing of a compact cache; does it run the KvernConnector?")
        if told.get("state") == "refused":
            raise NotCompact("refused", f"refused by the prefill server: {told.get('reason')}")
        try:
            handle = Handle.parse(told.get("handle"))
        except HandleError as error:
            raise NotCompact("refused", f"the prefill server's answer: {error}") from None
        if handle.prompt_tokens != prompt_tokens:
            raise NotCompact("refused", f"the handle is for {handle.prompt_tokens} tokens, the prompt has {prompt_tokens}")
        return cls(handle, str(told.get("method", "")))

    def told(self) -> dict:
        """What the client is told of it; the handle is gone by then."""
        return {
            "state": "ready",
            "prompt_tokens": self.handle.prompt_tokens,
            "slots": self.handle.slots,
            "method": self.method,
        }


class Caches:
    """The daemon's side of handles, on threads of its own."""

    def __init__(self, client, appear_seconds: float):
        """client: of the native binding, or anything with its compaction() and delete_compaction(). appear_seconds: until
        the daemon knows of a cache, at most."""
        self._client = client
        self._appear_seconds = appear_seconds
        self._threads = concurrent.futures.ThreadPoolExecutor(_DAEMON_THREADS, thread_name_prefix="kvern-caches")

    @classmethod
    def connect(cls, settings: Settings) -> "Caches":
        from kvern import _kvern, embedded

        address = settings.daemon or f"unix://{embedded.runtime_folder()}/kvernd.sock"
        client = _kvern.Client(
            address,
            scheduler=True,
            client_name="kvern proxy",
            server_key_file=settings.server_key_file,
            client_key_file=settings.client_key_file,
            insecure=settings.insecure,
        )
        if not client.wait_ready(_CONNECT_MS):
            logger.warning("No daemon at %s yet (%s); until there is one, answers are not compact.", address, client.problem)
        return cls(client, settings.ready_timeout_seconds)

    async def wait(self, handle: str, seconds: float) -> None:
        """Until the compact cache can be decoded from. Throws NotCompact."""
        start = time.monotonic()
        poll, slowest = _APPEAR_POLL_SECONDS
        while True:
            waited = time.monotonic() - start
            state = await self._call("compaction", handle, max(0, min(_WAIT_MS, int((seconds - waited) * 1000))), True)
            if state["state"] == "ready":
                return
            if state["state"] == "failed":
                raise NotCompact("failed", f"the compact cache was not made: {state.get('reason') or 'no reason given'}")
            if state["state"] == "unknown":
                if waited >= min(seconds, self._appear_seconds):
                    raise NotCompact("failed", f"the daemon knows of no such compact cache: {state.get('reason')}")
                await asyncio.sleep(poll)
                poll = min(2 * poll, slowest)
            elif waited >= seconds:
                raise NotCompact("late", f"the compact cache was not ready after {seconds:g} s (ready_timeout_seconds)")

    async def delete(self, handle: str) -> None:
        """Also of a cache that the daemon has yet to hear of, when the client left early."""
        deadline = time.monotonic() + self._appear_seconds
        try:
            while not await self._call("delete_compaction", handle) and time.monotonic() < deadline:
                await asyncio.sleep(_DELETE_POLL_SECONDS)
        except NotCompact as error:
            logger.warning("A compact cache stays until it expires: %s", error)

    async def _call(self, name: str, *arguments):
        try:
            function = getattr(self._client, name)
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except Exception as error:  # the binding's errors are told apart by their text alone
            raise NotCompact("daemon", f"the daemon did not answer: {error}") from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()
