"""Sliding-window layers: six KV-cache groups that share one memory."""

import pytest

from engine import difference
from models import random_gemma3
from prompts import tokens

LOAD_ONLY = {"kv_transfer_params": {"kvern": {"store": False}}}
NEITHER = {"kv_transfer_params": {"kvern": {"load": False, "store": False}}}


@pytest.fixture(scope="module")
def first(stage):
    stage.start_daemon()
    return stage.engine(random_gemma3()).wait_started()


@pytest.fixture(scope="module")
def second(stage, first):
    return stage.engine(random_gemma3(), max_num_batched_tokens=256).wait_started()


@pytest.mark.parametrize("length", [100, 130, 600, 992, 1000])
def test_a_prompt_is_restored(first, length):
    text = tokens("window", length, length=length)
    cold = first.generate(text, max_tokens=40)
    first.forget_kv()
    restored = first.generate(text, max_tokens=40)
    assert restored.cached_tokens >= length - 33
    assert restored.tokens == cold.tokens, difference(restored, cold)


def test_a_prompt_that_leaves_early_is_restored_or_recomputed(first):
    common = tokens("window leaves", length=1000)
    first.generate(common)
    first.forget_kv()
    for length in (100, 300, 700):
        text = common[:length] + tokens("window tail", length, length=50)
        reference = first.generate(text, max_tokens=40, **NEITHER)
        first.forget_kv()
        restored = first.generate(text, max_tokens=40, **LOAD_ONLY)
        assert restored.tokens == reference.tokens, difference(restored, reference)
        first.forget_kv()


def test_an_engine_with_chunked_prefill_stores_for_others(first, second):
    text = tokens("window chunked", length=1000)
    cold = second.generate(text, max_tokens=40)
    first.forget_kv()
    restored = first.generate(text, max_tokens=40)
    assert restored.cached_tokens >= 960
    assert restored.tokens == cold.tokens, difference(restored, cold)
    second.forget_kv()
    again = second.generate(text, max_tokens=40)
    assert again.cached_tokens >= 960
    assert again.tokens == cold.tokens, difference(again, cold)
