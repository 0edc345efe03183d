"""Handles of compact caches: what they say and what is stored under them."""

import hashlib

import pytest

from kvern.handles import Handle, HandleError, is_handle_salt

DIGITS = "0123456789abcdef" * 4
TEXT = f"kvc1.1501.579.1800000000.{DIGITS}"


def test_a_handle_says_what_it_was_made_of():
    made = Handle.make(range(1501), 579, 1_800_000_000)
    assert Handle.parse(made.text) == made
    assert (made.prompt_tokens, made.slots, made.expires_at) == (1501, 579, 1_800_000_000)
    assert len(made.text) <= 128 and not set(made.text) & set("@/\\\0"), "it is a cache_salt too"


def test_a_handle_says_whether_its_layers_keep_different_numbers_of_slots():
    assert not Handle.parse(TEXT).ragged
    for prefix, layout in (("kvc2.", "pool"), ("kvc3.", "shift")):
        ragged = Handle.make(range(1501), 576, 1_800_000_000, layout)
        assert ragged.text.startswith(prefix) and ragged.ragged and Handle.parse(ragged.text) == ragged
        assert is_handle_salt(ragged.text) and ragged.layout == layout


def test_no_two_handles_are_alike():
    made = {Handle.make(range(10), 5, 1).text for _ in range(100)}
    assert len(made) == len({text[-32:] for text in made}) == 100, "who has no prompt learns nothing of it"


def test_a_handle_knows_its_prompt():
    prompt = [7, 0, 2**31, 5]
    handle = Handle.parse(Handle.make(prompt, 2, 1_800_000_000).text)
    assert handle.begins(prompt) and handle.begins([*prompt, 9])
    for other in ([], prompt[:3], [7, 0, 2**31, 6], [0, 7, 2**31, 5], [7, 0, 2**31, 6, 5]):
        assert not handle.begins(other)
    assert not Handle.parse(handle.text.replace(".2.", ".3.")).begins(prompt)


def test_the_names_of_blocks_are_those_that_the_daemon_works_out():
    handle = Handle.parse(TEXT)
    want = [hashlib.sha256(f"kvern compact slots{TEXT}".encode() + bytes([i, 0, 0, 0])).digest() for i in range(3)]
    assert handle.slot_hashes(3, 32) == b"".join(want)
    assert handle.slot_hashes(3, 16) == b"".join(block[:16] for block in want)
    assert handle.source_hashes(1, 32) == hashlib.sha256(f"kvern compact source{TEXT}".encode() + bytes(4)).digest()


@pytest.mark.parametrize(
    "other", [TEXT.replace(".1501.", ".1502."), TEXT.replace(".579.", ".578."), TEXT.replace("18000", "18001")]
)
def test_a_handle_that_says_something_else_names_other_blocks(other):
    assert Handle.parse(other).slot_hashes(1, 32) != Handle.parse(TEXT).slot_hashes(1, 32)


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "kvc1.",
        TEXT[:-1],
        TEXT + "0",
        TEXT + "\n",
        TEXT.upper(),
        TEXT.replace("kvc1", "kvc4"),
        TEXT.replace(".579.", ".0579."),
        TEXT.replace(".579.", ".0."),
        TEXT.replace(".579.", ".-5."),
        TEXT.replace(".579.", ".1502."),
        TEXT.replace(".1501.", ".99999999999."),
        TEXT.replace("579", "\u0665\u0667\u0669"),
    ],
)
def test_what_is_no_handle_is_refused(text):
    with pytest.raises(HandleError):
        Handle.parse(text)


def test_logs_never_show_a_whole_handle():
    short = Handle.parse(TEXT).short
    assert short.startswith("kvc1.1501.579.1800000000.01234567") and DIGITS not in short and len(short) < len(TEXT) - 50


def test_a_salt_that_means_to_be_a_handle_is_known():
    assert is_handle_salt(TEXT) and is_handle_salt("kvc1.broken")
    assert not any(is_handle_salt(salt) for salt in (None, "", "tenant-1", 7))
