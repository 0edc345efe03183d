"""Requests that bring the whole prompt of a compact cache: they run as if they had come with placeholders, through any of
vLLM's APIs."""

import pytest
import requests

from kvern import compact
from models import smollm2
from prompts import prose, text
from test_compact import GENERATED, TOLERANCE
from test_ragged import METHODS, Ragged


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon({"store.dram_bytes": "1GiB", "compact.state_dir": str(stage.folder / "compact")})


@pytest.fixture(scope="module")
def bench(stage, daemon):
    bench = Ragged(stage, smollm2(), kvern={"rewrite": True})
    yield bench
    bench.close()
    bench.engine.stop()


@pytest.mark.parametrize("method", ["keydiff(budget=25%)", METHODS["cake"]], ids=["rectangular", "ragged"])
def test_it_decodes_as_from_placeholders(bench, method):
    prompt, suffix = prose("rewritten", method, length=601), prose("question", method, length=9)
    cache, rows, explicit = bench.check(method, prompt, suffix)
    plain = bench.engine.generate(prompt + suffix, max_tokens=GENERATED)
    bench.engine.forget_kv()
    asked = {"prompt": prompt + suffix, "max_tokens": GENERATED}
    asked = [{"name": "whole", **asked, "kv_transfer_params": cache.whole_prompt_params}, {"name": "plain", **asked}]
    bench.engine.call("submit", requests=asked)
    bench.engine.run(names=["whole", "plain"])
    whole, beside = bench.engine.collect(["whole", "plain"])
    assert (whole.cached_tokens, whole.tokens) == (cache.slots, explicit.tokens)
    assert bench.difference(whole, cache, rows, suffix) < TOLERANCE["float32"]
    assert beside.tokens == plain.tokens
    again = bench.engine.generate(prompt + [5, 6, 7], max_tokens=2, kv_transfer_params=cache.whole_prompt_params)
    assert again.cached_tokens == cache.slots


def test_a_prompt_of_something_else_is_computed(bench):
    cache, _ = bench.make(prose("of another", length=400), "streaming(budget=25%)")
    bench.daemon.wait(cache)
    prompt = prose("not that one", length=410)
    alone = bench.engine.generate(prompt, max_tokens=GENERATED)
    bench.engine.forget_kv()
    found = bench.engine.generate(prompt, max_tokens=GENERATED, kv_transfer_params=cache.whole_prompt_params)
    assert found.tokens == alone.tokens


def test_a_chat_goes_on_from_what_its_first_turn_left(stage, daemon):
    server = stage.server(smollm2(), kvern={"policy": "fail", "rewrite": True}).wait_started()
    messages = [{"role": "user", "content": text("a chat", length=900) + "\nWhat is this about?"}]

    def chat(**more) -> dict:
        body = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 12, **more}
        response = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
        response.raise_for_status()
        return response.json()

    first = chat(kv_transfer_params=compact.wish("keydiff(budget=50%)"))
    cache = compact.CompactCache.from_answer(first["kv_transfer_params"])
    with compact.Daemon(stage.daemon.address, connect_seconds=60) as told:
        told.wait(cache, seconds=120)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Say it in one word."}]
    messages[1] = {key: messages[1][key] for key in ("role", "content")}
    full = chat()
    server.reset_prefix_cache()
    second = chat(kv_transfer_params=cache.whole_prompt_params)
    assert second["usage"]["prompt_tokens"] == full["usage"]["prompt_tokens"] > cache.prompt_tokens
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == cache.slots
    assert second["choices"][0]["finish_reason"] == "length" and second["choices"][0]["message"]["content"]
    server.stop()
