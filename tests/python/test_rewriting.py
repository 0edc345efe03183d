"""Requests that name a compact cache and bring the whole prompt, in vLLM's real scheduler: its tokens give way to the
cache's slots, or it is computed as any other."""

import pytest
from test_compact_requests import assert_failed, decode_options, handle_of, run
from test_scheduler_side import assert_at_rest, computed, prompt_of, side_of, tokens_of
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request, RequestStatus

from kvern import compat, rewriting
from kvern.handles import Handle, HandleError

SUFFIX = [11, 12, 13]


@pytest.fixture
def one(engine):
    return engine(options={"kvern.rewrite": True})


def add_whole(engine, handle, prompt, **more):
    return engine.add(prompt, **{"params": {"kvern": {"handle": handle, "rewrite": True}}, **more})


def assert_served_whole(engine, request, prompt_tokens: int):
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED and len(tokens_of(request)) == 4
    assert request.num_prompt_tokens == prompt_tokens and not rewriting.is_rewritten(request)
    assert_at_rest(engine)


def test_it_runs_as_a_request_that_came_with_placeholders(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    request = add_whole(one, handle, prompt + SUFFIX, cache_salt="tenant")
    run(one, request)
    assert computed(one, request) == 3 and request.num_prompt_tokens == 103 and len(tokens_of(request)) == 4
    placeholders = request.prompt_token_ids[:100]
    one.forget()
    explicit = run(one, one.add(placeholders + SUFFIX, **decode_options(handle)))
    assert tokens_of(explicit) == tokens_of(request) and computed(one, explicit) == 3
    assert request.block_hashes == explicit.block_hashes
    assert_at_rest(one)


def test_requests_of_one_cache_share_vllms_blocks_and_the_clients_prompt_is_left_alone(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    brought = prompt + SUFFIX
    request = Request(
        "own", brought, SamplingParams(max_tokens=4, ignore_eos=True, extra_args={
            "kv_transfer_params": {"kvern": {"handle": handle, "rewrite": True}}}), None, block_hasher=one.hasher,
    )  # fmt: skip
    one.scheduler.add_request(request)
    run(one, request)
    assert brought == prompt + SUFFIX and computed(one, request) == 3
    again = run(one, add_whole(one, handle, prompt + prompt_of(60, seed=4)))
    assert computed(one, again) == 60, "96 of the slots are in vLLM's own prefix cache"
    assert_at_rest(one)


def test_the_prompt_without_the_wish_is_computed_from_its_own_blocks(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    run(one, add_whole(one, handle, prompt + SUFFIX))
    plain = run(one, one.add(prompt + SUFFIX))
    assert plain.num_prompt_tokens == 503 and computed(one, plain) == 503 - 480


def test_preemption_reloads(engine):
    one = engine(blocks=16, options={"kvern.rewrite": True})
    prompt = prompt_of(300)
    handle = handle_of(one, prompt)
    ordinary = one.add(prompt_of(200, seed=2), 150)
    request = add_whole(one, handle, prompt + SUFFIX, max_tokens=150)
    one.run(ordinary, request)
    one.settle()
    assert ordinary.num_preemptions + request.num_preemptions > 0
    assert request.status == ordinary.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert_at_rest(one)


@pytest.mark.parametrize(
    "prompt",
    [prompt_of(500), prompt_of(500)[:-1] + [1, 2, 3], prompt_of(99), prompt_of(510, seed=8)],
    ids=["nothing behind it", "another last token", "too short", "another"],
)
def test_a_prompt_that_is_not_the_caches_is_computed(one, prompt):
    handle = handle_of(one, prompt_of(500))
    assert_served_whole(one, run(one, add_whole(one, handle, prompt)), len(prompt))


@pytest.mark.parametrize(
    "params",
    [
        lambda handle: {"handle": handle[:-1], "rewrite": True},
        lambda handle: {"handle": 7, "rewrite": True},
        lambda handle: {"handle": handle[:-1] + ("0" if handle[-1] != "0" else "1"), "rewrite": True},
        lambda handle: {"handle": handle, "rewrite": True, "compact": "streaming(slots=5)"},
        lambda handle: {"rewrite": True},
    ],
    ids=["malformed", "number", "other prompt's", "both", "no handle"],
)
def test_a_wish_that_is_not_as_it_must_be_is_passed_over(one, params):
    prompt = prompt_of(500)
    wish = {"kvern": params(handle_of(one, prompt))}
    assert_served_whole(one, run(one, one.add(prompt + SUFFIX, params=wish)), 503)


def test_what_other_connectors_or_vllm_look_for_in_the_prompt_is_left_there(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    for_others = {"kvern": {"handle": handle, "rewrite": True}, "do_remote_decode": True}
    assert_served_whole(one, run(one, one.add(prompt + SUFFIX, params=for_others)), 503)

    def admitted(**sampling) -> Request:
        extra = {"kv_transfer_params": {"kvern": {"handle": handle, "rewrite": True}}}
        request = Request("own", prompt + SUFFIX, SamplingParams(max_tokens=4, extra_args=extra, **sampling), None)
        side_of(one).on_new_request(request)
        return request

    grammar = StructuredOutputsParams(json={"type": "object"})
    assert not rewriting.is_rewritten(admitted(structured_outputs=grammar))
    side_of(one)._states.clear()
    assert rewriting.is_rewritten(admitted())
    side_of(one)._states.clear()


def test_prompt_logprobs_and_expired_handles_are_computed(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt, ttl_seconds=60)
    assert_served_whole(one, run(one, add_whole(one, handle, prompt + SUFFIX, prompt_logprobs=1)), 503)
    side_of(one)._decoding._wall_clock = lambda: int(handle.split(".")[3])
    assert_served_whole(one, run(one, add_whole(one, handle, prompt + SUFFIX)), 503)


def test_a_salt_that_is_the_handle_says_that_there_are_placeholders(one):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    assert_failed(one, run(one, add_whole(one, handle, prompt + SUFFIX, cache_salt=handle)))


def test_a_cache_that_is_gone_fails_since_the_prompt_is_too(one, store):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    store.blocks.clear()
    assert_failed(one, run(one, add_whole(one, handle, prompt + SUFFIX)))


def test_without_the_daemon_the_prompt_is_computed(one, store):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    store.state = "connecting"
    request = add_whole(one, handle, prompt + SUFFIX)
    store.state = "ready"
    assert_served_whole(one, run(one, request), 503)


def test_an_engine_that_does_not_load_computes_the_prompt(engine):
    one = engine(role="kv_producer", options={"kvern.rewrite": True})
    prompt = prompt_of(500)
    assert_served_whole(one, run(one, add_whole(one, handle_of(one, prompt), prompt + SUFFIX)), 503)


def test_an_engine_that_was_not_told_to_computes_the_prompt(engine):
    one = engine()
    prompt = prompt_of(500)
    assert_served_whole(one, run(one, add_whole(one, handle_of(one, prompt), prompt + SUFFIX)), 503)


@pytest.mark.parametrize("why", ["version", "self-test", "raises"])
def test_where_requests_are_different_the_prompt_is_computed(one, monkeypatch, why):
    rewriting.obstacle.cache_clear()
    if why == "version":
        monkeypatch.setattr(compat, "VLLM_VERSION", "0.99.1")
    else:
        init = Request.__init__

        def other_init(self, *args, **kwargs):
            init(self, *args, **kwargs)
            if why == "raises":
                self._all_token_ids = tuple(self._all_token_ids)
            else:
                self.first_token = self.prompt_token_ids[0]

        monkeypatch.setattr(Request, "__init__", other_init)
    assert {"version": "0.99.1", "self-test": "first_token", "raises": "TypeError"}[why] in rewriting.obstacle()
    monkeypatch.undo()
    prompt = prompt_of(500)
    assert_served_whole(one, run(one, add_whole(one, handle_of(one, prompt), prompt + SUFFIX)), 503)
    rewriting.obstacle.cache_clear()
    assert rewriting.obstacle() == ""


def test_a_request_that_breaks_half_way_fails(one, monkeypatch):
    prompt = prompt_of(500)
    handle = handle_of(one, prompt)
    whole = Request.update_block_hashes

    def breaks(self):
        if self.num_prompt_tokens == 103:
            raise RuntimeError("broken")
        whole(self)

    monkeypatch.setattr(Request, "update_block_hashes", breaks)
    request = add_whole(one, handle, prompt + SUFFIX)
    monkeypatch.undo()
    run(one, request)
    assert side_of(one).errors == 1
    side_of(one).errors = 0
    assert_failed(one, request)


def test_placeholders_are_the_prompts_own_tokens_for_those_who_count_them():
    sampling = SamplingParams(max_tokens=1, repetition_penalty=1.2)
    few, many = [1, 2, 3] * 20, list(range(60))

    def rewritten(prompt, slots):
        request = Request("r", prompt + SUFFIX, sampling, None)
        rewriting.rewrite(request, Handle.make(prompt, slots, 1))
        return request.prompt_token_ids

    assert rewritten(few, 10) == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, *SUFFIX]
    assert set(rewritten(many, 60)) == set(many) | set(SUFFIX)
    with pytest.raises(HandleError, match="repetition_penalty"):
        rewritten(many, 59)
