"""The basic path: the real model in fp32 stores its KV cache, and gets it back in this engine and in a new one.

Where the same tokens are recomputed as after a hit in vLLM's own prefix cache, tokens and log-probabilities are
bit-identical to those.
"""

import pytest

from engine import difference
from models import smollm2
from prompts import prose

NEITHER = {"kv_transfer_params": {"kvern": {"load": False, "store": False}}}
LOAD_ONLY = {"kv_transfer_params": {"kvern": {"store": False}}}


@pytest.fixture(scope="module")
def first(stage):
    stage.start_daemon()
    return stage.engine(smollm2()).wait_started()


@pytest.fixture(scope="module")
def second(stage, first):
    """A new process on the same daemon."""
    return stage.engine(smollm2()).wait_started()


def test_a_prompt_is_restored_after_the_prefix_cache_was_reset(stage, first):
    text = prose("reset", length=1000)
    cold = first.generate(text)
    hit = first.generate(text)
    first.forget_kv()
    restored = first.generate(text)
    assert (cold.cached_tokens, hit.cached_tokens, restored.cached_tokens) == (0, 992, 992)
    assert restored.tokens == cold.tokens, difference(restored, cold)
    assert restored.same_as(hit), difference(restored, hit)
    assert first.metrics()["vllm:external_prefix_cache_hits"] >= 992


def test_a_new_engine_restores_what_another_stored(first, second):
    text = prose("new engine", length=1000)
    cold = first.generate(text)
    hit = first.generate(text)
    pages = first.page_digests()
    restored = second.generate(text)
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)
    assert restored.same_as(hit), difference(restored, hit)
    there = second.page_digests()
    common = pages.keys() & there.keys()
    assert len(common) >= 31
    assert all(pages[key] == there[key] for key in common), "restored pages differ from those that were stored"


def test_a_prefix_that_is_partly_stored_is_restored_as_far_as_it_goes(first, second):
    text = prose("partly stored", length=700)
    first.generate(text[:400])
    restored = second.generate(text, **LOAD_ONLY)
    hit = first.generate(text, **NEITHER)
    assert (hit.cached_tokens, restored.cached_tokens) == (384, 384)
    assert restored.same_as(hit), difference(restored, hit)


def test_a_prompt_may_leave_a_stored_chunk_half_way(first, second):
    common = prose("half-way", length=700)
    first.generate(common)
    text = common[:420] + prose("another tail", length=150)
    restored = second.generate(text, **LOAD_ONLY)
    hit = first.generate(text, **NEITHER)
    assert (hit.cached_tokens, restored.cached_tokens) == (416, 416)
    assert restored.same_as(hit), difference(restored, hit)


@pytest.mark.parametrize("length, expected", [(20, {0}), (40, {0, 32}), (64, {0, 32, 63, 64}), (100, {96}), (256, {224, 255, 256})])
def test_prompts_no_longer_than_a_chunk(first, second, length, expected):
    text = prose("short", length, length=length)
    cold = first.generate(text)
    restored = second.generate(text)
    assert restored.cached_tokens in expected
    assert restored.tokens == cold.tokens, difference(restored, cold)


def test_generated_tokens_are_restored_too(first, second):
    text = prose("conversation", length=300)
    answer = first.generate(text, max_tokens=300)
    turn = text + answer.tokens + prose("second turn", length=40)
    restored = second.generate(turn, **LOAD_ONLY)
    hit = first.generate(turn, **NEITHER)
    assert restored.cached_tokens >= 512
    assert restored.tokens == hit.tokens, difference(restored, hit)


def test_a_local_hit_is_continued_from_the_store(first, second):
    text = prose("continued", length=900)
    first.generate(text)
    second.generate(text[:400])
    restored = second.generate(text)
    hit = first.generate(text)
    assert restored.cached_tokens == hit.cached_tokens == 896
    assert restored.same_as(hit), difference(restored, hit)


