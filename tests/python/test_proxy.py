"""The proxy over two servers that play vLLM's HTTP side. Most tests ask a server directly and through the proxy, and want
the same answer."""

import asyncio
import contextlib
import functools
import inspect
import json
import random

import aiohttp
import openai
import pytest
from aiohttp import web

from fake_vllm import EMOJI, PARAGRAPH, Caches, FakeVllm, decode, encode
from kvern import proxy_request
from kvern.config import OptionError
from kvern.proxy import Proxy
from kvern.proxy_answer import StopText
from kvern.proxy_caches import Caches as ProxyCaches
from kvern.proxy_settings import Settings, read

PADDING = "All of this is only here to make the prompt long. " * 4


def prompt_for(script: str) -> str:
    return f"{PADDING}«{script}»"


class Setup:
    """Two servers, the proxy before them, and a client's session."""

    def __init__(self):
        self.caches = Caches()
        self.prefill = FakeVllm(self.caches)
        self.decode = FakeVllm(self.caches)

    @contextlib.asynccontextmanager
    async def running(self, **settings):
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(_served(one.application())) for one in (self.prefill, self.decode)]
            values = {"prefill": urls[0], "decode": urls[1], "min_prompt_tokens": 64, "ready_timeout_seconds": 5, **settings}
            self.proxy = Proxy(Settings.from_values(values), ProxyCaches(self.caches, appear_seconds=1))
            self.direct = urls[1]
            self.url = await stack.enter_async_context(_served(self.proxy.application()))
            self.session = await stack.enter_async_context(aiohttp.ClientSession())
            yield self

    async def post(self, path: str, body: dict, url: str | None = None, **options):
        async with self.session.post((url or self.url) + path, json=body, **options) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: dict, url: str | None = None) -> list[dict]:
        async with self.session.post((url or self.url) + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def paths(self) -> dict[str, float]:
        """How requests were answered so far."""
        samples = {}
        for line in _metrics(self.proxy).splitlines():
            if line.startswith("kvern_proxy_requests_total"):
                samples[line.split('"')[1]] = float(line.split()[-1])
        return samples


def _metrics(proxy: Proxy) -> str:
    from prometheus_client import generate_latest

    return generate_latest(proxy.metrics.registry).decode()


@contextlib.asynccontextmanager
async def _served(application: web.Application):
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def asynchronous(test):
    """Runs a test that takes a Setup in an event loop of its own."""
    @functools.wraps(test)
    def run(**parameters):
        asyncio.run(asyncio.wait_for(test(Setup(), **parameters), 60))

    parameters = [one for name, one in inspect.signature(test).parameters.items() if name != "setup"]
    run.__signature__ = inspect.Signature(parameters)
    return run


def plain(answer: dict) -> dict:
    """An answer without what differs between any two."""
    return {name: value for name, value in answer.items() if name not in ("id", "created", "kv_transfer_params")}


def added_up(events: list[dict]) -> tuple[dict, dict]:
    """What the events of a stream say of each choice together, and the usage."""
    choices = {}
    for event in events:
        for choice in event["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ids": [], "first": []})
            whole["text"] += choice["text"]
            whole["finish"] = (choice["finish_reason"], choice.get("stop_reason"))
            whole["ids"] += choice.get("token_ids") or []
            whole["first"] += choice.get("prompt_token_ids") or []
            whole["usage"] = event["usage"]
            if choice.get("logprobs"):
                told = choice["logprobs"]
                whole["logprobs"] += list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], told["text_offset"]))
    return choices, events[-1]["usage"]


async def wait_for(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


COMPLETIONS = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 5},
    {"max_tokens": 400, "min_tokens": 3},
    {"logprobs": 2},
    {"logprobs": 0, "max_tokens": 3},
    {"return_token_ids": True},
    {"stop": "swer"},
    {"stop": ["The answer"], "max_tokens": 50},
    {"stop": ["he a"], "include_stop_str_in_output": True, "max_tokens": 50},
    {"stop": "T"},
    {"n": 3, "max_tokens": 9},
    {"stop": ["zzz", "answer is 42"], "max_tokens": 100},
    {"ignore_eos": True, "max_tokens": 60},
    {"seed": 7, "temperature": 0.5, "user": "somebody", "repetition_penalty": 1.0},
]


