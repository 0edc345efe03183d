"""The connector in vLLM's real scheduler; the model is make-believe but checks every KV row that it reads."""

import pytest


def prompt_of(count: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i) % 500 for i in range(count)]


def at_rest(engine):
    """Every block is free again, nothing is claimed or remembered."""
    side = engine.connector._scheduler
    assert engine.free_blocks == engine.kv_cache_config.num_blocks - 1
    assert side._matcher.claims == 0
    assert not side._states and not side._stores and side._holds.blocks == 0
    assert side.errors == 0 and all(worker._worker.errors == 0 for worker in engine.workers)


def test_a_stored_prompt_is_restored_in_the_same_engine(engine):
    one = engine()
    prompt = prompt_of(500)
    cold = one.generate(prompt)
    assert cold.num_cached_tokens if hasattr(cold, "num_cached_tokens") else True
    one.forget()
    warm = one.generate(prompt)
    assert list(warm.output_token_ids) == list(cold.output_token_ids)
    assert one.forwarded[warm.request_id] == 500 + 4 - 1 - 480
    at_rest(one)
