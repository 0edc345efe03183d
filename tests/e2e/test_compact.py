"""A prompt becomes a compact cache, and vLLM decodes from it as transformers does on the same pruned cache, with every
kept token at the position that it had in the prompt."""

import time
from collections.abc import Iterator

import pytest
import torch

import compact_reference
from engine import Engine
from kvern import compact
from models import random_llama, smollm2
from prompts import prose, tokens

GENERATED = 12
# Largest difference of a log-probability. In bf16 the reference computes in fp32 with the same rounded weights and rows;
# keys that were not turned differ by more than 7.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.6}
METHODS = {
    "snapkv": "snapkv(budget=25%)",
    "cake": "cake(budget=25%,window=16)",
    "windowkv": "windowkv(budget=30%)",
    "streaming": "streaming(budget=20%)",
    "keydiff": "keydiff(budget=25%)",
    "knorm": "knorm(budget=40%)",
}


def prompt_for(method: str, *label, length: int) -> list[int]:
    """In the first layer equal tokens have keys of equal norm, and rounding would decide between them: knorm gets prompts
    without such."""
    if method != "knorm":
        return prose(method, *label, length=length)
    return list(dict.fromkeys(tokens(method, *label, length=3 * length, vocabulary=40_000)))[:length]


class Bench:
    """An engine, the reference model beside it, and the daemon's word on compact caches."""

    def __init__(self, stage, model, dtype="float32", **options):
        self.folder = stage.folder
        self.dtype = dtype
        self.model = model
        self.engine: Engine = stage.engine(model, dtype=dtype, **options).wait_started()
        self.daemon = compact.Daemon(stage.daemon.address, connect_seconds=60)
        self.watches = True  # False: the prompt's queries are not needed, and hooks would be in the way
        self._reference = None

    @property
    def reference(self):
        if self._reference is None:
            from transformers import AutoModelForCausalLM

            rounded = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
            self._reference = rounded.float().eval()
        return self._reference

    def make(self, prompt: list[int], spec: str, rows: int = 64, **more):
        """(the cache, the prompt's keys, values and last queries as the engine had them)"""
        path = self.folder / "prompt.pt"
        if self.watches:
            self.engine.watch_queries(rows=rows)
        (name,) = self.engine.submit([prompt], max_tokens=3, kv_transfer_params=compact.wish(spec, **more))
        self.engine.run_until_token(name=name)
        self.engine.save_prompt(name=name, tokens=len(prompt), path=str(path))
        self.engine.run(names=[name])
        (output,) = self.engine.collect([name])
        assert self.engine.settle(limit=60)
        return compact.CompactCache.from_answer(output.kv_transfer_params), torch.load(path)

    def submit(self, cache, suffix, placeholder=7, **more):
        return {
            "salt": cache.handle,
            "kv_transfer_params": cache.kv_transfer_params,
            "max_tokens": GENERATED,
            "prompt": cache.prompt(suffix, placeholder),
            **more,
        }

    def decode(self, cache, suffix, **more):
        options = self.submit(cache, suffix, **more)
        return self.engine.generate(options.pop("prompt"), **options)

    def slots(self, cache) -> int | list[int]:
        return cache.slots

    def wanted(self, output, cache, prompt, suffix, position=None) -> Iterator[torch.Tensor]:
        """The reference's log-probabilities on the output's tokens, for each right choice of slots."""
        where = cache.prompt_tokens if position is None else position
        for layers in compact_reference.prunings(cache.method, self.slots(cache), prompt):
            yield compact_reference.decode(self.reference, layers, suffix, output.tokens, where)

    def difference(self, output, cache, prompt, suffix, position=None) -> float:
        """Largest difference of a log-probability between the output and the reference."""
        return min(self.largest(output, wanted) for wanted in self.wanted(output, cache, prompt, suffix, position))

    def largest(self, output, wanted: torch.Tensor) -> float:
        assert len(output.logprobs) == len(output.tokens) == len(wanted)
        return max(abs(value - wanted[i, token].item()) for i, row in enumerate(output.logprobs) for token, value in row)

    def check(self, spec, prompt, suffix, **more) -> tuple:
        cache, rows = self.make(prompt, spec, **more)
        state = self.daemon.wait(cache, seconds=120)
        assert (state["slots"], state["prompt_tokens"], state["method"]) == (cache.slots, len(prompt), cache.method)
        self.engine.forget_kv()
        output = self.decode(cache, suffix)
        assert output.cached_tokens == cache.slots < len(prompt)
        assert self.difference(output, cache, rows, suffix) < TOLERANCE[self.dtype]
        return cache, rows, output

    def close(self):
        self.daemon.__exit__()


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon({"store.dram_bytes": "1GiB", "compact.state_dir": str(stage.folder / "compact")})