@pytest.mark.parametrize("extra", COMPLETIONS, ids=str)
@asynchronous
async def test_a_completion_is_what_the_server_alone_would_say(setup, extra):
    body = {"model": "model", "prompt": prompt_for("The answer is 42. Surely."), **extra}
    async with setup.running():
        status, direct = await setup.post("/v1/completions", body, setup.direct)
        ours_status, ours = await setup.post("/v1/completions", body)
        assert (ours_status, plain(ours)) == (status, plain(direct))
        assert setup.paths().keys() <= {"compact", "full"}, setup.paths()


@pytest.mark.parametrize("extra", COMPLETIONS, ids=str)
@asynchronous
async def test_a_streamed_completion_adds_up_to_the_same(setup, extra):
    body = {"model": "model", "prompt": encode(prompt_for("The answer is 42. Surely.")), **extra}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}

    async with setup.running():
        direct = added_up(await setup.events("/v1/completions", body, setup.direct))
        assert added_up(await setup.events("/v1/completions", body)) == direct


STOPS = [
    (["answer"], {"max_tokens": 60}),
    (["answer"], {"max_tokens": 60, "include_stop_str_in_output": True}),
    (["The a"], {}),  # begun by the first token
    (["The a"], {"include_stop_str_in_output": True}),
    (["The b", "he answer"], {}),  # begun, and another comes of it
    (["Thx", "42"], {"max_tokens": 60}),
    (["he", "The"], {}),  # two that end together
    (["The", "he"], {}),
    (["Th", "h"], {"n": 2}),
    (["The answer is none"], {"max_tokens": 60}),
    (["The answer"], {"max_tokens": 6}),
    (["\n\n", "."], {"max_tokens": 60}),  # both in one token
    (["42.\n", "."], {"max_tokens": 60}),
]


@pytest.mark.parametrize("merged", [1, 7])
@pytest.mark.parametrize("stop, extra", STOPS, ids=str)
@asynchronous
async def test_nothing_is_told_or_counted_behind_a_stop_string(setup, stop, extra, merged):
    prompt = encode(prompt_for("The answer is 42.\n\nSurely."))
    body = {"prompt": prompt, "stop": stop, "logprobs": 1, "return_token_ids": True, "seed": 3, **extra}
    setup.prefill.merged = setup.decode.merged = merged
    async with setup.running():
        direct = await setup.post("/v1/completions", body, setup.direct)
        ours = await setup.post("/v1/completions", body)
        assert (ours[0], plain(ours[1])) == (direct[0], plain(direct[1]))
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        direct = added_up(await setup.events("/v1/completions", body, setup.direct))
        assert added_up(await setup.events("/v1/completions", body)) == direct
        assert setup.paths().keys() <= {"compact", "full"}


@asynchronous
async def test_another_stop_string_may_end_before_the_one_that_the_server_found(setup):
    async with setup.running():
        for script, stop in ((f"a{PARAGRAPH}", ["\n\n", "a."]), ("abc", ["bc", "ab"])):
            body = {"prompt": prompt_for(script + "more"), "stop": stop}
            _, direct = await setup.post("/v1/completions", body, setup.direct)
            _, ours = await setup.post("/v1/completions", body)
            assert ours["choices"] == direct["choices"]
            assert ours["choices"][0]["stop_reason"] == stop[1]


@asynchronous
async def test_tokens_that_begin_a_stop_string_come_from_the_prefill_server_with_seeds_of_their_own(setup):
    async with setup.running():
        body = {"prompt": prompt_for("The answer"), "stop": ["Thing"], "seed": 3, "max_tokens": 9, "cache_salt": "mine"}
        _, answer = await setup.post("/v1/completions", body)
        assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("The answe", 9)
        asked = [*setup.prefill.seen, *setup.decode.seen]
        assert [one["max_tokens"] for one in asked] == [1, 1, 1, 6]
        assert [decode(one["prompt"])[-3:] for one in asked] == ["er»", "r»T", "»Th", "The"]
        assert [one.get("cache_salt") for one in asked[:3]] == ["mine"] * 3
        assert len({one["seed"] for one in asked}) == 4
        assert setup.paths() == {"compact": 1}


