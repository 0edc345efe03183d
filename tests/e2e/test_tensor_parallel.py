"""Shards of two tensor-parallel ranks under one key: stored at 2, restored at 2 and 1, and the other way round."""

from engine import difference
from models import random_llama
from prompts import tokens


def test_shards_serve_every_number_of_ranks(stage):
    stage.start_daemon()
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
