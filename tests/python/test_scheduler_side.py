"""The connector in vLLM's real scheduler; the model is make-believe but checks every KV row that it reads."""

import itertools

import fake_native
import pytest
from vllm.config import KVTransferConfig
from vllm.v1.request import RequestStatus

CHUNK = 256
BLOCK = 32


def prompt_of(count: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i) % 500 for i in range(count)]


def tokens_of(request) -> list[int]:
    return list(request.output_token_ids)


def computed(engine, request) -> int:
    """Prompt tokens that were computed rather than found somewhere."""
    return engine.forwarded[request.request_id] - (len(request.output_token_ids) - 1)


def side_of(engine):
    return engine.connector._scheduler


def assert_at_rest(engine):
    """Every block is free again, nothing is claimed or remembered, nothing went wrong unseen."""
    side = side_of(engine)
    engine.settle()
    assert engine.free_blocks == engine.kv_cache_config.num_blocks - 1
    assert side._matcher.claims == 0
    assert not side._states and not side._loads and not side._stores
    assert side._holds.jobs == 0 and side._holds.blocks == 0
    assert side.all_errors == 0 and all(worker._worker.errors == 0 for worker in engine.workers)


# ---------------------------------------------------------------- hits


@pytest.mark.parametrize("length", [500, 512, 700, 130, 100])
def test_a_prompt_is_restored_after_the_engine_forgot_it_and_in_a_new_engine(engine, length):
    one = engine()
    prompt = prompt_of(length)
    cold = one.generate(prompt)
    assert computed(one, cold) == length
    one.forget()
    warm = one.generate(prompt)
    two = engine()
    fresh = two.generate(prompt)
    whole = length // BLOCK * BLOCK
    for where, request in ((one, warm), (two, fresh)):
        assert tokens_of(request) == tokens_of(cold)
        assert computed(where, request) == max(1, length - whole)
        assert_at_rest(where)


@pytest.mark.parametrize("length", [600, 300, 288, 256])
def test_a_prompt_that_leaves_a_stored_chunk_half_way_is_served_up_to_there(engine, length):
    one = engine()
    prompt = prompt_of(700)
    one.generate(prompt)
    one.forget()
    other = one.generate(prompt[:length] + prompt_of(90, seed=2))
    assert computed(one, other) == length + 90 - length // BLOCK * BLOCK
    assert_at_rest(one)


def test_a_gain_of_one_block_is_left_alone(engine):
    one = engine()
    prompt = prompt_of(40)
    one.generate(prompt)
    one.forget()
    assert computed(one, one.generate(prompt)) == 40
    assert_at_rest(one)


def test_a_local_prefix_is_continued_from_the_store(engine):
    one = engine()
    prompt = prompt_of(600)
    one.generate(prompt)
    one.forget()
    one.generate(prompt[:330])  # 320 of its tokens are in vLLM's own prefix cache now
    warm = one.generate(prompt)
    assert computed(one, warm) == 600 - 576
    assert_at_rest(one)


def test_nothing_is_loaded_or_stored_again_for_a_prompt_that_vllm_still_has(engine, store):
    one = engine()
    prompt = prompt_of(512)
    one.generate(prompt)
    chunks = set(store.chunks)
    jobs = next(side_of(one)._jobs)
    again = one.generate(prompt, max_tokens=2)
    # vLLM keeps one block back, which is no gain for a load.
    assert computed(one, again) == BLOCK
    assert next(side_of(one)._jobs) == jobs + 1 and set(store.chunks) == chunks
    assert_at_rest(one)


def test_what_was_loaded_is_not_stored_again_but_what_follows_is(engine, store):
    one = engine()
    prompt = prompt_of(512)
    one.generate(prompt)
    one.forget()
    before = set(store.chunks)
    longer = prompt + prompt_of(300, seed=3)
    one.generate(longer)
    added = {len(store.chunks[key].hashes) * BLOCK for key in set(store.chunks) - before}
    assert added == {CHUNK, 800 - 768}  # the third chunk and the tail
    assert_at_rest(one)