@asynchronous
async def test_what_goes_on_like_a_stop_string_for_long_comes_from_one_server(setup):
    body = {"prompt": prompt_for("-" * 40 + "!"), "stop": ["-" * 60], "max_tokens": 50}
    async with setup.running():
        _, answer = await setup.post("/v1/completions", body)
        assert answer["choices"][0]["text"] == "-" * 40 + "!"
        assert setup.paths() == {"ordinary": 1}
        assert len(setup.prefill.seen) == 16
        await wait_for(lambda: len(setup.caches.deleted) == 1)


CHATS = [
    {},
    {"max_completion_tokens": 4},
    {"logprobs": True, "top_logprobs": 2},
    {"n": 2},
    {"stop": "answer"},
    {"response_format": {"type": "text"}, "tool_choice": "none"},
]


@pytest.mark.parametrize("extra", CHATS, ids=str)
@asynchronous
async def test_a_chat_by_an_ordinary_client_is_what_the_server_alone_would_say(setup, extra):
    messages = [{"role": "system", "content": PADDING}, {"role": "user", "content": [{"type": "text", "text": "«The answer is 42.»"}]}]
    async with setup.running():
        answers = []
        for url in (setup.direct, setup.url):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as client:
                whole = await client.chat.completions.create(model="model", messages=messages, **extra)
                stream = await client.chat.completions.create(
                    model="model", messages=messages, stream=True, stream_options={"include_usage": True}, **extra
                )
                texts, usage, finish = {}, None, {}
                async for chunk in stream:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                        finish[choice.index] = choice.finish_reason
                answers.append((plain(whole.model_dump()), texts, usage.model_dump(), finish))
        assert answers[0] == answers[1]
        assert setup.paths() == {"compact": 2}
        assert {one["headers"]["Authorization"] for one in setup.prefill.seen + setup.decode.seen} == {"Bearer secret"}


@asynchronous
async def test_the_decode_server_sees_slots_and_the_first_token_alone(setup):
    prompt = encode(prompt_for("hello"))
    async with setup.running(compact="cake(budget=25%) | int4", ttl_seconds=99):
        _, answer = await setup.post("/v1/completions", {"model": "model", "prompt": prompt, "cache_salt": "mine", "seed": 3})
        (made,) = setup.prefill.seen
        assert (made["max_tokens"], made["cache_salt"], made["seed"]) == (1, "mine", 3)
        assert made["kv_transfer_params"] == {"kvern": {"compact": "cake(budget=25%) | int4", "ttl_seconds": 99}}
        (rest,) = setup.decode.seen
        handle = rest["kv_transfer_params"]["kvern"]["handle"]
        slots = int(handle.split(".")[2])
        assert len(rest["prompt"]) == slots + 1 < len(prompt)
        assert rest["prompt"][-1] == ord("h")
        assert (rest["cache_salt"], rest["max_tokens"]) == (handle, 15)
        assert rest["seed"] != 3
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["kv_transfer_params"]["kvern"]["compact"] == {
            "state": "ready", "prompt_tokens": len(prompt), "slots": slots, "method": "cake | int8"
        }
        await wait_for(lambda: setup.caches.deleted == [handle])


@asynchronous
async def test_one_server_can_do_both(setup):
    async with setup.running():
        await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
    single = Setup()
    single.decode = single.prefill
    async with single.running():
        _, answer = await single.post("/v1/completions", {"prompt": prompt_for("hello")})
        assert answer["choices"][0]["text"] == "hello"
        assert single.paths() == {"compact": 1}


