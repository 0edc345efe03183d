"""Every configuration of the engine that matters, the same round trip in each. Long: make test-full."""

import pytest

from engine import difference, kvern_transfer
from models import random_llama, smollm2
from prompts import prose, tokens


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon()


def round_trip(engine, text, poison=True, max_tokens=24):
    cold = engine.generate(text, max_tokens=max_tokens)
    hit = engine.generate(text, max_tokens=max_tokens)
    engine.forget_kv(50.0 if poison else None)
    restored = engine.generate(text, max_tokens=max_tokens)
    assert hit.cached_tokens > 0
    assert restored.cached_tokens == hit.cached_tokens
    assert restored.same_as(hit), difference(restored, hit)
    return cold, restored


@pytest.mark.full
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_block_sizes_and_compilation(stage, daemon, dtype, block_size, compiled):
    engine = stage.engine(smollm2(), dtype=dtype, block_size=block_size, enforce_eager=not compiled).wait_started()
    cold, restored = round_trip(engine, prose("matrix", dtype, block_size, compiled, length=1100))
    if dtype == "float32":
        assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
def test_chunked_prefill(stage, daemon):
    engine = stage.engine(smollm2(), max_num_batched_tokens=192).wait_started()
    cold, restored = round_trip(engine, prose("chunked", length=1100))
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
def test_an_engine_of_several_processes(stage, daemon):
    engine = stage.engine(smollm2(), single_process=False).wait_started()
    cold, restored = round_trip(engine, prose("processes", length=1100), poison=False)
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
def test_two_threads(stage, daemon):
    engine = stage.engine(smollm2(), threads=2).wait_started()
    cold, restored = round_trip(engine, prose("threads", length=1100))
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
def test_without_a_prefix_cache_of_its_own(stage, daemon):
    engine = stage.engine(random_llama(), enable_prefix_caching=False).wait_started()
    text = tokens("no prefix cache", length=1000)
    cold = engine.generate(text)
    engine.poison(value=50.0)
    restored = engine.generate(text)
    assert restored.cached_tokens == 992
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
def test_beside_another_connector(stage, daemon, tmp_path):
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [
                kvern_transfer(daemon.address),
                {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
                },
            ]
        },
    }
    engine = stage.engine(random_llama(), transfer=transfer).wait_started()
    text = tokens("multi", length=1000)
    cold = engine.generate(text)
    engine.forget_kv()
    restored = engine.generate(text)
    assert restored.cached_tokens > 0
    assert restored.tokens == cold.tokens, difference(restored, cold)
    engine.stop()


@pytest.mark.full
@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("block_size", [32, 128])
def test_codecs_and_block_sizes(stage, daemon, codec, block_size):
    engine = stage.engine(smollm2(), block_size=block_size, kvern={"codec": codec}).wait_started()
    text = prose("codec matrix", codec, block_size, length=1100)
    cold = engine.generate(text, max_tokens=24)
    engine.forget_kv()
    restored = engine.generate(text, max_tokens=24)
    agreement = sum(a == b for a, b in zip(restored.tokens, cold.tokens))
    print(f"{codec}, block {block_size}: {agreement} of 24 tokens agree; {difference(restored, cold)}")
    assert restored.cached_tokens >= 1024
    assert agreement == 24 if codec == "raw" else agreement > 4
    engine.stop()
