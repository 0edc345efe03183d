"""Compact caches for programs that use vLLM: ask for one, wait until it is there, decode from it.

    answer = ...                           # of a request with kv_transfer_params=wish("snapkv(budget=25%)")
    cache = CompactCache.from_answer(answer.kv_transfer_params)
    with Daemon("unix:///run/kvern/kvernd.sock") as daemon:
        daemon.wait(cache, seconds=30)
    llm.generate(**cache.offline(suffix, max_tokens=64))      # or POST cache.completion(suffix, model=...) to /v1/completions

Suffix: the token ids that follow the prompt, at least one. docs/compact-caches.md says what is refused.
"""

import dataclasses
import time

from kvern.handles import Handle


class CompactError(RuntimeError):
    """There is no such compact cache; the text says why."""


def wish(spec: str, *, ttl_seconds: int | None = None, task: str | None = None) -> dict:
    """kv_transfer_params of a request whose prompt shall become a compact cache. spec: docs/format.md, Codec chains; its
    first step picks the tokens. task, for windowkv: localisation or aggregation."""
    kvern = {"compact": spec, "ttl_seconds": ttl_seconds, "task": task}
    return {"kvern": {key: value for key, value in kvern.items() if value is not None}}


@dataclasses.dataclass(frozen=True)
class CompactCache:
    """Whoever has the handle may decode from it: treat it like a password."""

    handle: str
    prompt_tokens: int
    slots: int
    method: str
    expires_at: int  # unix seconds

    @classmethod
    def from_answer(cls, kv_transfer_params: dict | None) -> "CompactCache":
        """kv_transfer_params: as vLLM returned it with the request. Throws CompactError when none is being made."""
        answer = ((kv_transfer_params or {}).get("kvern") or {}).get("compact")
        if not isinstance(answer, dict):
            raise CompactError("the engine's answer says nothing of a compact cache; does it run the Kvern connector?")
        if answer.get("state") == "refused":
            raise CompactError(f"the engine makes no compact cache: {answer.get('reason')}")
        return cls(**{field.name: answer[field.name] for field in dataclasses.fields(cls)})

    def prompt(self, suffix: list[int], placeholder: int = 0) -> list[int]:
        """Token ids that stand for the cache and what follows it. placeholder: any id of the vocabulary; a repetition
        penalty sees it, the model does not."""
        if not suffix:
            raise CompactError("at least one token must follow the compact cache")
        return [placeholder] * Handle.parse(self.handle).slots + list(suffix)

    @property
    def kv_transfer_params(self) -> dict:
        return {"kvern": {"handle": self.handle}}

    @property
    def whole_prompt_params(self) -> dict:
        """kv_transfer_params of a request that brings the cache's prompt itself and what follows it, where the engine
        allows it (kvern.rewrite). No salt, no placeholders, any API."""
        return {"kvern": {"handle": self.handle, "rewrite": True}}

    def completion(self, suffix: list[int], placeholder: int = 0, **fields) -> dict:
        """The body of a POST to /v1/completions; fields: model, max_tokens and the like."""
        if fields.get("echo") or fields.get("prompt_logprobs") is not None:
            raise CompactError("a prompt of placeholders can neither be echoed nor scored")
        return {
            **fields,
            "prompt": self.prompt(suffix, placeholder),
            "cache_salt": self.handle,
            "kv_transfer_params": self.kv_transfer_params,
        }

    def offline(self, suffix: list[int], placeholder: int = 0, **sampling) -> dict:
        """Arguments of vllm.LLM.generate(); sampling: those of SamplingParams."""
        from vllm import SamplingParams

        extra = {**sampling.pop("extra_args", {}), "kv_transfer_params": self.kv_transfer_params}
        return {
            "prompts": {"prompt_token_ids": self.prompt(suffix, placeholder), "cache_salt": self.handle},
            "sampling_params": SamplingParams(extra_args=extra, **sampling),
        }


class Daemon:
    """What the daemon knows of compact caches. Calls block. options: of _kvern.Client, for instance tenants' key files."""

    def __init__(self, address: str, *, connect_seconds: float = 10, **options):
        """Throws CompactError when there is no daemon at the address."""
        from kvern import _kvern as native

        self._client = native.Client(address, scheduler=True, client_name="kvern.compact", **options)
        if not self._client.wait_ready(int(connect_seconds * 1000)):
            problem = self._client.problem
            self._client.close()
            raise CompactError(f"no daemon at {address}: {problem}")

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_) -> None:
        self._client.close()

    def state(self, cache: CompactCache | str) -> dict:
        """state (pending, ready, failed or unknown), reason, stored_bytes, raw_bytes, error_mean, error_max, ...: see
        Client.compaction in _kvern.pyi."""
        return self._client.compaction(_text(cache), 0)

    def wait(self, cache: CompactCache | str, seconds: float = 60, early: bool = False) -> dict:
        """Until it is ready and, unless early, its error measured: who decodes from it need not wait for that. Throws CompactError when it has failed, is not ready in time, or the daemon never hears of it:
        an engine hands a prompt over some moments after its answer."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            state = self._client.compaction(_text(cache), max(0, min(int(left * 1000), 60_000)), early)
            if state["state"] == "ready":
                return state
            if state["state"] == "failed":
                raise CompactError(f"the compact cache has failed: {state['reason']}")
            if left <= 0:
                raise CompactError(f"the compact cache is {state['state']} after {seconds:g} s: {state['reason']}")
            if state["state"] == "unknown":
                time.sleep(min(left, 0.01))

    def delete(self, cache: CompactCache | str) -> bool:
        """False when there was none."""
        return self._client.delete_compaction(_text(cache))

    def list(self) -> list[dict]:
        """Those of this client's tenant."""
        return self._client.compactions()


def _text(cache: CompactCache | str) -> str:
    return cache.handle if isinstance(cache, CompactCache) else cache