@asynchronous
async def test_short_prompts_and_clients_who_want_it_are_served_as_they_are(setup):
    async with setup.running(on_failure="error"):
        for body in ({"prompt": "«short»"}, {"prompt": prompt_for("long"), "kv_transfer_params": {"kvern": {"compact": False}}}):
            status, answer = await setup.post("/v1/completions", body)
            assert status == 200 and answer["choices"][0]["text"] in ("short", "long")
        assert setup.paths() == {"ordinary": 2}
        assert setup.prefill.seen == []
        assert setup.decode.seen[-1]["kv_transfer_params"] == {"kvern": {}}


@asynchronous
async def test_what_is_served_in_full_makes_no_compact_cache(setup):
    wish = {"compact": "snapkv(budget=50%)", "ttl_seconds": 60, "task": "localisation", "store": False}
    async with setup.running():
        for body in ({"prompt": "«short»"}, {"prompt": prompt_for("long"), "echo": True}):
            await setup.post("/v1/completions", {**body, "kv_transfer_params": {"kvern": wish}})
            assert setup.decode.seen[-1]["kv_transfer_params"] == {"kvern": {"store": False}}


OBSTACLES = [
    {"echo": True},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5},
    {"response_format": {"type": "json_object"}},
    {"prompt_logprobs": 1},
    {"bad_words": ["bad"]},
    {"something_new": 1},
    {"prompt": [prompt_for("one"), prompt_for("two")]},
    {"max_tokens": 100_000},
    {"kv_transfer_params": {"do_remote_decode": True}},
    {"n": 0},
    {"stop": [3]},
    {"logprobs": "many"},
    {"min_tokens": 1, "stop": "T"},
    {"min_tokens": 17},
    {"stop": ""},
    {"stop": ["a", ""]},
    {"model": [], "prompt": encode(prompt_for("hello"))},
    {"stream": True, "stream_options": "x"},
    {"stream": True, "stream_options": {"include_usage": "x"}},
    {"stream_options": {"include_usage": True}},
    {"stream": "x"},
    {"chat_template_kwargs": "x"},
    {"cache_salt": ""},
    {"return_token_ids": "x"},
    {"include_stop_str_in_output": "x"},
]


@pytest.mark.parametrize("extra", OBSTACLES, ids=str)
@asynchronous
async def test_what_cannot_be_cut_in_two_goes_to_the_server_untouched_or_is_refused(setup, extra):
    body = {"model": "model", "prompt": prompt_for("hello"), **extra}
    setup.decode.failure = (200, {"answered": "by the server itself"})
    async with setup.running():
        assert await setup.post("/v1/completions", body) == (200, {"answered": "by the server itself"})
        (seen,) = setup.decode.seen
        assert {name: value for name, value in seen.items() if name not in ("path", "headers")} == body
    refusing = Setup()
    async with refusing.running(on_failure="error"):
        status, answer = await refusing.post("/v1/completions", body)
        assert status == 400 and "no compact cache" in answer["error"]["message"]
        assert refusing.decode.seen == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("trouble", ["refused", "failed", "late", "never", "lost", "daemon"])
@asynchronous
async def test_without_a_compact_cache_the_answer_comes_in_full_or_not_at_all(setup, trouble, stream):
    def cause(setup):
        if trouble == "refused":
            setup.prefill.refusal = "the model slides"
        elif trouble == "failed":
            setup.caches.state, setup.caches.reason = "failed", "a chunk went missing"
        elif trouble == "late":
            setup.caches.state = "pending"
        elif trouble == "never":
            setup.caches.unknown = 1_000_000
        elif trouble == "lost":
            setup.caches.make = lambda prompt, slots: f"kvc1.{len(prompt)}.{slots}.1.{0:064x}"
        else:
            setup.caches.compaction = lambda *_: (_ for _ in ()).throw(RuntimeError("no session"))

    body = {"model": "model", "prompt": prompt_for("The answer is 42.")}
    cause(setup)
    async with setup.running(ready_timeout_seconds=0.05):
        if stream:
            events = await setup.events("/v1/completions", body)
            assert "".join(event["choices"][0]["text"] for event in events) == "The answer is 42"
        else:
            _, answer = await setup.post("/v1/completions", body)
            assert answer["choices"][0]["text"] == "The answer is 42"
            assert "kv_transfer_params" not in answer
        assert setup.paths() == {"full": 1}
        assert setup.decode.seen[-1]["prompt"] == encode(body["prompt"] + "T")
    refusing = Setup()
    cause(refusing)
    async with refusing.running(ready_timeout_seconds=0.05, on_failure="error"):
        if stream and trouble != "refused":
            events = await refusing.events("/v1/completions", body)
            assert [event["choices"][0]["text"] for event in events[:-1]] == ["T"]
            answer = events[-1]
        else:
            status, answer = await refusing.post("/v1/completions", body)
            assert status == 503
        assert "no compact cache" in answer["error"]["message"]


