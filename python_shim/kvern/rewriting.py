"""Requests that decode from a compact cache and bring the whole prompt: on admission, the tokens that the cache was made of
give way to as many placeholders as it has slots. Clients see an ordinary request: any API, usage and echo as ever.

Fields of vLLM's own are changed, so an engine must allow it (kvern.rewrite), its version must be one that this was run
with, and a self-test compares a request that was rewritten with one that came so.
"""

import functools
import itertools

from kvern import compat
from kvern.handles import Handle, HandleError

RUN_WITH = ("0.32.",)  # by tests/e2e/test_rewriting.py
_MARK = "kvern_rewritten"


def is_rewritten(request) -> bool:
    return getattr(request, _MARK, False)


def rewrite(request, handle: Handle) -> None:
    """handle: compactions.handle_to_rewrite(). Throws HandleError and leaves the request as it was."""
    prompt = request.prompt_token_ids
    placeholders = _placeholders(prompt[: handle.prompt_tokens], handle.slots)
    penalty = getattr(request.sampling_params, "repetition_penalty", 1.0)
    if penalty != 1.0 and len(set(placeholders)) < len(set(prompt[: handle.prompt_tokens])):
        raise HandleError("its repetition_penalty needs more different tokens than the cache has slots")
    _set_prompt(request, placeholders + prompt[handle.prompt_tokens :], handle.text)
    setattr(request, _MARK, True)


def _placeholders(prompt: list[int], count: int) -> list[int]:
    """All different tokens of the prompt where they fit, since a repetition penalty sees them."""
    return list(itertools.islice(itertools.cycle(dict.fromkeys(prompt)), count))


def _set_prompt(request, tokens: list[int], salt: str) -> None:
    request.cache_salt = salt  # first: should anything below go wrong, the request fails by its salt
    request.prompt_token_ids = tokens  # the old list may be the client's too
    request._all_token_ids[:] = tokens  # others look at this list
    request.num_prompt_tokens = len(tokens)
    request.block_hashes.clear()
    request.update_block_hashes()


@functools.cache
def obstacle() -> str:
    """Why this vLLM's requests cannot be rewritten; empty: they can."""
    if not compat.VLLM_VERSION.startswith(RUN_WITH):
        return f"this is vLLM {compat.VLLM_VERSION}; rewriting was run with {', '.join(v + 'x' for v in RUN_WITH)}"
    try:
        return _self_test()
    except Exception as error:
        return f"the self-test failed ({type(error).__name__}: {error})"


def _self_test() -> str:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=2)

    def hashes(request) -> list[bytes]:
        """Of whole blocks of four tokens that have none yet."""
        tokens = list(request.all_token_ids)
        ends = range(4 * len(request.block_hashes) + 4, len(tokens) + 1, 4)
        return [repr((request.cache_salt, tokens[:end])).encode() for end in ends]

    def admitted(tokens: list[int], salt: str | None) -> "Request":
        return Request("kvern", tokens, sampling, None, arrival_time=0.0, cache_salt=salt, block_hasher=hashes)

    def fields(request) -> dict:
        values = vars(request) if hasattr(request, "__dict__") else {}
        return {name: list(value) if hasattr(value, "__getitem__") else value for name, value in values.items()}

    given, wanted = list(range(40)), [7] * 9 + list(range(30, 40))
    rewritten = admitted(given, None)
    _set_prompt(rewritten, wanted, "salt")
    found, expected = fields(rewritten), fields(admitted(wanted, "salt"))
    if not found or given != list(range(40)):
        return "a request's fields are not what they were"
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name, ()) != expected.get(name, ()))
    return f"a request that was rewritten differs from one that came so in {', '.join(differing)}" if differing else ""
