"""bf16 comes back bit by bit; int8 comes back close."""

import pytest

from engine import difference
from models import smollm2
from prompts import prose


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon()


def agreement(one, other) -> float:
    return sum(a == b for a, b in zip(one.tokens, other.tokens)) / len(other.tokens)


def test_bf16_pages_are_restored_bit_by_bit(stage, daemon):
    engine = stage.engine(smollm2(), dtype="bfloat16", block_size=64).wait_started()
    text = prose("bf16", length=1500)
    cold = engine.generate(text, max_tokens=32)
    hit = engine.generate(text, max_tokens=32)
    pages = engine.page_digests()
    engine.forget_kv()
    restored = engine.generate(text, max_tokens=32)
    assert restored.cached_tokens == hit.cached_tokens == 1472
    there = engine.page_digests()
    common = pages.keys() & there.keys()
    assert len(common) >= 23
    # The last page may hold tokens of this run.
    assert all(pages[key] == there[key] for key in common)
    print(f"bf16: {difference(restored, hit)}; {difference(hit, cold)}")
    assert restored.same_as(hit), difference(restored, hit)
    engine.stop()


def test_int8_takes_about_half_and_agrees(stage, daemon):
    before = daemon.bytes_stored()
    engine = stage.engine(smollm2(), dtype="bfloat16", kvern={"codec": "int8"}).wait_started()
    text = prose("int8", length=1500)
    cold = engine.generate(text, max_tokens=32)
    raw, encoded = (after - then for after, then in zip(daemon.bytes_stored(), before))
    engine.forget_kv()
    restored = engine.generate(text, max_tokens=32)
    assert restored.cached_tokens == 1472
    print(f"int8: {encoded / raw:.3f} of the raw bytes; {agreement(restored, cold):.2f} of tokens agree; {difference(restored, cold)}")
    assert encoded / raw < 0.6
    assert agreement(restored, cold) > 0.2, "so little agreement means wrong pages, not quantisation"
    engine.stop()