@pytest.mark.parametrize("where", ["prefill", "decode"])
@asynchronous
async def test_errors_of_the_servers_reach_the_client_as_they_came(setup, where):
    payload = {"error": {"message": "slow down", "type": "RateLimit", "param": None, "code": 429}}
    getattr(setup, where).failure = (429, payload)
    async with setup.running():
        assert await setup.post("/v1/completions", {"prompt": prompt_for("hello")}) == (429, payload)


@pytest.mark.parametrize("where", ["prefill", "decode"])
@asynchronous
async def test_headers_of_an_error_reach_the_client_with_a_body_in_openais_form(setup, where):
    server = getattr(setup, where)
    server.failure = (429, {"detail": "slow down"})
    server.failure_headers = {"Retry-After": "7"}
    async with setup.running():
        async with setup.session.post(setup.url + "/v1/completions", json={"prompt": prompt_for("hello")}) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "7")
            assert (await response.json())["error"]["message"] == "slow down"


@asynchronous
async def test_an_error_in_the_middle_ends_the_answer(setup):
    setup.decode.break_after = 2
    async with setup.running():
        events = await setup.events("/v1/completions", {"prompt": prompt_for("hello")})
        assert [event["choices"][0]["text"] for event in events[:-1]] == ["h", "e", "l"]
        assert events[-1]["error"]["message"] == "the engine died"
        status, answer = await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
        assert (status, answer["error"]["message"]) == (500, "the engine died")


ODD_ERRORS = [
    ({"error": "Unauthorized"}, "Unauthorized"),
    ({"error": None, "message": "no such tenant"}, "no such tenant"),
    ({"error": None}, '{"error": null}'),
    ({"detail": "Not Found"}, "Not Found"),
    (["down"], '["down"]'),
]


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("payload, message", ODD_ERRORS, ids=str)
@asynchronous
async def test_errors_of_another_form_are_put_into_openais(setup, payload, message, where):
    getattr(setup, where).failure = (401, payload)
    async with setup.running():
        status, answer = await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
        assert (status, answer["error"]["message"], answer["error"]["code"]) == (401, message, 401)


@pytest.mark.parametrize(
    "event, status, message",
    [
        (b'{"error": "The model is currently scaling."}', 500, "The model is currently scaling."),
        (b'{"error": null}', 500, '{"error": null}'),
        (b'{"error": {"message": "no", "code": "odd"}}', 500, "no"),
        (b'{"error": {"message": "no", "code": 503}}', 503, "no"),
        (b"nonsense", 502, "something else than a JSON object"),
        (b"[]", 502, "something else than a JSON object"),
        (b'{"choices": ["x"]}', 500, "kvern proxy failed"),
    ],
)
@asynchronous
async def test_whatever_comes_in_the_middle_a_stream_ends_with_an_error_that_can_be_read(setup, event, status, message):
    setup.decode.break_after, setup.decode.break_with = 2, event
    body = {"prompt": prompt_for("hello")}
    async with setup.running():
        events = await setup.events("/v1/completions", body)
        assert [one["choices"][0]["text"] for one in events[:-1]] == ["h", "e", "l"]
        assert message in events[-1]["error"]["message"]
        got, answer = await setup.post("/v1/completions", body)
        assert got == status and message in answer["error"]["message"]


