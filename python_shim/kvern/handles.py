"""Handles of compact caches: what they say, and the names under which the store keeps what belongs to them.

A handle is the text kvc1.N.M.EXPIRY.DIGITS: N prompt tokens, M slots that a request claims, the end of its life in unix
seconds, 16 random bytes, so that nobody guesses it, and 16 bytes that tell whose prompt it is to who has the prompt. kvc2
(layout pool) or kvc3 (shift) in front: the layers keep different numbers of slots, and only an engine that gives each
layer its own (kvern/ragged_attention.py) can read it. Who has the handle may read the cache; logs get `Handle.short`.
"""

import dataclasses
import hashlib
import re
import secrets
import struct
from collections.abc import Sequence

_LAYOUTS = ("rectangular", "pool", "shift")
PREFIXES = ("kvc1.", "kvc2.", "kvc3.")  # by layout
_TEXT = re.compile(r"kvc([123])\.([1-9][0-9]{0,8})\.([1-9][0-9]{0,8})\.([1-9][0-9]{0,11})\.([0-9a-f]{64})")
_SECRET_DIGITS = _PROMPT_DIGITS = 32
MAX_HASH_BYTES = 32


class HandleError(ValueError):
    """A text that is no handle; says why."""


@dataclasses.dataclass(frozen=True)
class Handle:
    text: str
    prompt_tokens: int  # N
    slots: int  # M <= N
    expires_at: int  # unix seconds
    layout: str = "rectangular"

    @property
    def ragged(self) -> bool:
        return self.layout != "rectangular"

    @classmethod
    def parse(cls, text) -> "Handle":
        """Throws HandleError."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise HandleError("the handle is malformed: it must be kvc1.N.M.EXPIRY (or kvc2, kvc3) and 64 hexadecimal digits")
        prompt_tokens, slots, expires_at = (int(match[i]) for i in (2, 3, 4))
        if slots > prompt_tokens:
            raise HandleError(f"the handle claims {slots} slots for a prompt of {prompt_tokens} tokens")
        return cls(text, prompt_tokens, slots, expires_at, _LAYOUTS[int(match[1]) - 1])

    @classmethod
    def make(cls, prompt: Sequence[int], slots: int, expires_at: int, layout: str = "rectangular") -> "Handle":
        """A new one, unlike any other. prompt: its token ids."""
        named = f"{PREFIXES[_LAYOUTS.index(layout)]}{len(prompt)}.{slots}.{expires_at}.{secrets.token_hex(_SECRET_DIGITS // 2)}"
        return cls.parse(named + _prompt_digits(named, prompt))

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether these token ids begin with the prompt that the cache was made of."""
        named, digits = self.text[:-_PROMPT_DIGITS], self.text[-_PROMPT_DIGITS:]
        return len(prompt) >= self.prompt_tokens and _prompt_digits(named, prompt[: self.prompt_tokens]) == digits

    @property
    def short(self) -> str:
        """For logs: names the handle to who knows it, and is of no use to others."""
        return f"{self.text[: -64]}{self.text[-64:-56]}…"

    def source_hashes(self, blocks: int, hash_bytes: int) -> bytes:
        """The names of the prompt's own blocks, joined, while the cache is being made."""
        return self._hashes(b"kvern compact source", blocks, hash_bytes)

    def slot_hashes(self, blocks: int, hash_bytes: int) -> bytes:
        """The names of the compact cache's blocks, joined."""
        return self._hashes(b"kvern compact slots", blocks, hash_bytes)

    def _hashes(self, kind: bytes, blocks: int, hash_bytes: int) -> bytes:
        prefix = kind + self.text.encode()
        return b"".join(hashlib.sha256(prefix + i.to_bytes(4, "little")).digest()[:hash_bytes] for i in range(blocks))


def _prompt_digits(named: str, prompt: Sequence[int]) -> str:
    return hashlib.sha256(named.encode() + struct.pack(f"<{len(prompt)}q", *prompt)).hexdigest()[:_PROMPT_DIGITS]


def is_handle_salt(salt) -> bool:
    """Whether a cache_salt is a handle or means to be one. Blocks under such a salt are a compact cache's, so a request
    that carries it decodes from the handle, whatever else it says."""
    return isinstance(salt, str) and salt.startswith(PREFIXES)
