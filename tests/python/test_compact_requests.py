"""Compact caches in vLLM's real scheduler: prompts are handed over whole and once, queries are the right ones, and a
request that decodes from a handle reads its slots or fails; its placeholders are never computed."""

import fake_native
import mini_engine
import numpy
import pytest
import torch
from test_scheduler_side import BLOCK, assert_at_rest, computed, prompt_of, side_of, tokens_of
from vllm.config import KVTransferConfig
from vllm.v1.request import RequestStatus

from kvern import compat
from kvern.compactions import plan_making
from kvern.config import Options, RequestOptions
from kvern.groups import Geometry
from kvern.metadata import CompactOrder, KvernMetadata, StoreOrder
from kvern.ragged_attention import RaggedAttention
from kvern.worker_side import WorkerSide

PLACEHOLDER = 7


def compact(spec="streaming(slots=100)", **more):
    return {"kvern": {"compact": spec, **more}}


def told(engine, request) -> dict:
    return engine.finish_params[request.request_id]["kvern"]["compact"]


def handle_of(engine, prompt, spec="streaming(slots=100)", **more) -> str:
    """Makes a compact cache and forgets all else."""
    request = engine.generate(prompt, max_tokens=1, params=compact(spec, **more))
    answer = told(engine, request)
    assert answer["state"] == "pending", answer
    engine.compact_prompts[answer["handle"]] = list(prompt)
    engine.forget()
    return answer["handle"]


def slots_of(handle: str) -> int:
    return int(handle.split(".")[2])


def decode_options(handle, **more) -> dict:
    return {"params": {"kvern": {"handle": handle}}, "cache_salt": handle, **more}


def add_decoding(engine, handle, suffix=(1, 2, 3), max_tokens=4):
    return engine.add([PLACEHOLDER] * slots_of(handle) + list(suffix), max_tokens, **decode_options(handle))


def run(engine, request):
    engine.run(request)
    engine.settle()
    return request


def queries_of(engine, store, handle) -> list[torch.Tensor]:
    """[rows, heads, dim] of each layer, of all ranks' heads."""
    parts = [_queries_in(arguments) for _, (_, arguments) in sorted(store.compaction_parts[handle].items())]
    return [torch.cat(layer, 1) for layer in zip(*parts)]


def _queries_in(arguments) -> list[torch.Tensor]:
    shape = (arguments["query_rows"], arguments["query_heads"], mini_engine.DIM)
    return [torch.from_numpy(numpy.frombuffer(part, numpy.float32).reshape(shape).copy()) for part in arguments["queries"]]


def wanted_queries(engine, prompt, rows) -> torch.Tensor:
    return torch.stack([mini_engine.query_row(state) for state in engine._states(prompt)[-rows:]])


# ---------------------------------------------------------------- making one