@asynchronous
async def test_a_failure_of_the_proxy_itself_is_an_error_that_can_be_read(setup, caplog):
    setup.prefill.failure = (200, {"choices": []})
    async with setup.running():
        status, answer = await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
        assert (status, answer["error"]["code"]) == (500, 500)
    assert "POST /v1/completions failed" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_an_answer_that_the_prefill_server_aborts_is_empty(setup, stream):
    setup.prefill.aborts = True
    body = {"prompt": prompt_for("hello"), "return_token_ids": True}
    async with setup.running():
        if stream:
            (answer,) = await setup.events("/v1/completions", body)
        else:
            _, answer = await setup.post("/v1/completions", body)
            assert answer["usage"]["completion_tokens"] == 0
        (choice,) = answer["choices"]
        assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", [], "abort")
        assert setup.decode.seen == []


@asynchronous
async def test_idle_connections_are_given_up_before_uvicorn_closes_them(setup):
    async with setup.running():
        assert setup.proxy.prefill._session.connector._keepalive_timeout < 5


@asynchronous
async def test_a_server_that_is_away_is_named(setup):
    async with setup.running(prefill="http://127.0.0.1:9"):
        status, answer = await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
        assert status == 502 and "127.0.0.1:9" in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
@asynchronous
async def test_what_is_no_request_is_refused(setup, body):
    async with setup.running():
        async with setup.session.post(f"{setup.url}/v1/completions", data=body) as response:
            assert response.status == 400 and "error" in await response.json()
        async with setup.session.get(f"{setup.url}/v1/nothing") as response:
            assert response.status == 404 and "error" in await response.json()


@asynchronous
async def test_a_client_that_hangs_up_ends_the_decode_and_the_cache(setup):
    setup.decode.stall = True
    async with setup.running():
        body = {"prompt": prompt_for("hello"), "stream": True}
        async with setup.session.post(f"{setup.url}/v1/completions", json=body) as response:
            await response.content.readline()
            await wait_for(lambda: setup.decode.seen)
        await wait_for(lambda: setup.decode.aborted == 1)
        await wait_for(lambda: len(setup.caches.deleted) == 1)


@asynchronous
async def test_a_client_that_leaves_before_the_daemon_has_heard_of_the_cache_leaves_none(setup):
    setup.caches.unknown = 2
    async with setup.running():
        _, answer = await setup.post("/v1/completions", {"prompt": prompt_for("hello"), "max_tokens": 1})
        assert answer["choices"][0]["text"] == "h"
        await wait_for(lambda: len(setup.caches.deleted) == 1)


@asynchronous
async def test_an_answer_that_begins_with_half_a_character_comes_from_one_server(setup):
    async with setup.running():
        for body in ({"prompt": prompt_for(EMOJI + " yes")}, {"prompt": prompt_for(EMOJI), "max_tokens": 2}):
            status, answer = await setup.post("/v1/completions", body)
            assert status == 200 and answer["choices"][0]["text"] in (EMOJI + " yes", EMOJI)
        assert setup.paths() == {"ordinary": 2}
        await wait_for(lambda: len(setup.caches.deleted) == 2)
    refusing = Setup()
    async with refusing.running(on_failure="error"):
        # The next attempt would begin the same way: not a 503, which clients try again.
        status, answer = await refusing.post("/v1/completions", {"prompt": prompt_for(EMOJI)})
        assert status == 400 and "within a character" in answer["error"]["message"]


@asynchronous
async def test_a_repetition_penalty_sees_every_word_of_the_prompt(setup):
    many = "".join(chr(0x4E00 + i) for i in range(200))
    async with setup.running():
        few = {"prompt": prompt_for("hello") * 3, "repetition_penalty": 1.3}
        await setup.post("/v1/completions", few)
        assert set(setup.decode.seen[0]["prompt"]) == set(encode(few["prompt"]))
        await setup.post("/v1/completions", {"prompt": many + prompt_for("hello"), "repetition_penalty": 1.3})
        assert setup.paths() == {"compact": 1, "full": 1}


@asynchronous
async def test_windowkv_is_told_the_kind_of_task(setup):
    async with setup.running(compact="windowkv(budget=25%)"):
        for question in ("What is the phone number of the hotel?", "Summarise the text."):
            await setup.post("/v1/completions", {"prompt": prompt_for("x") + question + "«x»"})
    tasks = [one["kv_transfer_params"]["kvern"]["task"] for one in setup.prefill.seen]
    assert tasks == ["localisation", "aggregation"]


