"""Compact caches whose layers keep different numbers of slots: vLLM reads, in each layer, just those. A request holds the
blocks of the mean, or of the largest layer where the layers' caches are allocations of their own. transformers decodes
on the same pruned cache, with lengths per layer."""

import math
import shutil

import pytest

import compact_reference
from engine import kvern_transfer
from kvern import compact
from models import random_llama, smollm2
from prompts import prose, tokens
from test_compact import GENERATED, TOLERANCE, Bench

METHODS = {
    "cake": "cake(budget=25%,window=16,allocation=cake)",
    "snapkv": "snapkv(budget=25%,window=16,allocation=pyramid)",
    "windowkv": "windowkv(budget=30%,allocation=pyramid)",
    "keydiff": "keydiff(budget=25%,allocation=pyramid)",
}


class Ragged(Bench):
    prefix = "kvc2."

    def __init__(self, stage, model, kvern: dict | None = None, **options):
        super().__init__(stage, model, kvern={"policy": "fail", **(kvern or {})}, **options)
        self._layer_slots: dict[str, list[int]] = {}

    def layer_slots(self, cache) -> list[int]:
        if cache.handle not in self._layer_slots:
            self._layer_slots[cache.handle] = self.daemon.wait(cache, seconds=120)["layer_slots"]
        return self._layer_slots[cache.handle]

    def slots(self, cache) -> int | list[int]:
        return self.layer_slots(cache) or cache.slots

    def largest(self, output, wanted) -> float:
        if self.dtype == "float32" and wanted.argmax(-1).tolist() != output.tokens:
            return math.inf
        return super().largest(output, wanted)

    def check_ragged(self, method: str, length: int, page: int = 32):
        cache, rows, output = self.check(METHODS[method], prose(method, "ragged", length=length), prose("q", method, length=9))
        slots = self.layer_slots(cache)
        print(method, slots)
        mean = sum(slots) // len(slots)
        assert cache.handle.startswith(self.prefix) and len(set(slots)) > 1
        assert sum(slots) == mean * len(slots) and all(s % page == 0 for s in (*slots, mean, cache.slots))
        assert cache.slots == (mean if self.prefix == "kvc2." else min(2 * mean, length // page * page))
        if method != "windowkv":
            most = length // page * page if self.prefix == "kvc2." else cache.slots
            exact = compact_reference.layer_tokens(cache.method, mean, most, rows)
            assert all(abs(s - e) <= 1.01 * page for s, e in zip(slots, exact.tolist()))
        return cache, rows, output


@pytest.fixture(scope="module")
def daemon(stage):
    nvme = {"nvme.files": str(stage.folder / "nvme"), "nvme.bytes": "1GiB"}
    return stage.start_daemon({"store.dram_bytes": "1GiB", "compact.state_dir": str(stage.folder / "compact"), **nvme})


@pytest.fixture(scope="module")
def bench(stage, daemon):
    bench = Ragged(stage, smollm2(), max_num_batched_tokens=512)
    yield bench
    bench.close()


def test_each_layer_reads_its_own_slots(stage, bench):
    bench.check_ragged("cake", 611)
    doctor = stage.daemon.ctl("doctor")
    assert "reads compact caches with a budget for each layer (pool, self-test passed)" in doctor, doctor


class Apart(Ragged):
    """Its layers' caches are allocations of their own."""

    prefix = "kvc3."

    def __init__(self, stage, model, **options):
        transfer = kvern_transfer(stage.daemon.address, policy="fail")
        transfer.update(kv_connector="CachesApart", kv_connector_module_path="caches_apart")
        super().__init__(stage, model, transfer=transfer, **options)


@pytest.fixture(scope="module")
def apart(stage, daemon):
    bench = Apart(stage, smollm2(), max_num_batched_tokens=512)
    yield bench
    bench.close()


def test_where_the_caches_lie_apart_each_layer_reads_its_own_last_slots(stage, bench, apart):
    cache, rows, alone = apart.check_ragged("cake", 611)
    assert max(apart.layer_slots(cache)) <= cache.slots
    doctor = stage.daemon.ctl("doctor")
    assert "(shift, since the layers' caches are separate allocations; self-test passed)" in doctor, doctor
    pooled, _, _ = bench.check_ragged("keydiff", 420)
    assert apart.decode(pooled, [1, 2]).finish_reason == "error", "a layer does not see the pages of others"
    elsewhere = bench.decode(cache, prose("q", "cake", length=9))
    assert bench.difference(elsewhere, cache, rows, prose("q", "cake", length=9)) < TOLERANCE["float32"]
    assert elsewhere.tokens == alone.tokens


def test_preemption_and_resume_where_the_caches_lie_apart(apart):
    check_preemption(apart)


def test_requests_of_all_kinds_in_one_batch(bench):
    check_batch(bench)


def check_batch(bench):
    plain, question = prose("plain", length=333), prose("a question", length=70)
    alone = bench.engine.generate(plain, max_tokens=GENERATED)
    first, first_rows, _ = bench.check_ragged("cake", 523)
    second, second_rows, _ = bench.check_ragged("keydiff", 700)
    level, level_rows, _ = bench.check("streaming(budget=20%)", prose("level", length=401), [5, 6, 7])
    bench.engine.forget_kv()
    bench.engine.poison(value=50.0)
    wanted = [
        (first, first_rows, question),
        (second, second_rows, question[:40]),
        (first, first_rows, question[:3]),
        (level, level_rows, question[:20]),
    ]
    requests = [{"name": f"r{i}", **bench.submit(cache, suffix)} for i, (cache, _, suffix) in enumerate(wanted)]
    requests.insert(2, {"name": "plain", "prompt": plain, "max_tokens": GENERATED})
    wish = compact.wish(METHODS["cake"])
    requests.append({"name": "maker", "prompt": prose("made beside", length=450), "max_tokens": 2, "kv_transfer_params": wish})
    bench.engine.call("submit", requests=requests)
    names = [request["name"] for request in requests]
    bench.engine.run(names=names)
    outputs = dict(zip(names, bench.engine.collect(names)))
    for i, (cache, rows, suffix) in enumerate(wanted):
        assert bench.difference(outputs[f"r{i}"], cache, rows, suffix) < TOLERANCE["float32"]
    assert outputs["plain"].tokens == alone.tokens
    assert bench.engine.settle(limit=60)
    made = compact.CompactCache.from_answer(outputs["maker"].kv_transfer_params)
    assert 0 < bench.daemon.wait(made, seconds=120)["error_mean"] < 1


def test_preemption_and_resume(bench):
    check_preemption(bench)


def check_preemption(bench):
    cache, rows, alone = bench.check_ragged("keydiff", 450)
    suffix = prose("q", "keydiff", length=9)
    bench.engine.call("submit", requests=[{"name": "preempted", **bench.submit(cache, suffix)}])
    bench.engine.run_until_token(name="preempted")
    bench.engine.preempt_all()
    bench.engine.poison(value=50.0)
    bench.engine.run(names=["preempted"])
    (output,) = bench.engine.collect(["preempted"])
    assert output.tokens == alone.tokens and bench.difference(output, cache, rows, suffix) < TOLERANCE["float32"]


def test_a_step_whose_layers_were_not_all_served_fails_its_ragged_requests_alone(bench):
    cache, _, _ = bench.check_ragged("keydiff", 480)
    bench.engine.call("break_ragged_steps", broken=True)
    plain = prose("beside it", length=90)
    requests = [{"name": "ragged", **bench.submit(cache, [1, 2])}, {"name": "beside", "prompt": plain, "max_tokens": 4}]
    bench.engine.call("submit", requests=requests)
    bench.engine.run(names=["ragged", "beside"])
    ragged, beside = bench.engine.collect(["ragged", "beside"])
    assert not bench.engine.call("break_ragged_steps", broken=False)
    assert (ragged.finish_reason, ragged.tokens) == ("error", [])
    assert len(beside.tokens) == 4
    assert len(bench.decode(cache, [1, 2]).tokens) == GENERATED


def test_a_daemon_that_has_never_heard_of_it_serves_it_from_a_lower_tier(stage, bench):
    prompt, suffix = prose("made elsewhere", length=611), prose("q", "elsewhere", length=9)
    cache, rows = bench.make(prompt, METHODS["cake"])
    assert len(set(bench.layer_slots(cache))) > 1
    stage.daemon.wait_metric("kvern_tier_queued_bytes", lambda value: value == 0)
    stage.daemon.destroy()  # with all that it had in DRAM
    shutil.rmtree(stage.folder / "compact")
    stage.daemon.start()
    stage.daemon.wait_metric("kvern_sessions", lambda value: value >= 3)
    bench.engine.wait_connected()
    assert bench.daemon.state(cache)["state"] == "unknown"
    output = bench.decode(cache, suffix)
    assert output.cached_tokens == cache.slots
    assert bench.difference(output, cache, rows, suffix) < TOLERANCE["float32"]
    again = bench.decode(cache, suffix)
    assert again.tokens == output.tokens, "vLLM has the slots itself, and the layers' are remembered"


# ---------------------------------------------------------------- the matrix


@pytest.mark.full
def test_requests_of_all_kinds_in_one_batch_where_the_caches_lie_apart(apart):
    check_batch(apart)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["bench", "apart"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(request, method, layout):
    request.getfixturevalue(layout).check_ragged(method, 1200)


@pytest.mark.full
def test_torch_compile(stage, daemon):
    bench = Ragged(stage, smollm2(), enforce_eager=False)
    bench.watches = False
    bench.check_ragged("keydiff", 611)
    bench.close()
    bench.engine.stop()


@pytest.mark.full
@pytest.mark.parametrize("heads, kv_heads, rope", [(8, 8, None), (8, 2, "llama3")])
def test_other_heads_and_rotations(stage, daemon, heads, kv_heads, rope):
    bench = Ragged(stage, random_llama(heads, kv_heads, rope=rope))
    cache, _, _ = bench.check(METHODS["keydiff"], tokens("rope", rope, length=900), tokens("suffix", length=5))
    assert len(set(bench.layer_slots(cache))) > 1
    bench.close()
    bench.engine.stop()


@pytest.mark.full
def test_bf16_and_larger_blocks(stage, daemon):
    bench = Ragged(stage, smollm2(), dtype="bfloat16", block_size=64)
    bench.check_ragged("cake", 1023, page=64)
    bench.close()
    bench.engine.stop()