@pytest.mark.parametrize("length", [100, 128, 500, 512, 700])
def test_a_prompt_is_handed_over_whole(engine, store, length):
    one = engine()
    request = one.generate(prompt_of(length), params=compact("streaming(slots=60)", ttl_seconds=100))
    answer = told(one, request)
    assert (answer["state"], answer["prompt_tokens"], answer["slots"]) == ("pending", length, 60)
    assert answer["method"] == "streaming(slots=60)"
    order = store.compactions[answer["handle"]]
    assert (order["prompt_tokens"], order["slots"], order["expires_at"]) == (length, 60, answer["expires_at"])
    assert len(order["source_hashes"]) == 32 * -(-length // BLOCK) and len(order["slot_hashes"]) == 32 * 2
    assert order["queries"] == [] and order["query_rows"] == 0
    assert_at_rest(one)


def test_layers_get_the_same_slots_where_the_engine_cannot_read_others(engine):
    one = engine(policy="fail")
    answer = told(one, one.generate(prompt_of(500), params=compact("snapkv(slots=60,window=40,ragged)")))
    assert (answer["slots"], answer["method"]) == (60, "snapkv(slots=60,window=40)")
    assert answer["handle"].startswith("kvc1.")
    assert_at_rest(one)


def test_the_slots_of_the_largest_layer_are_claimed_where_caches_lie_apart(engine, monkeypatch):
    apart = {"pool": "the layers' caches are separate allocations", "shift": ""}
    monkeypatch.setattr(RaggedAttention, "self_test", lambda self, run_step: setattr(self, "problems", apart))
    one = engine(policy="fail")
    answer = told(one, one.generate(prompt_of(500), params=compact("snapkv(slots=60,window=40,ragged)")))
    assert (answer["slots"], answer["method"]) == (128, "snapkv(slots=60,window=40,ragged)")
    assert answer["handle"].startswith("kvc3.")
    assert_at_rest(one)


def test_the_store_has_the_prompt_in_its_own_name_too(engine):
    one = engine()
    prompt = prompt_of(500)
    handle_of(one, prompt)
    assert computed(one, one.generate(prompt)) == 500 - 480


def test_a_request_that_stores_nothing_may_be_compacted(engine, store):
    one = engine()
    handle_of(one, prompt_of(500), store=False)
    assert {len(chunk.hashes) for chunk in store.chunks.values()} == {4}, "100 slots and nothing else"


@pytest.mark.parametrize("batched", [1024, 100, 64, 33])
@pytest.mark.parametrize("length", [300, 430])
def test_the_last_queries_are_captured_however_the_prefill_is_cut(engine, store, batched, length):
    one = engine(max_batched=batched)
    prompt = prompt_of(length)
    handle = handle_of(one, prompt, "snapkv(slots=100,window=40)")
    (queries,) = queries_of(one, store, handle)
    assert torch.equal(queries, wanted_queries(one, prompt, 40))
    assert_at_rest(one)


def test_requests_of_one_batch_get_their_own_queries(engine, store):
    one = engine(max_batched=200, blocks=128)
    common = prompt_of(256)
    prompts = [common + prompt_of(60 + i * 16, seed=5 + i) for i in range(3)] + [common + prompt_of(60, seed=5)]
    asked = [one.add(prompt, params=compact("snapkv(slots=100,window=40)")) for prompt in prompts[:3]]
    one.add(prompts[3], max_tokens=20)  # the same prompt as the first one's, and asks for nothing
    one.run(*asked)
    one.settle()
    for prompt, request in zip(prompts, asked):
        (queries,) = queries_of(one, store, told(one, request)["handle"])
        assert torch.equal(queries, wanted_queries(one, prompt, 40))


def add_choices(engine, prompt, numbers, params, parent="cmpl-1-0-abcdef01", **options):
    """As vLLM's front end makes them of a request with n choices."""
    return [engine.add(prompt, request_id=f"{i}_{parent}", params=params, **options) for i in numbers]


@pytest.mark.parametrize("spec", ["streaming(slots=100)", "snapkv(slots=100,window=40)"])
def test_the_choices_of_a_request_share_one_cache(engine, store, spec):
    one = engine(blocks=128)
    one.generate(prompt_of(10), max_tokens=1)  # the workers tell with the first step what they can do
    choices = add_choices(one, prompt_of(300), range(3), compact(spec))
    one.run(*choices)
    one.settle()
    (handle,) = store.compactions
    assert [told(one, choice)["handle"] for choice in choices] == [handle] * 3
    assert_at_rest(one)
    assert not side_of(one)._making._choices_of


def test_a_choice_that_comes_when_the_first_has_ended_shares_it_too(engine, store):
    one = engine()
    first, late = (run(one, add_choices(one, prompt_of(300), [i], compact(), max_tokens=1)[0]) for i in (0, 1))
    assert told(one, late) == told(one, first) and len(store.compactions) == 1


def test_a_choice_that_ends_before_the_first_has_its_prompt_is_told(engine, store):
    """vLLM's answer has what the last choice was told."""
    one = engine(max_batched=100)
    first, quick = (add_choices(one, prompt_of(300), [i], compact(), max_tokens=9)[0] for i in (0, 1))
    one.step()
    _, answer = side_of(one).request_finished(quick, ())
    assert "has not computed the prompt yet" in answer["kvern"]["compact"]["reason"]
    one.abort(quick)
    run(one, first)
    assert told(one, first)["state"] == "pending"


def test_choices_are_told_why_there_is_no_cache(engine, store):
    one = engine()
    choices = add_choices(one, prompt_of(300), [0, 1], compact("snapkv(slots=30,window=40)"))
    one.run(*choices)
    assert all("does not hold" in told(one, choice)["reason"] for choice in choices)
    first, second = add_choices(one, prompt_of(300, seed=2), [0, 1], compact(), parent="other")
    one.abort(first)
    one.run(second)
    one.settle()
    assert "ended before" in told(one, second)["reason"] and not store.compactions


@pytest.mark.parametrize("change", [{"salt": "another"}, {"seed": 3}, {"spec": "streaming(slots=50)"}, {"parent": "x"}])
def test_requests_that_only_look_like_choices_get_caches_of_their_own(engine, store, change):
    one = engine(blocks=128)

    def add(index, salt="one", seed=1, spec="streaming(slots=100)", parent="cmpl"):
        return one.add(prompt_of(300, seed), request_id=f"{index}_{parent}", params=compact(spec), cache_salt=salt)

    both = [add(0), add(1, **change)]
    one.run(*both)
    one.settle()
    assert len({told(one, request)["handle"] for request in both}) == len(store.compactions) == 2


def test_choices_are_forgotten_some_time_after_the_first(engine):
    one = engine()
    making, now = side_of(one)._making, [0.0]
    making._clock = lambda: now[0]
    run(one, add_choices(one, prompt_of(300), [0], compact())[0])
    assert len(making._choices) == 1
    now[0] += 61
    run(one, add_choices(one, prompt_of(300), [0], compact(), parent="other")[0])
    assert len(making._choices) == 1


def test_the_engines_own_attention_runs_where_nobody_asked(engine):
    one = engine()
    one.generate(prompt_of(300), params=compact("snapkv(slots=100,window=40)"))
    one.generate(prompt_of(300, seed=3))
    assert all("forward" not in vars(layer.impl) for layer in one.attention[0].values())
    one.add(prompt_of(300, seed=4))
    one.step()
    assert all("forward" not in vars(layer.impl) for layer in one.attention[0].values())


def test_what_an_aborted_request_had_captured_is_dropped(engine):
    one = engine(max_batched=100)
    request = one.add(prompt_of(190), params=compact("snapkv(slots=150,window=140)"))
    for _ in range(2):
        one.step()
    (worker,) = one.workers
    assert worker._worker._capture._captured
    one.abort(request)
    one.settle()
    assert not worker._worker._capture._captured
    assert_at_rest(one)


def test_a_local_prefix_that_leaves_too_few_queries_is_passed_over(engine, store):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)  # vLLM has 480 tokens of it now, and so has the store
    request = one.generate(prompt, params=compact("snapkv(slots=100,window=40)"))
    (queries,) = queries_of(one, store, told(one, request)["handle"])
    assert torch.equal(queries, wanted_queries(one, prompt, 40))
    assert computed(one, request) == 500 - 448, "the store serves what lies before the queries"
    again = one.generate(prompt)
    assert computed(one, again) == 500 - 480, "others still have their prefix"
    assert_at_rest(one)