@pytest.fixture(scope="module")
def bench(stage, daemon):
    bench = Bench(stage, smollm2())
    yield bench
    bench.close()


@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_log_probabilities_are_those_of_the_pruned_cache(bench, method):
    suffix = prose("question", method, length=9)
    cache, rows, output = bench.check(METHODS[method], prompt_for(method, "compact", length=437), suffix)
    wanted = bench.wanted(output, cache, rows, suffix)
    assert any(logprobs.argmax(-1).tolist() == output.tokens for logprobs in wanted)
    # The comparison can tell: had the keys not been turned, the suffix would stand right behind the slots.
    assert bench.difference(output, cache, rows, suffix, position=cache.slots) > 0.05
    state = bench.daemon.state(cache)
    measured = state["error_mean"] is not None
    assert measured == (method in ("snapkv", "cake", "windowkv")) and (not measured or 0 < state["error_mean"] < 1)


def test_one_cache_serves_many_questions_and_vllm_shares_its_blocks(bench):
    prompt, questions = prose("shared document", length=400), [prose("q", i, length=5 + i) for i in range(3)]
    cache, rows, _ = bench.check("keydiff(budget=33%)", prompt, questions[0])
    loads = bench.engine.metrics()["vllm:kvern_load_bytes"]
    names = [f"question{i}" for i in range(3)]
    bench.engine.call("submit", requests=[{"name": n, **bench.submit(cache, q)} for n, q in zip(names, questions)])
    bench.engine.run(names=names)
    for output, question in zip(bench.engine.collect(names), questions):
        assert output.cached_tokens == cache.slots
        assert bench.difference(output, cache, rows, question) < TOLERANCE["float32"]
    assert bench.engine.settle(limit=60)
    loaded = bench.engine.metrics()["vllm:kvern_load_bytes"] - loads
    assert loaded < rows["keys"].numel() * 4, "less than a third of the prompt's keys and values, three times"


def test_a_plain_request_with_the_same_placeholders_is_not_touched(bench):
    cache, _, _ = bench.check("streaming(budget=50%)", prose("salted", length=300), [5, 6])
    plain = bench.engine.generate([7] * cache.slots + [5, 6], max_tokens=2)
    assert plain.cached_tokens == 0


# ---------------------------------------------------------------- fail closed


def assert_fails(bench, output):
    assert (output.finish_reason, output.tokens) == ("error", [])
    assert len(bench.engine.generate(prose("still alive", time.monotonic(), length=40), max_tokens=2).tokens) == 2


@pytest.fixture(scope="module")
def cache(bench):
    cache, _ = bench.make(prose("faults", length=300), "streaming(budget=50%)")
    bench.daemon.wait(cache)
    return cache


def test_what_is_not_a_proper_request_fails(bench, cache):
    unknown = compact.CompactCache(cache.handle[:-1] + ("0" if cache.handle[-1] != "0" else "1"), 300, 150, "", 0)
    assert_fails(bench, bench.decode(unknown, [1, 2]))
    assert_fails(bench, bench.decode(cache, [1, 2], salt=None))
    assert_fails(bench, bench.decode(cache, [1, 2], kv_transfer_params=None))
    assert_fails(bench, bench.decode(cache, [1, 2], prompt_logprobs=1))
    assert_fails(bench, bench.engine.generate([7] * 150, salt=cache.handle, kv_transfer_params=cache.kv_transfer_params))
    with pytest.raises(compact.CompactError):
        cache.prompt([])
    with pytest.raises(compact.CompactError):
        cache.completion([1], echo=True)


def test_an_engine_that_recomputes_gives_all_layers_the_same_slots(bench, cache):
    uniform, _, _ = bench.check("cake(budget=25%,allocation=cake)", prose("level", length=500), [1, 2, 3])
    assert uniform.handle.startswith("kvc1.") and "allocation" not in uniform.method and uniform.slots == 125
    ragged = compact.CompactCache(cache.handle.replace("kvc1", "kvc2"), 300, 150, "", 0)
    assert_fails(bench, bench.decode(ragged, [1, 2]))


def test_a_deleted_cache_fails(bench):
    cache, _ = bench.make(prose("deleted", length=300), "streaming(budget=50%)")
    bench.daemon.wait(cache)
    assert bench.daemon.delete(cache) and not bench.daemon.delete(cache)
    assert_fails(bench, bench.decode(cache, [1, 2]))