def test_chunks_of_generated_tokens_are_stored_when_complete(engine, store):
    one = engine()
    prompt = prompt_of(200)
    cold = one.generate(prompt, max_tokens=330)
    one.forget()
    both = prompt + tokens_of(cold)
    warm = one.generate(both + [1, 2, 3])
    assert computed(one, warm) == len(both) + 3 - 512
    assert_at_rest(one)


def test_generated_tokens_are_not_stored_when_the_option_says_so(engine):
    one = engine(options={"kvern.store_generated": False})
    prompt = prompt_of(200)
    cold = one.generate(prompt, max_tokens=330)
    one.forget()
    both = prompt + tokens_of(cold)
    warm = one.generate(both)
    assert computed(one, warm) == len(both) - 192
    assert_at_rest(one)


def test_chunked_prefill_stores_and_restores_the_same(engine):
    one = engine(max_batched=100)
    prompt = prompt_of(700)
    cold = one.generate(prompt)
    one.forget()
    warm = one.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold) and computed(one, warm) == 700 - 672
    assert_at_rest(one)


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_larger_blocks(engine, block_size):
    one = engine(block_size=block_size)
    prompt = prompt_of(1100)
    cold = one.generate(prompt)
    one.forget()
    warm = one.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold)
    assert computed(one, warm) == 1100 - 1100 // block_size * block_size
    assert_at_rest(one)


def test_salted_prompts_do_not_share(engine):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt, cache_salt="tenant-1")
    one.forget()
    assert computed(one, one.generate(prompt)) == 500
    one.forget()
    assert computed(one, one.generate(prompt, cache_salt="tenant-1")) == 20
    assert_at_rest(one)


def test_retrained_weights_at_the_same_path_miss(engine, model):
    import mini_engine

    prompt = prompt_of(500)
    engine().generate(prompt)
    mini_engine.write_checkpoint(model, seed=1)
    changed = engine()
    assert computed(changed, changed.generate(prompt)) == 500
    mini_engine.write_checkpoint(model, seed=0)
    back = engine()
    assert computed(back, back.generate(prompt)) == 20


def test_other_rope_settings_miss(engine, model):
    import mini_engine

    prompt = prompt_of(500)
    engine().generate(prompt)
    mini_engine.write_checkpoint(model, rope_theta=20000.0)
    changed = engine()
    assert computed(changed, changed.generate(prompt)) == 500


def write_adapter(folder, seed: int):
    import mini_engine

    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(mini_engine.safetensors(seed))
    (folder / "adapter_config.json").write_text("{}")


def test_adapters_share_by_content(engine, tmp_path):
    """Loaded as the front end has them loaded, through the executor."""
    from test_identity import executor
    from vllm.lora.request import LoRARequest

    one, prompt, ranks = engine(), prompt_of(500), executor()

    def load(number: int, folder: str, seed: int) -> LoRARequest:
        write_adapter(tmp_path / folder, seed)
        request = LoRARequest("a", number, str(tmp_path / folder))
        assert ranks.add_lora(request)
        return request

    def generate(request: LoRARequest) -> int:
        one.forget()
        return computed(one, one.generate(prompt, lora_request=request))

    first, same = load(1, "lora", seed=1), LoRARequest("a", 2, str(tmp_path / "lora"))
    assert generate(first) == 500 and generate(first) == 20 and generate(same) == 20
    write_adapter(tmp_path / "lora", seed=2)
    assert generate(first) == 500, "nobody can tell which version the engine has loaded"
    anew = load(3, "lora-2", seed=2)
    assert generate(anew) == 500 and generate(anew) == 20
    assert_at_rest(one)


def test_an_adapter_that_was_overwritten_since_it_was_loaded_is_not_shared(engine, store, tmp_path):
    from test_identity import executor
    from vllm.lora.request import LoRARequest

    one = engine()
    request = LoRARequest("a", 1, str(tmp_path / "lora"))
    write_adapter(tmp_path / "lora", seed=1)
    executor().add_lora(request)
    write_adapter(tmp_path / "lora", seed=2)
    one.generate(prompt_of(500), lora_request=request)
    assert not store.chunks
    unseen = LoRARequest("b", 2, str(tmp_path / "lora"))
    one.generate(prompt_of(500), lora_request=unseen)
    assert not store.chunks, "younger than the engine, and not seen being loaded"
    assert_at_rest(one)