def test_a_prefix_that_leaves_enough_is_used(engine, store):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt[:400])
    request = one.generate(prompt, params=compact("snapkv(slots=100,window=40)"))
    assert computed(one, request) == 500 - 384
    (queries,) = queries_of(one, store, told(one, request)["handle"])
    assert torch.equal(queries, wanted_queries(one, prompt, 40))


def test_an_engine_that_shows_no_attention_layers_makes_what_needs_no_queries(engine):
    one = engine(attention=False, options={"kvern.trust_rotation": True})
    refused = told(one, one.generate(prompt_of(300), params=compact("snapkv(slots=100,window=40)")))
    assert refused["state"] == "refused" and "queries cannot be captured" in refused["reason"]
    assert told(one, one.generate(prompt_of(300, seed=2), params=compact()))["state"] == "pending"


def test_an_attention_with_other_arguments_is_noticed(engine, monkeypatch):
    def forward(self, layer, q, key, value, kv_cache, attn_metadata, output=None):
        return output

    monkeypatch.setattr(mini_engine.AttentionImpl, "forward", forward)
    one = engine()
    refused = told(one, one.generate(prompt_of(300), params=compact("snapkv(slots=100,window=40)")))
    assert refused["state"] == "refused" and "takes other arguments" in refused["reason"]