def test_an_expired_cache_fails(bench):
    cache, _ = bench.make(prose("expired", length=300), "streaming(budget=50%)", ttl_seconds=1)
    while time.time() < cache.expires_at:
        time.sleep(0.05)
    assert_fails(bench, bench.decode(cache, [1, 2]))


def test_a_wish_that_cannot_be_met_is_refused_and_the_request_served(bench):
    output = bench.engine.generate(prose("refused", length=100), kv_transfer_params=compact.wish("h2o(budget=50%)"))
    assert len(output.tokens) == 16
    with pytest.raises(compact.CompactError, match="whole prompt"):
        compact.CompactCache.from_answer(output.kv_transfer_params)


def test_preemption_and_resume_reload(bench, cache):
    alone = bench.decode(cache, [1, 2], max_tokens=20)
    options = bench.submit(cache, [1, 2], max_tokens=20)
    bench.engine.call("submit", requests=[{"name": "preempted", **options}])
    bench.engine.run_until_token(name="preempted")
    bench.engine.preempt_all()
    bench.engine.poison(value=50.0)
    bench.engine.run(names=["preempted"])
    (output,) = bench.engine.collect(["preempted"])
    assert output.tokens == alone.tokens


def test_corrupt_bytes_fail(bench, cache, daemon):
    """Last of those that use the store: everything in it is damaged."""
    bench.engine.forget_kv()
    daemon.damage_store("one bit")
    assert_fails(bench, bench.decode(cache, [1, 2]))


def test_a_daemon_that_has_died_fails_what_it_kept(bench, daemon):
    cache, _ = bench.make(prose("daemon dies", length=300), "streaming(budget=50%)")
    bench.daemon.wait(cache)
    bench.engine.forget_kv()
    daemon.kill()
    output = bench.decode(cache, [1, 2])
    assert (output.finish_reason, output.tokens) == ("error", [])
    daemon.start()


# ---------------------------------------------------------------- the matrix


@pytest.mark.full
@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 100}, {"enforce_eager": False}], ids=["chunked", "compiled"])
def test_chunked_prefill_and_torch_compile(stage, daemon, options):
    bench = Bench(stage, smollm2(), **options)
    if "enforce_eager" in options:  # the hooks of watch_queries() are outside of what is compiled
        output = bench.engine.generate(prose("compiled", length=500), kv_transfer_params=compact.wish(METHODS["cake"]))
        cache = compact.CompactCache.from_answer(output.kv_transfer_params)
        assert 0 < bench.daemon.wait(cache)["error_mean"] < 1
    else:
        bench.check(METHODS["cake"], prose("chunked", length=530), [3, 4, 5])
    bench.close()
    bench.engine.stop()


@pytest.mark.full
@pytest.mark.parametrize("heads, kv_heads, rope", [(8, 8, None), (8, 2, "llama3"), (8, 2, "yarn")])
def test_other_heads_and_rotations(stage, daemon, heads, kv_heads, rope):
    bench = Bench(stage, random_llama(heads, kv_heads, rope=rope))
    for method in ("snapkv", "keydiff"):
        bench.check(METHODS[method], tokens("rope", rope, method, length=450), tokens("suffix", length=5))
    bench.close()
    bench.engine.stop()


@pytest.mark.full
@pytest.mark.parametrize("method", ["cake", "windowkv", "keydiff"])
@pytest.mark.parametrize("dtype, block_size, length", [("bfloat16", 32, 601), ("float32", 64, 1023), ("float32", 128, 7001)])
def test_dtypes_block_sizes_and_lengths(stage, daemon, dtype, block_size, length, method):
    bench = Bench(stage, smollm2(), dtype, block_size=block_size, max_model_len=8192, threads=2)
    prompt, suffix = prose("matrix", method, length=length), prose("question", method, length=7)
    cache, rows, output = bench.check(METHODS[method], prompt, suffix)
    print(f"{method}, {dtype}, {length} tokens: {bench.difference(output, cache, rows, suffix):g}")
    bench.close()
    bench.engine.stop()


@pytest.mark.full
def test_another_engine_decodes_what_one_has_made(stage, daemon):
    maker = Bench(stage, smollm2())
    suffix = [11, 12, 13]
    cache, rows = maker.make(prose("handed over", length=501), METHODS["snapkv"])
    maker.daemon.wait(cache, seconds=120)
    maker.close()
    maker.engine.stop()
    reader = Bench(stage, smollm2())
    output = reader.decode(cache, suffix)
    assert output.cached_tokens == cache.slots
    assert reader.difference(output, cache, rows, suffix) < TOLERANCE["float32"]
    reader.close()
    reader.engine.stop()