# ---------------------------------------------------------------- a daemon that hangs


def test_a_full_pool_waits_for_young_holds_alone():
    import types

    from kvern.page_holds import PageHolds

    now = [100.0]
    blocks = [types.SimpleNamespace(ref_cnt=0) for _ in range(8)]

    class Pool:
        def __init__(self):
            self.blocks = blocks

        def touch(self, blocks):
            for block in blocks:
                block.ref_cnt += 1

        def free_blocks(self, ordered_blocks):
            for block in ordered_blocks:
                block.ref_cnt -= 1

    holds = PageHolds(1, clock=lambda: now[0])
    holds.bind(Pool())
    assert not holds.problem and not holds.frees_soon()
    holds.take(1, [1, 2])
    assert holds.frees_soon()
    now[0] += PageHolds.SOON_SECONDS - 0.01
    assert holds.frees_soon()
    now[0] += 0.02
    assert not holds.frees_soon(), "the daemon hangs: vLLM is to preempt"
    holds.take(2, [3])
    assert holds.frees_soon()
    holds.gathered(2, 0)
    assert not holds.frees_soon() and holds.blocks == 2


def test_an_engine_goes_on_while_its_daemon_hangs_and_its_pool_is_full(engine, store):
    """As vLLM's scheduler sees it: with a pool that is full and stores that do not end it preempts."""
    one = engine(blocks=24)
    side, now = side_of(one), [0.0]
    side._holds._clock = lambda: now[0]
    store.hold = True
    one.run(one.add(prompt_of(128, seed=9), max_tokens=1))
    growing = [one.add(prompt_of(250, seed=seed), max_tokens=100) for seed in (2, 3)]
    for _ in range(1000):
        now[0] += 0.1
        one.step()
    assert all(request.is_finished() for request in growing) and sum(r.num_preemptions for r in growing)
    assert side._holds.blocks
    store.hold = False
    assert_at_rest(one)


# ---------------------------------------------------------------- sliding windows

WINDOWS = [(128, 0), (0, 128), (128, 128, 0), (300, 0), (65, 0)]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("max_batched", [1024, 100])
def test_groups_with_sliding_windows_are_restored(engine, windows, max_batched):
    one = engine(windows=windows, blocks=160, max_batched=max_batched)
    prompt = prompt_of(700)
    cold = one.generate(prompt)
    for length in (700, 600, 130, 672):
        one.forget()
        warm = one.generate(prompt[:length])
        if length == 700:
            assert tokens_of(warm) == tokens_of(cold)
        assert computed(one, warm) < length / 2
        assert_at_rest(one)


@pytest.mark.parametrize("windows", WINDOWS[:2])
def test_a_local_prefix_of_a_hybrid_model_is_continued_from_the_store(engine, windows):
    one = engine(windows=windows, blocks=160)
    prompt = prompt_of(700)
    one.generate(prompt)
    one.forget()
    one.generate(prompt[:330])
    warm = one.generate(prompt)
    assert computed(one, warm) == 700 - 672
    assert_at_rest(one)


def test_a_full_hit_gives_one_block_back_where_the_last_tokens_window_begins_a_block_earlier(engine):
    one = engine(windows=(65, 0), blocks=160)
    prompt = prompt_of(512)
    one.generate(prompt)
    one.forget()
    warm = one.generate(prompt)  # the model itself complains if the window of token 511 is not there
    assert computed(one, warm) in (1, BLOCK)
    assert_at_rest(one)


# ---------------------------------------------------------------- pages are held until they are gathered


def test_blocks_stay_with_a_store_when_their_request_has_ended(engine, store):
    one = engine()
    free = one.free_blocks
    store.hold = True
    request = one.add(prompt_of(500))
    one.run(request)
    assert one.scheduler.has_requests(), "the engine must go on stepping"
    assert free - one.free_blocks == 500 // BLOCK
    store.hold = False
    assert_at_rest(one)
    one.forget()
    assert computed(one, one.generate(prompt_of(500))) == 20


