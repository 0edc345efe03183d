"""Handles of compact caches: what they say, and the names under which the store keeps what belongs to them.

A handle is the text kvc1.N.M.EXPIRY.DIGEST: N prompt tokens, M slots, the end of its life in unix seconds, and a SHA-256
with 16 random bytes in it, so that nobody guesses it. kvc2 in front: the layers keep different numbers of slots, M on
average, and only an engine that gives each layer its own (kvern/page_pool.py) can read it. Who has the handle may read the cache; logs get `Handle.short`.
"""

import dataclasses
import hashlib
import re
import secrets

PREFIXES = ("kvc1.", "kvc2.")
_TEXT = re.compile(r"kvc([12])\.([1-9][0-9]{0,8})\.([1-9][0-9]{0,8})\.([1-9][0-9]{0,11})\.([0-9a-f]{64})")
MAX_HASH_BYTES = 32


class HandleError(ValueError):
    """A text that is no handle; says why."""


@dataclasses.dataclass(frozen=True)
class Handle:
    text: str
    prompt_tokens: int  # N
    slots: int  # M <= N
    expires_at: int  # unix seconds
    ragged: bool = False

    @classmethod
    def parse(cls, text) -> "Handle":
        """Throws HandleError."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise HandleError("the handle is malformed: it must be kvc1.N.M.EXPIRY (or kvc2) and 64 hexadecimal digits")
        prompt_tokens, slots, expires_at = (int(match[i]) for i in (2, 3, 4))
        if slots > prompt_tokens:
            raise HandleError(f"the handle claims {slots} slots for a prompt of {prompt_tokens} tokens")
        return cls(text, prompt_tokens, slots, expires_at, match[1] == "2")

    @classmethod
    def make(
        cls, namespace: dict[str, str], spec: str, prompt_tokens: int, slots: int, expires_at: int, ragged: bool = False
    ) -> "Handle":
        """A new one, unlike any other. namespace: the facts that the cache's engine is registered under."""
        digest = hashlib.sha256()
        for part in (*(f"{name}={value}" for name, value in sorted(namespace.items())), spec):
            digest.update(len(part.encode()).to_bytes(4, "little") + part.encode())
        digest.update(f"{prompt_tokens}.{slots}.{expires_at}.".encode() + secrets.token_bytes(16))
        return cls.parse(f"{PREFIXES[ragged]}{prompt_tokens}.{slots}.{expires_at}.{digest.hexdigest()}")

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


def is_handle_salt(salt) -> bool:
    """Whether a cache_salt is a handle or means to be one. Blocks under such a salt are a compact cache's, so a request
    that carries it decodes from the handle, whatever else it says."""
    return isinstance(salt, str) and salt.startswith(PREFIXES)