def test_two_engines_share_prefixes_at_the_same_time(stage, first, second):
    common = prose("shared", length=500)
    texts = [common[: 200 + 60 * i] + prose("tail", i, length=90) for i in range(6)]
    alone = [first.generate(text, **NEITHER) for text in texts]
    first.forget_kv()
    for engine in (first, second):
        engine.submit(texts, names=[f"shared{i}" for i in range(6)])
    for engine in (first, second):
        engine.send("run", names=[f"shared{i}" for i in range(6)])
    for engine in (first, second):
        engine.finish()
    for engine in (first, second):
        for output, reference in zip(engine.collect([f"shared{i}" for i in range(6)]), alone):
            assert output.tokens == reference.tokens, difference(output, reference)
        engine.settle(limit=60)


def test_a_request_may_refuse_to_read_caches(first, second):
    text = prose("skip reading", length=300)
    cold = first.generate(text)
    again = second.generate(text, skip_reading_prefix_cache=True)
    assert again.cached_tokens == 0
    assert again.same_as(cold), difference(again, cold)


def test_requests_bound_what_is_stored_and_loaded(first, second):
    text = prose("bounds", length=700)
    first.generate(text, kv_transfer_params={"kvern": {"max_store_tokens": 512}})
    assert second.generate(text, kv_transfer_params={"kvern": {"max_load_tokens": 256, "store": False}}).cached_tokens == 256
    second.forget_kv()
    assert second.generate(text, **LOAD_ONLY).cached_tokens == 512


def test_a_cache_salt_parts_equal_prompts(first, second):
    text = prose("salt", length=300)
    first.generate(text, salt="tenant-1")
    assert second.generate(text, salt="tenant-2", **NEITHER).cached_tokens == 0
    second.forget_kv()
    assert second.generate(text, **LOAD_ONLY).cached_tokens == 0
    second.forget_kv()
    assert second.generate(text, salt="tenant-1").cached_tokens == 288


def test_nonsense_in_kv_transfer_params_harms_nobody(first):
    text = prose("nonsense", length=100)
    cold = first.generate(text, **NEITHER)
    for nonsense in ({"kvern": 7}, {"kvern": {"load": "x", "max_load_tokens": -1, "?": [None]}}, {"other": {"a": 1}}):
        first.forget_kv()
        output = first.generate(text, kv_transfer_params=nonsense)
        assert output.tokens == cold.tokens, difference(output, cold)


def test_abort_during_a_load_frees_everything(stage, first):
    text = prose("abort", length=1000)
    cold = first.generate(text)
    first.forget_kv()
    free = first.free_blocks()
    (name,) = first.submit([text])
    first.run(names=[name], max_steps=1)
    assert first.status(names=[name]) == {name: "WAITING_FOR_REMOTE_KVS"}
    first.abort(names=[name])
    first.forget(names=[name])
    assert first.settle(limit=60)
    stage.check_quiet()
    first.forget_kv()
    assert first.free_blocks() == free
    restored = first.generate(text)
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)


def test_kvernctl_looks_at_a_serving_engine(stage, first):
    first.generate(prose("kvernctl", length=300))
    doctor = stage.daemon.ctl("doctor")
    assert "recomputes what cannot be loaded" in doctor, doctor
    assert "stored, found and loaded, bit for bit" in doctor, doctor
    assert "makes compact caches (keys turn as configured, self-test passed)" in doctor, doctor
    assert "makes compact caches by methods that read queries (self-test passed)" in doctor, doctor
    assert "the same budget: kv_load_failure_policy is not 'fail'" in doctor, doctor
    status = stage.daemon.ctl("status")
    assert "scheduler" in status and "kv_load_failure_policy recompute" in status, status
    block = stage.daemon.ctl("inspect", "--limit", "1").splitlines()[0].split()[0]
    assert "Stored in" in stage.daemon.ctl("explain", block)
    unknown = stage.daemon.start_ctl("explain", "00" * 32)
    output, _ = unknown.communicate(timeout=60)
    assert "Not stored in any" in output, output


def test_what_was_flushed_is_computed_again(stage, first):
    text = prose("flushed", length=300)
    first.generate(text)
    stage.daemon.ctl("flush", "--all")
    first.forget_kv()
    assert first.generate(text).cached_tokens == 0