def test_an_aborted_request_leaves_its_planned_stores_and_nothing_else(engine, store):
    one = engine(max_batched=256)
    store.hold = True
    request = one.add(prompt_of(700))
    one.step()
    one.abort(request)
    one.step()
    assert side_of(one)._holds.blocks == CHUNK // BLOCK
    store.hold = False
    assert_at_rest(one)


def test_stores_may_not_keep_the_pool_from_serving(engine, store):
    one = engine(blocks=64)
    store.hold = True
    requests = [one.add(prompt_of(500, seed)) for seed in range(5)]
    one.run(*requests)
    assert side_of(one)._holds.blocks <= 64 / 4 + 500 // BLOCK
    store.hold = False
    assert_at_rest(one)


def test_a_sliding_windows_blocks_are_not_given_away_before_they_are_gathered(engine, store):
    # Without a prefix cache of its own, vLLM gives a freed block away at once.
    one = engine(windows=(128, 0), blocks=160, max_batched=128, caching=False)
    gate = itertools.cycle([True, True, False])
    request = one.add(prompt_of(700))
    while not request.is_finished():
        store.hold = next(gate)
        one.step()
    store.hold = False
    assert_at_rest(one)
    for length in (128, 192, 288, 416, 544, 700):  # each needs other blocks of the window
        one.forget()
        assert computed(one, one.generate(prompt_of(length), params={"kvern": {"store": False}})) <= BLOCK
    assert_at_rest(one)


def test_preempted_requests_give_the_same_output(engine):
    roomy, tight = engine(blocks=64), engine(blocks=22, options={"kvern.weights": "apart"})
    prompts = [prompt_of(300, seed) for seed in (1, 2)]
    wanted = [tokens_of(roomy.generate(prompt, max_tokens=120)) for prompt in prompts]
    requests = [tight.add(prompt, max_tokens=120) for prompt in prompts]
    tight.run(*requests)
    assert [tokens_of(request) for request in requests] == wanted
    assert sum(request.num_preemptions for request in requests) > 0
    assert_at_rest(tight)


def test_a_preempted_request_is_restored_from_the_store(engine):
    one = engine()
    prompt = prompt_of(500)
    request = one.add(prompt, max_tokens=60)
    while len(request.output_token_ids) < 30:
        one.step()
    before = one.forwarded[request.request_id]
    one.preempt_all()
    one.run(request)
    # 480 of 530 tokens came back; the rest and the further tokens were computed.
    assert one.forwarded[request.request_id] - before <= 530 - 480 + 31
    assert request.num_preemptions == 1
    assert_at_rest(one)


def test_requests_that_stop_early_while_others_load_into_their_blocks(engine):
    """A stop token is seen a step late where steps overlap: the request is computed once more, in blocks that it gave back."""
    roomy, tight = engine(blocks=200), engine(blocks=30)
    prompts = [prompt_of(290 + 7 * seed, seed) for seed in range(1, 9)]
    wanted = []
    for prompt in prompts:
        tokens = tokens_of(roomy.generate(prompt, max_tokens=9))
        stop = tokens[5]
        wanted.append((stop, tokens[: tokens.index(stop) + 1]))
    for _ in range(2):
        requests = [
            tight.add(prompt, max_tokens=40, stop_token_ids=[stop]) for prompt, (stop, _) in zip(prompts, wanted)
        ]
        tight.run(*requests)
        assert [tokens_of(request) for request in requests] == [tokens for _, tokens in wanted]
        tight.settle()
        tight.forget()
    assert sum(computed(tight, request) for request in requests) < 8 * 32, "the prompts were loaded"
    assert_at_rest(tight)


# ---------------------------------------------------------------- loads that do not end well


def start_load(engine, store, prompt):
    """A request that waits for its load."""
    engine.generate(prompt)
    engine.forget()
    store.hold = True
    request = engine.add(prompt)
    engine.step()
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    return request


