"""The harness itself, without Kvern: what later tests compare against must be sound."""

import pytest

from engine import Engine, difference
from models import random_llama
from prompts import tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = Engine(random_llama(), tmp_path_factory.mktemp("plain"))
    engine.wait_started()
    yield engine
    engine.stop()


def test_a_hit_in_the_prefix_cache_repeats_the_cold_output(engine):
    text = tokens("harness", length=650)
    cold = engine.generate(text)
    again = engine.generate(text)
    assert cold.cached_tokens == 0
    assert again.cached_tokens == 640
    assert again.tokens == cold.tokens, difference(again, cold)
    assert len(set(cold.tokens)) > len(cold.tokens) // 2, "output so monotonous that wrong KV would not show"


def test_the_same_work_gives_bit_identical_output(engine):
    text = tokens("twice", length=300)
    cold = engine.generate(text)
    engine.forget_kv()
    again = engine.generate(text)
    assert again.cached_tokens == 0
    assert again.same_as(cold), difference(again, cold)


def test_poisoned_pages_show(engine):
    text = tokens("poison", length=300)
    cold = engine.generate(text)
    digests = engine.page_digests()
    assert len(digests) >= 9
    engine.poison(value=50.0)
    hit = engine.generate(text)
    assert hit.cached_tokens == 288
    assert not hit.same_as(cold)
    engine.forget_kv()