def test_an_attention_that_hides_its_queries_is_noticed(engine, monkeypatch):
    def call(self, query, key, value):
        return self.impl.forward(self, query.view(-1, 4, mini_engine.DIM) * 2, key, value, None, None)

    monkeypatch.setattr(mini_engine.AttentionLayer, "__call__", call)
    one = engine()
    refused = told(one, one.generate(prompt_of(300), params=compact("snapkv(slots=100,window=40)")))
    assert refused["state"] == "refused" and "self-test" not in refused["reason"] and "as they came" in refused["reason"]


@pytest.mark.parametrize(
    "wish, reason",
    [
        ({"compact": "nonsense(1)"}, "no such method"),
        ({"compact": "snapkv(slots=30,window=40)"}, "does not hold"),
        ({"compact": 7}, "must be a chain"),
        ({"compact": "streaming(slots=100)", "ttl_seconds": 0}, "ttl_seconds"),
        ({"compact": "streaming(slots=100)", "task": "poetry"}, "task must be"),
        ({"compact": "streaming(slots=100)", "task": "localisation"}, "windowkv alone"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_and_the_request_served(engine, store, wish, reason):
    one = engine()
    cold = one.generate(prompt_of(300))
    one.forget()
    request = one.generate(prompt_of(300), params={"kvern": wish})
    assert tokens_of(request) == tokens_of(cold)
    assert told(one, request)["state"] == "refused" and reason in told(one, request)["reason"]
    assert not store.compactions
    assert_at_rest(one)


@pytest.mark.parametrize("options, reason", [({"windows": (0, 64)}, "full attention"), ({"role": "kv_consumer"}, "does not store")])
def test_an_engine_that_cannot_make_one_says_so(engine, options, reason):
    one = engine(**options)
    assert reason in told(one, one.generate(prompt_of(300), params=compact()))["reason"]


def test_without_a_daemon_the_request_is_served_and_told(engine, store):
    store.state = "connecting"
    one = engine(options={"kvern.setup_timeout_ms": 0})
    one.generate(prompt_of(10), max_tokens=1)  # the workers tell with the first step what they can do
    request = one.generate(prompt_of(300), params=compact())
    assert len(tokens_of(request)) == 4 and "daemon" in told(one, request)["reason"]


# ---------------------------------------------------------------- decoding from one


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("slots", [1, 31, 32, 100, 256, 300])
def test_a_request_reads_the_slots_of_its_handle(engine, slots, policy):
    """The make-believe model checks every row that it reads."""
    one = engine(policy=policy)
    handle = handle_of(one, prompt_of(500), f"streaming(slots={slots})")
    request = run(one, add_decoding(one, handle, max_tokens=40))
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert computed(one, request) == 3
    assert_at_rest(one)


def test_another_engine_reads_them_too(engine):
    one, two = engine(), engine()
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    two.compact_prompts[handle] = prompt
    assert computed(two, run(two, add_decoding(two, handle))) == 3


def test_a_second_request_finds_the_slots_in_vllms_own_prefix_cache(engine, store):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    first = add_decoding(one, handle, suffix=prompt_of(50, seed=2), max_tokens=1)
    run(one, first)
    second = run(one, add_decoding(one, handle, suffix=(4, 5)))
    assert computed(one, second) == 2, "96 slots are there, and the last 4 are loaded"
    same = run(one, add_decoding(one, handle, suffix=prompt_of(50, seed=2) + [9]))
    assert computed(one, same) == 151 - 128
    together = [add_decoding(one, handle, suffix=(i, i + 1)) for i in range(5)]
    one.run(*together)
    one.settle()
    assert all(computed(one, request) == 2 for request in together)
    assert_at_rest(one)


def test_nothing_of_such_a_request_is_stored(engine, store):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    before = set(store.chunks)
    run(one, add_decoding(one, handle, suffix=prompt_of(300, seed=4), max_tokens=200))
    assert set(store.chunks) == before


def test_placeholders_without_the_salt_find_nothing_of_the_handle(engine):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    run(one, add_decoding(one, handle))
    plain = one.generate([PLACEHOLDER] * 100 + [1, 2, 3])
    assert computed(one, plain) == 103


def test_preemption_reloads(engine, store):
    one = engine(blocks=16)
    handle = handle_of(one, prompt_of(300))
    ordinary = one.add(prompt_of(200, seed=2), 150)
    request = add_decoding(one, handle, max_tokens=150)
    one.run(ordinary, request)
    one.settle()
    assert ordinary.num_preemptions + request.num_preemptions > 0
    assert request.status == ordinary.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert_at_rest(one)


# ---------------------------------------------------------------- several ranks


@pytest.mark.parametrize("batched", [1024, 100])
def test_two_ranks_hand_over_a_prompt_and_read_its_slots(engine, store, batched):
    one = engine(ranks=2, max_batched=batched)
    prompt = prompt_of(430)
    handle = handle_of(one, prompt, "snapkv(slots=100,window=40)")
    assert {head: part["query_heads"] for head, (_, part) in store.compaction_parts[handle].items()} == {0: 2, 1: 2}
    (queries,) = queries_of(one, store, handle)
    assert torch.equal(queries, wanted_queries(one, prompt, 40))
    assert computed(one, run(one, add_decoding(one, handle))) == 3
    assert_at_rest(one)


@pytest.mark.parametrize("makers, readers", [(2, 1), (1, 2)])
def test_slots_serve_engines_of_other_ranks(engine, makers, readers):
    one, two = engine(ranks=makers), engine(ranks=readers)
    prompt = prompt_of(300)
    handle = handle_of(one, prompt)
    two.compact_prompts[handle] = prompt
    assert computed(two, run(two, add_decoding(two, handle))) == 3


def test_a_rank_that_cannot_load_fails_the_request(engine, store):
    one = engine(ranks=2)
    handle = handle_of(one, prompt_of(300))
    store.fail_loads = True
    request = run(one, add_decoding(one, handle))
    assert request.status == RequestStatus.FINISHED_ERROR and not tokens_of(request)
    assert_at_rest(one)


def test_a_rank_whose_heads_another_one_stores_asks_for_nothing():
    geometry = Geometry((), BLOCK, 8, tensor_parallel=2, pipeline_parallel=1, replicas=2)
    worker = WorkerSide(geometry, Options.from_extra_config({}), fake_native, None, 1, 0)
    store = StoreOrder(1, 0, 0, "raw", 32, [(b"h" * 32, [1], 0, b"")])
    facts = {name: b"" if name.endswith("hashes") else 0 for name in CompactOrder.__dataclass_fields__}
    order = CompactOrder(**{**facts, "job": 2, "store_job": 1, "request": "r"})
    worker.bind(KvernMetadata(stores=[store], compactions=[order]))
    worker.submit_stores()
    assert not worker._compactions and worker.errors == 0
    assert worker.take_report().reports[1].stored == {1: [0]}


def test_engines_whose_ranks_do_not_see_all_of_it_are_refused():
    class Group:
        window, block_tokens = 0, BLOCK

    class Request:
        sampling_params, num_prompt_tokens, resumable = object(), 500, False

    def plan(spec, **geometry):
        sizes = {"tensor_parallel": 4, "pipeline_parallel": 1, "replicas": 1, **geometry}
        options = RequestOptions.from_request({"kvern": {"compact": spec}})
        return plan_making(Request, options, Geometry((Group,), BLOCK, 8, **sizes), fake_native.compaction_plan)

    assert plan("snapkv(slots=60,window=40)").query_rows == 40
    with pytest.raises(ValueError, match="pipeline-parallel"):
        plan("streaming(slots=60)", pipeline_parallel=2)
    with pytest.raises(ValueError, match="share KV heads"):
        plan("snapkv(slots=60,window=40)", replicas=2)
    assert plan("streaming(slots=60)", replicas=2).slots == 60


# ---------------------------------------------------------------- failing closed


def assert_failed(one, request):
    """With no token, computed or generated."""
    assert request.status == RequestStatus.FINISHED_ERROR
    assert tokens_of(request) == [] and one.forwarded.get(request.request_id, 0) == 0
    other = one.generate(prompt_of(40, seed=99))
    assert len(tokens_of(other)) == 4, "the engine goes on"
    assert_at_rest(one)


@pytest.fixture(params=["fail", "recompute"])
def one(engine, request):
    made = engine(policy=request.param, options={"kvern.setup_timeout_ms": 0})
    made.generate(prompt_of(10), max_tokens=1)  # the workers tell with the first step what they can do
    return made


def break_digit(handle: str) -> str:
    return handle[:-1] + ("0" if handle[-1] != "0" else "1")


@pytest.mark.parametrize(
    "change",
    [
        lambda handle: {"params": {"kvern": {"handle": "kvc1.nonsense"}}},
        lambda handle: {"params": {"kvern": {"handle": None}}},
        lambda handle: {"params": {"kvern": {"handle": 7}}},
        lambda handle: {"cache_salt": None},
        lambda handle: {"cache_salt": "tenant"},
        lambda handle: {"params": None},
        lambda handle: {"params": {"kvern": {"load": False}}},
        lambda handle: {"params": {"kvern": {"handle": handle, "compact": "streaming(slots=5)"}}},
        lambda handle: decode_options(break_digit(handle)),
        lambda handle: decode_options(handle.replace(".100.", ".99.")),
        lambda handle: decode_options(handle.replace("kvc1", "kvc2")),
        lambda handle: {"skip_reading": True},
        lambda handle: {"params": {"kvern": {"handle": handle}, "do_remote_prefill": True}},
    ],
    ids=[
        "malformed", "null", "number", "no salt", "other salt", "salt alone", "no handle", "both", "unknown", "other M", "ragged", "skip",
        "other connectors",
    ],
)  # fmt: skip
def test_a_request_that_is_not_as_it_must_be_fails(one, change):
    handle = handle_of(one, prompt_of(500))
    request = one.add([PLACEHOLDER] * 100 + [1, 2, 3], **{**decode_options(handle), **change(handle)})
    assert_failed(one, run(one, request))


def test_a_request_with_no_token_behind_the_slots_fails(one):
    handle = handle_of(one, prompt_of(500))
    assert_failed(one, run(one, add_decoding(one, handle, suffix=())))


def test_prompt_logprobs_fail(one):
    handle = handle_of(one, prompt_of(500))
    request = one.add([PLACEHOLDER] * 100 + [1, 2, 3], **decode_options(handle), prompt_logprobs=1)
    assert_failed(one, run(one, request))


def test_an_expired_handle_fails(one):
    handle = handle_of(one, prompt_of(500), ttl_seconds=60)
    side_of(one)._decoding._wall_clock = lambda: int(handle.split(".")[3])
    assert_failed(one, run(one, add_decoding(one, handle)))


def test_a_cache_that_is_gone_fails(one, store):
    handle = handle_of(one, prompt_of(500))
    store.blocks.clear()
    assert_failed(one, run(one, add_decoding(one, handle)))


def test_a_cache_of_which_a_part_is_gone_fails(one, store):
    handle = handle_of(one, prompt_of(500), "streaming(slots=300)")
    (key,) = [key for key, chunk in store.chunks.items() if len(chunk.hashes) == 2]
    for block in store.chunks.pop(key).hashes:
        del store.blocks[key[0], key[1], block]
    assert_failed(one, run(one, add_decoding(one, handle)))


def test_another_models_handle_fails(one, engine, tmp_path):
    handle = handle_of(one, prompt_of(500))
    foreign = engine(mini_engine.write_checkpoint(tmp_path / "other", seed=1), policy="fail")
    assert_failed(foreign, run(foreign, add_decoding(foreign, handle)))


def test_a_load_that_fails_fails_the_request(one, store):
    handle = handle_of(one, prompt_of(500))
    store.fail_loads = True
    assert_failed(one, run(one, add_decoding(one, handle)))


def test_a_load_that_fails_behind_a_local_prefix_fails_the_request(one, store):
    handle = handle_of(one, prompt_of(500))
    run(one, add_decoding(one, handle))
    store.fail_loads = True
    assert_failed(one, run(one, add_decoding(one, handle, suffix=(5, 6))))


def test_a_daemon_that_is_not_there_fails_the_request(one, store):
    handle = handle_of(one, prompt_of(500))
    store.state = "connecting"
    request = run(one, add_decoding(one, handle))
    store.state = "ready"
    assert_failed(one, request)


def test_a_reset_of_the_cache_fails_what_was_made_before(one):
    handle = handle_of(one, prompt_of(500))
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    assert_failed(one, run(one, add_decoding(one, handle)))


def test_a_request_that_loses_its_cache_while_it_is_preempted_fails(engine, store):
    one = engine(blocks=16, policy="recompute")
    handle = handle_of(one, prompt_of(300))
    request = add_decoding(one, handle, max_tokens=100)
    while len(request.output_token_ids) < 5:
        one.step()
    store.blocks.clear()
    assert one.preempt_all()
    generated = len(request.output_token_ids)
    one.run(request)
    one.settle()
    assert request.status == RequestStatus.FINISHED_ERROR
    assert len(request.output_token_ids) == generated, "nothing was generated after that"
    assert_at_rest(one)


def test_an_engine_that_only_stores_fails_them(engine):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    producer = engine(role="kv_producer", policy="fail")
    assert_failed(producer, run(producer, add_decoding(producer, handle)))


def test_an_engine_without_the_store_fails_them(engine, monkeypatch):
    one = engine()
    handle = handle_of(one, prompt_of(500))

    def broken(*arguments, **options):
        raise ValueError("no such address")

    monkeypatch.setattr(fake_native, "PrefixMatcher", broken)
    without = engine()
    assert without.connector._scheduler is None
    request = run(without, add_decoding(without, handle))
    assert request.status == RequestStatus.FINISHED_ERROR and not tokens_of(request)


def test_an_exception_in_the_look_up_fails_them(one, monkeypatch):
    handle = handle_of(one, prompt_of(500))

    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(fake_native.PrefixMatcher, "match", broken)
    request = run(one, add_decoding(one, handle))
    assert request.status == RequestStatus.FINISHED_ERROR and not tokens_of(request)


def beside_another(first: str) -> KVTransferConfig:
    """Of a MultiConnector that asks `first`, "KvernConnector" or "Bystander", before the other."""
    kvern = {
        "kv_connector": "KvernConnector",
        "kv_connector_module_path": "kvern.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvern.address": "unix:///fake"},
    }
    other = {
        "kv_connector": "Bystander",
        "kv_connector_module_path": "bystander",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tokens": BLOCK},
    }
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": sorted([kvern, other], key=lambda c: c["kv_connector"] != first)},
    )


def test_beside_another_connector_the_one_that_is_asked_first_decodes(engine):
    one = engine()
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    two = engine(transfer=beside_another("KvernConnector"))
    two.compact_prompts[handle] = prompt
    request = run(two, add_decoding(two, handle))
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED and computed(two, request) == 3


def test_behind_another_connector_they_fail(engine):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    two = engine(transfer=beside_another("Bystander"))
    request = run(two, add_decoding(two, handle))
    assert request.status == RequestStatus.FINISHED_ERROR and not tokens_of(request)


def test_where_vllm_cannot_fail_a_request_it_never_runs(engine, monkeypatch):
    one = engine()
    handle = handle_of(one, prompt_of(500))
    monkeypatch.setattr(compat, "_fails_by_grammar", lambda: False)
    request = add_decoding(one, handle)
    skipping = one.add([PLACEHOLDER] * 100 + [1], **decode_options(handle, skip_reading=True))
    other = one.add(prompt_of(100, seed=3), 20)
    one.run(other)
    assert not request.is_finished() and not skipping.is_finished()
    assert request.request_id not in one.forwarded and skipping.request_id not in one.forwarded
    one.abort(request)
    one.abort(skipping)
    assert_at_rest(one)