def test_an_aborted_load_keeps_its_blocks_until_it_has_ended(engine, store):
    one = engine()
    request = start_load(one, store, prompt_of(500))
    one.abort(request)
    assert one.free_blocks < one.kv_cache_config.num_blocks - 1
    one.step()  # tells the worker, which ends the load early
    one.step()
    assert_at_rest(one)
    store.hold = False
    assert computed(one, one.generate(prompt_of(500))) == 20


def test_an_aborted_load_that_ends_well_frees_its_blocks_once(engine, store):
    one = engine()
    request = start_load(one, store, prompt_of(500))
    store.hold = False
    one.abort(request)
    assert_at_rest(one)


@pytest.mark.parametrize("windows", [(0,), (128, 0)])
def test_a_failed_load_is_recomputed_and_not_tried_again(engine, store, windows):
    one = engine(windows=windows, blocks=160)
    prompt = prompt_of(500)
    cold = one.generate(prompt)
    one.forget()
    store.fail_loads = True
    warm = one.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold) and computed(one, warm) == 500
    assert_at_rest(one)
    store.fail_loads = False
    one.forget()
    assert computed(one, one.generate(prompt)) == 20


def test_a_failed_load_is_recomputed_where_failures_are_told_by_block(engine, store, monkeypatch):
    from kvern import compat

    monkeypatch.setattr(compat, "HAS_TRANSFER_RESULTS", False)
    one = engine()
    one.tells_failures_by_block = True
    prompt = prompt_of(500)
    cold = one.generate(prompt)
    one.forget()
    store.fail_loads = True
    warm = one.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold) and computed(one, warm) == 500
    assert_at_rest(one)
    two = engine(windows=(128, 0), blocks=160)
    assert two.connector._scheduler is None


def test_a_failed_load_fails_its_request_alone_under_the_policy_fail(engine, store):
    one = engine(policy="fail")
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    store.fail_loads = True
    failed = one.generate(prompt)
    assert failed.status == RequestStatus.FINISHED_ERROR and not failed.output_token_ids
    store.fail_loads = False
    assert computed(one, one.generate(prompt)) == 20
    assert_at_rest(one)


def test_a_load_that_cannot_be_planned_fails_instead_of_hanging(engine, store, monkeypatch):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    monkeypatch.setattr(side_of(one), "_pieces", lambda *_: 1 / 0)
    warm = one.generate(prompt)
    assert computed(one, warm) == 500 and side_of(one).errors == 1


def test_a_worker_that_cannot_submit_a_load_reports_it_as_failed(engine, monkeypatch):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    monkeypatch.setattr(fake_native.TransferWorker, "submit_load", lambda *_: 1 / 0)
    assert computed(one, one.generate(prompt)) == 500
    assert one.workers[0]._worker.errors == 1


def test_a_worker_that_cannot_submit_a_store_gives_the_pages_back(engine, monkeypatch):
    one = engine()
    monkeypatch.setattr(fake_native.TransferWorker, "submit_store", lambda *_: 1 / 0)
    one.generate(prompt_of(500))
    one.settle()
    assert one.free_blocks == one.kv_cache_config.num_blocks - 1


def test_an_exception_in_a_look_up_is_a_miss(engine, monkeypatch):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    monkeypatch.setattr(fake_native.PrefixMatcher, "match", lambda *_: 1 / 0)
    assert computed(one, one.generate(prompt)) == 500
    assert side_of(one).errors > 0


# ---------------------------------------------------------------- the look-up itself


def test_waiting_requests_are_looked_up_once(engine, store):
    one = engine(blocks=40)
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    first = one.add(prompt_of(1000, seed=5), max_tokens=40)  # takes most of the pool
    one.step()
    store.matches = 0
    second = one.add(prompt)
    for _ in range(20):
        one.step()
    assert store.matches <= 3, "vLLM asks once per step; the answer must come from memory"
    one.run(first, second)
    assert_at_rest(one)


def test_an_answer_that_is_not_known_yet_is_asked_for_again(engine):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    side_of(one)._matcher.unknown = 5
    assert computed(one, one.generate(prompt)) == 20
    assert_at_rest(one)