@asynchronous
async def test_health_models_and_metrics(setup):
    async with setup.running():
        async with setup.session.get(f"{setup.url}/health") as response:
            assert response.status == 200
        setup.prefill.healthy = False
        async with setup.session.get(f"{setup.url}/health") as response:
            assert response.status == 503 and "not healthy" in await response.text()
        async with openai.AsyncOpenAI(base_url=f"{setup.url}/v1", api_key="k") as client:
            assert [model.id async for model in client.models.list()] == ["model"]
        await setup.post("/v1/completions", {"prompt": prompt_for("hello")})
        async with setup.session.get(f"{setup.url}/metrics") as response:
            text = await response.text()
        assert 'kvern_proxy_requests_total{path="compact"} 1.0' in text
        assert f"kvern_proxy_prompt_tokens_total {float(len(prompt_for('hello')))}" in text


def test_the_stop_string_that_is_complete_first_ends_the_text():
    source = random.Random(1)

    def some(most: int) -> str:
        return "".join(source.choice("ab") for _ in range(source.randrange(1, most)))

    for _ in range(5_000):
        tokens = [some(4) for _ in range(source.randrange(1, 6))]
        stops, included = [some(5) for _ in range(source.randrange(1, 4))], source.random() < 0.5
        guard, text, stop = StopText(stops, included), "", None
        for token in tokens:
            text, stop = text + token, guard.feed(token)
            if stop is not None:
                break
            assert guard.has_begun == any(text.endswith(one[:n]) for one in stops for n in range(1, len(one)))
        ends = [(text.find(one) + len(one), stops.index(one), one) for one in stops if one in text]
        assert (stop is None) == (not ends)
        if ends:
            end, _, first = min(ends)
            assert stop == first and guard.text == text[: end if included else end - len(stop)]
        else:
            assert guard.text == text


def test_placeholders_are_the_last_of_each_word():
    assert proxy_request.placeholders([1, 2, 1, 3, 2, 4], 4) == [1, 3, 2, 4]
    assert proxy_request.placeholders([1, 2, 1, 3, 2, 4], 2) == [2, 4]
    assert proxy_request.placeholders([1, 1, 1, 1], 3) == [1, 1, 1]
    assert proxy_request.placeholders([5, 6, 5, 6], 4) == [5, 6, 5, 6]


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "prefill is not set"),
        ({"prefill": "host:8000"}, "must be the address of a vLLM server"),
        ({"prefill": "http://a/v1"}, "must be the address of a vLLM server"),
        ({"prefill": "http://a", "listen": "8100"}, "address:port"),
        ({"prefill": "http://a", "on_failure": "panic"}, "fallback, error"),
        ({"prefill": "http://a", "min_prompt_tokens": "few"}, "whole number"),
        ({"prefill": "http://a", "ready_timeout_seconds": -1}, "number from"),
        ({"prefill": "http://a", "compact": "$(rm)"}, "compact chain"),
        ({"prefill": "http://a", "daemon": "tcp://d:1"}, "server_key_file"),
        ({"prefill": "http://a", "dekode": "http://b"}, "unknown: dekode"),
        ({"prefill": "http://a:1", "ttl_seconds": 604_801}, "604800"),
    ],
)
def test_settings_that_cannot_be_used_are_named(values, message):
    with pytest.raises(OptionError, match=message):
        Settings.from_values(values)


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "proxy.toml"
    file.write_text('prefill = "http://a:1"\nmin_prompt_tokens = 500\nttl_seconds = 60\n')
    settings = read(["--config", str(file), "--ttl-seconds", "70", "--insecure"], "")
    assert (settings.prefill, settings.decode, settings.min_prompt_tokens, settings.ttl_seconds) == ("http://a:1", "http://a:1", 500, 70)
    assert settings.insecure
    file.write_text("prefill = 3 = 4")
    with pytest.raises(OptionError, match="proxy.toml"):
        read(["--config", str(file)], "")
