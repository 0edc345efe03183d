"""Shards of two tensor-parallel ranks under one key: stored at 2, restored at 2 and 1, and the other way round; compact
caches that two ranks make together."""

import pytest

from engine import difference
from kvern import compact
from models import random_llama
from prompts import tokens
from test_compact import TOLERANCE
from test_ragged import METHODS, Ragged


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon({"compact.state_dir": str(stage.folder / "compact")})


def test_shards_serve_every_number_of_ranks(stage, daemon):
    by_two, by_one = tokens("stored at two", length=700), tokens("stored at one", length=700)

    two = stage.engine(random_llama(), tensor_parallel_size=2).wait_started()
    cold_two = two.generate(by_two, max_tokens=32)
    two.stop()

    one = stage.engine(random_llama()).wait_started()
    restored = one.generate(by_two, max_tokens=32)
    assert restored.cached_tokens == 672
    assert restored.tokens == cold_two.tokens, difference(restored, cold_two)
    cold_one = one.generate(by_one, max_tokens=32)
    one.stop()

    again = stage.engine(random_llama(), tensor_parallel_size=2).wait_started()
    for text, cold in ((by_two, cold_two), (by_one, cold_one)):
        restored = again.generate(text, max_tokens=32)
        assert restored.cached_tokens == 672
        assert restored.tokens == cold.tokens, difference(restored, cold)
    again.stop()


def test_two_ranks_make_and_read_compact_caches(stage, daemon):
    """One rank's engine knows the prompt's rows and queries; the reference decodes on what is kept of them."""
    one = Ragged(stage, random_llama())
    two = stage.engine(random_llama(), kvern={"policy": "fail"}, tensor_parallel_size=2).wait_started()
    suffix = tokens("a question", length=9)
    for spec in ("snapkv(budget=25%)", METHODS["cake"]):
        prompt = tokens("of two ranks", spec, length=700)
        _, rows = one.make(prompt, spec)
        (made,) = two.generate_all([prompt], max_tokens=3, kv_transfer_params=compact.wish(spec))
        cache = compact.CompactCache.from_answer(made.kv_transfer_params)
        assert one.daemon.wait(cache, seconds=120)["error_mean"] > 0
        assert cache.handle.startswith("kvc2." if spec == METHODS["cake"] else "kvc1.")
        for engine in (two, one.engine):
            options = one.submit(cache, suffix)
            output = engine.generate(options.pop("prompt"), **options)
            assert output.cached_tokens == cache.slots
            assert one.difference(output, cache, rows, suffix) < TOLERANCE["float32"]
    one.close()
    one.engine.stop()
    two.stop()