def test_a_namespace_that_is_never_registered_holds_nobody_up(engine, store):
    store.registered = False
    one = engine()
    ticks = itertools.count()
    side_of(one)._clock = lambda: next(ticks) * 0.01
    one.generate(prompt_of(500))
    assert not store.chunks
    assert one.free_blocks == one.kv_cache_config.num_blocks - 1


def test_a_refused_namespace_is_a_miss(engine, store):
    one = engine()
    client = side_of(one)._client
    store.refusals[client.id_of(0)] = "no"
    one.generate(prompt_of(500))
    assert not store.chunks
    assert_at_rest(one)


def test_without_a_daemon_the_engine_serves_and_uses_it_as_soon_as_it_is_there(engine, store):
    store.state = "connecting"
    one = engine()
    side_of(one)._started -= 10
    prompt = prompt_of(500)
    one.generate(prompt)
    assert not store.chunks
    store.state = "ready"
    one.forget()
    one.generate(prompt)
    assert store.chunks
    one.forget()
    assert computed(one, one.generate(prompt)) == 20
    assert_at_rest(one)


def test_an_answer_from_before_a_reconnect_is_not_used(engine, store):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    side = side_of(one)
    request = one.add(prompt)
    assert side.get_num_new_matched_tokens(request, 0) == (480, True)
    store.chunks.clear(), store.blocks.clear()
    store.session_count += 1
    assert side.get_num_new_matched_tokens(request, 0) == (0, False)
    one.run(request)
    assert_at_rest(one)


# ---------------------------------------------------------------- what requests and roles may ask for


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"kvern": {"load": False}}, 500),
        ({"kvern": {"max_load_tokens": 300}}, 500 - 288),
        ({"kvern": {"max_load_tokens": 0}}, 500),
        ({"kvern": {"max_load_tokens": "many", "load": 7, "other": None}}, 20),
        ({"kvern": [1, 2]}, 20),
        ({"other": 1}, 20),
        ({}, 20),
    ],
)
def test_a_request_limits_its_load(engine, params, expected):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    assert computed(one, one.generate(prompt, params=params)) == expected
    assert_at_rest(one)


@pytest.mark.parametrize("limit, stored", [(0, 0), (100, 96), (300, 288), (10_000, 480)])
def test_a_request_limits_what_is_stored_of_it(engine, limit, stored):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt, params={"kvern": {"max_store_tokens": limit}})
    one.forget()
    assert computed(one, one.generate(prompt, params={"kvern": {"store": False}})) == 500 - stored
    assert_at_rest(one)


def test_what_a_request_hits_and_stores_is_retained(engine, store):
    one = engine()
    one.generate(prompt_of(300))
    assert store.blocks and not store.retained
    one.forget()
    longer = prompt_of(500)
    assert longer[:288] == prompt_of(300)[:288]
    one.generate(longer, params={"kvern": {"retain_seconds": 60}})
    assert set(store.retained) == set(store.blocks) and set(store.retained.values()) == {60}
    assert_at_rest(one)


@pytest.mark.parametrize("seconds", [0, -1, 7 * 24 * 3600 + 1, "3600", 1.5, True, None])
def test_a_wish_to_retain_that_cannot_be_read_is_ignored(engine, store, seconds):
    one = engine()
    one.generate(prompt_of(300), params={"kvern": {"retain_seconds": seconds}})
    assert store.blocks and not store.retained
    assert_at_rest(one)


def test_a_request_that_asks_is_told_what_happened(engine):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    told = one.generate(prompt, params={"kvern": {}})
    assert one.finish_params[told.request_id] == {"kvern": {"hit_tokens": 480, "stored_tokens": 0}}
    silent = one.generate(prompt)
    assert one.finish_params[silent.request_id] is None


def test_requests_that_may_not_read_the_prefix_cache_do_not(engine):
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    assert computed(one, one.generate(prompt, skip_reading=True)) == 500
    assert_at_rest(one)


