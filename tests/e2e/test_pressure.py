"""Too little room: in the store, and for the KV cache of the engine itself."""

import pytest

from engine import difference
from models import random_llama
from prompts import tokens

NEITHER = {"kv_transfer_params": {"kvern": {"load": False, "store": False}}}


@pytest.fixture(scope="module")
def daemon(stage):
    # 8 KiB of KV per token: room for about 4,000 tokens.
    return stage.start_daemon({"store.dram_bytes": "32MiB"})


@pytest.fixture(scope="module")
def engine(stage, daemon):
    return stage.engine(random_llama(), kvern={"staging": "16MiB"}).wait_started()


@pytest.fixture(scope="module")
def other(stage, daemon):
    return stage.engine(random_llama(), kvern={"staging": "16MiB"}).wait_started()


def test_a_full_store_makes_room_and_serves_what_it_kept(daemon, engine):
    texts = [tokens("full", i, length=700) for i in range(12)]
    cold = [engine.generate(text) for text in texts]
    engine.forget_kv()
    assert daemon.evicted() > 0
    assert daemon.used_bytes() <= 32 << 20
    restored = [engine.generate(text, kv_transfer_params={"kvern": {"store": False}}) for text in texts]
    for one, reference in zip(restored, cold):
        assert one.tokens == reference.tokens, difference(one, reference)
    assert restored[-1].cached_tokens == 672, "the prompt that was stored last is gone"
    assert restored[0].cached_tokens == 0, "the prompt that was stored first is still there"


def test_a_retained_prompt_outlives_what_is_stored_after_it(daemon, engine):
    kept, plain = tokens("retained", length=700), tokens("not retained", length=700)
    cold = engine.generate(kept, kv_transfer_params={"kvern": {"retain_seconds": 600}})
    engine.generate(plain)
    daemon.wait_metric("kvern_retained_chunks", lambda value: value > 0)
    for i in range(12):
        engine.generate(tokens("after the retained", i, length=700))
    engine.forget_kv()
    no_store = {"kv_transfer_params": {"kvern": {"store": False}}}
    restored = engine.generate(kept, **no_store)
    assert restored.cached_tokens == 672
    assert restored.tokens == cold.tokens, difference(restored, cold)
    assert engine.generate(plain, **no_store).cached_tokens == 0


def test_evictions_during_loads_give_no_wrong_token(daemon, engine, other):
    texts = [tokens("race", i, length=600) for i in range(3)]
    cold = [engine.generate(text, **NEITHER) for text in texts]
    names = [f"race{i}" for i in range(3)]
    evicted = daemon.evicted()
    for round_ in range(6):
        engine.forget_kv()
        churn = [tokens("churn", round_, i, length=600) for i in range(4)]
        churn_names = other.submit(churn, max_tokens=2)
        engine.submit(texts, names=names)
        other.send("run", names=churn_names)
        engine.run(names=names)
        other.finish()
        for output, reference in zip(engine.collect(names), cold):
            assert output.tokens == reference.tokens, difference(output, reference)
        other.collect(churn_names)
        assert other.settle(limit=60) and engine.settle(limit=60)
        other.forget_kv()
    assert daemon.evicted() > evicted


def test_a_prompt_larger_than_the_staging_memory_is_stored_all_the_same(engine):
    text = tokens("large", length=1900)
    cold = engine.generate(text, kv_transfer_params={"kvern": {"max_store_tokens": 1900}})
    engine.forget_kv()
    restored = engine.generate(text)
    assert restored.tokens == cold.tokens, difference(restored, cold)


def test_preempted_requests_give_the_same_output(stage, daemon, engine):
    texts = [tokens("preempt", i, length=330) for i in range(2)]
    alone = [engine.generate(text, max_tokens=120, **NEITHER) for text in texts]
    # 2 x (330 + 120) tokens need 30 blocks.
    small = stage.engine(random_llama(), num_gpu_blocks_override=24, max_model_len=512).wait_started()
    for _ in range(2):  # cold, then restored
        outputs = small.generate_all(texts, max_tokens=120)
        for output, reference in zip(outputs, alone):
            assert output.tokens == reference.tokens, difference(output, reference)
        small.forget_kv()
    assert small.metrics()["vllm:num_preemptions"] > 0
    small.stop()