def test_consumers_do_not_store_and_producers_do_not_load(engine, store):
    prompt = prompt_of(500)
    consumer = engine(role="kv_consumer")
    consumer.generate(prompt)
    assert not store.chunks
    producer = engine(role="kv_producer")
    producer.generate(prompt)
    assert store.chunks
    producer.forget()
    assert computed(producer, producer.generate(prompt)) == 500
    assert computed(consumer, consumer.generate(prompt, skip_reading=False)) < 500
    for one in (consumer, producer):
        assert_at_rest(one)


# ---------------------------------------------------------------- reset, ranks, several connectors


def test_a_reset_leaves_the_namespace_and_keeps_what_others_share(engine, store):
    one, two = engine(), engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    assert computed(one, one.generate(prompt)) == 500
    one.forget()
    assert computed(one, one.generate(prompt)) == 20, "the new namespace works"
    assert computed(two, two.generate(prompt)) == 20
    assert_at_rest(one)


def test_nothing_of_a_request_that_ran_through_a_reset_is_stored(engine, store):
    one = engine()
    request = one.add(prompt_of(200), max_tokens=400)
    for _ in range(30):
        one.step()
    assert not one.scheduler.reset_prefix_cache(reset_connector=True)  # running requests hold blocks
    chunks = set(store.chunks)
    one.run(request)
    assert set(store.chunks) == chunks
    assert_at_rest(one)


def test_a_request_that_is_recomputed_after_a_reset_is_stored(engine, store):
    one = engine()
    request = one.add(prompt_of(500), max_tokens=60)
    for _ in range(30):
        one.step()
    chunks = set(store.chunks)
    assert one.preempt_all(reset_connector=True)
    one.run(request)
    assert len(set(store.chunks) - chunks) >= 2
    assert_at_rest(one)


@pytest.mark.parametrize("writers, readers", [(2, 2), (2, 1), (1, 2)])
def test_ranks_share_one_logical_key(engine, writers, readers):
    prompt = prompt_of(500)
    one = engine(ranks=writers)
    cold = one.generate(prompt)
    two = engine(ranks=readers)
    warm = two.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold) and computed(two, warm) == 20
    assert_at_rest(one)
    assert_at_rest(two)


def test_one_of_several_ranks_that_hold_the_same_heads_stores_them():
    from kvern.groups import Geometry

    geometry = Geometry((), 32, 8, tensor_parallel=4, pipeline_parallel=1, replicas=2)
    assert [geometry.writes(rank) for rank in range(4)] == [True, False, True, False]


def test_a_multi_connector_of_two(engine, store):
    child = {
        "kv_connector": "KvernConnector",
        "kv_connector_module_path": "kvern.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvern.address": "unix:///fake"},
    }
    other = {**child, "kv_connector_extra_config": {"kvern.address": "unix:///fake", "kvern.weights": "apart"}}
    one = engine(
        transfer=KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": [child, other]},
        )
    )
    prompt = prompt_of(500)
    cold = one.generate(prompt)
    one.forget()
    warm = one.generate(prompt)
    assert tokens_of(warm) == tokens_of(cold) and computed(one, warm) == 20
    one.settle()
    for child in one.connector._connectors:
        side = child._scheduler
        assert side._matcher.claims == 0 and not side._states and side._holds.blocks == 0 and side.all_errors == 0
    assert one.free_blocks == one.kv_cache_config.num_blocks - 1


def test_a_layout_that_a_worker_refuses_turns_the_store_off(engine, store):
    store.refuse_layout = "no such layout"
    one = engine()
    prompt = prompt_of(500)
    one.generate(prompt)
    one.forget()
    assert computed(one, one.generate(prompt)) == 500 and not store.chunks
    assert "no such layout" in side_of(one)._refused
    assert_at_rest(one)


def test_a_pool_without_references_turns_stores_off_and_leaves_loads(engine, store, monkeypatch):
    prompt = prompt_of(500)
    engine().generate(prompt)
    chunks = set(store.chunks)
    from vllm.v1.core.block_pool import BlockPool

    touch = BlockPool.touch
    monkeypatch.setattr(BlockPool, "touch", lambda self, block_lists: touch(self, block_lists))
    one = engine()
    assert computed(one, one.generate(prompt)) == 20
    one.generate(prompt_of(500, seed=9))
    assert set(store.chunks) == chunks
