"""`kvern proxy` over real vLLM servers, with an ordinary OpenAI client."""

import os
import subprocess
import sys
import time

import openai
import pytest
import requests

from engine import BUILD, Process, Server, free_port, kvern_transfer, tail
from models import smollm2
from prompts import prose

EVERYTHING = "snapkv(budget=100%)"
QUARTER = "snapkv(budget=25%) | int8"
READY_SECONDS = 30


class ProxyProcess(Process):
    def __init__(self, folder, **settings):
        super().__init__("proxy", folder)
        self.url = f"http://127.0.0.1:{free_port()}"
        arguments = {"listen": self.url.removeprefix("http://"), "min_prompt_tokens": 300, "ready_timeout_seconds": 120, **settings}
        flags = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        program = "from kvern.programs import kvern; kvern()"
        environment = {**os.environ, "PYTHONPATH": str(BUILD / "python")}
        self.spawn([sys.executable, "-c", program, "proxy", *flags], stdin=subprocess.DEVNULL, env=environment)

    def wait_started(self) -> "ProxyProcess":
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert self.alive, f"the proxy ended with {self.child.returncode}\n{tail(self.log)}"
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return self
            except requests.ConnectionError:
                pass
            assert time.monotonic() < deadline, f"the proxy is not ready\n{tail(self.log)}"
            time.sleep(0.1)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def paths(self) -> dict[str, int]:
        """How requests were answered so far."""
        lines = requests.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        told = [line for line in lines if line.startswith("kvern_proxy_requests_total")]
        return {line.split('"')[1]: int(float(line.split()[-1])) for line in told}

    def stop(self) -> None:
        if self.alive:
            self.child.terminate()
            assert self.child.wait(30) == 0, tail(self.log)


def serve(stage, **options) -> Server:
    transfer = kvern_transfer(stage.daemon.address, policy="fail")
    stage.engines.append(Server(smollm2(), stage.folder, transfer=transfer, **options))
    return stage.engines[-1]


@pytest.fixture(scope="module")
def server(stage):
    stage.start_daemon()
    return serve(stage).wait_started()


@pytest.fixture(scope="module")
def proxy(stage, server):
    running = ProxyProcess(stage.folder, prefill=server.url, daemon=stage.daemon.address, compact=QUARTER)
    yield running.wait_started()
    running.stop()


def ask(client, prompt, compact=None, **options):
    options.setdefault("extra_body", {"kv_transfer_params": {"kvern": {"compact": compact}}} if compact is not None else {})
    return client.completions.create(model="model", prompt=prompt, temperature=0, max_tokens=24, **options)


def stream(client, prompt, **options) -> tuple[str, openai.types.CompletionUsage]:
    text, usage = "", None
    for event in ask(client, prompt, stream=True, stream_options={"include_usage": True}, **options):
        text += "".join(choice.text for choice in event.choices)
        usage = event.usage or usage
    return text, usage


def no_handles_left(stage) -> bool:
    deadline = time.monotonic() + 30
    while "kvc1." in stage.daemon.ctl("compact", "ls"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_cache_that_keeps_everything_gives_the_servers_own_answer(stage, server, proxy):
    prompt = prose("proxy exact", length=700)
    with proxy.client() as client:
        direct = ask(client, prompt, compact=False, logprobs=2)
        before = proxy.paths()
        ours = ask(client, prompt, compact=EVERYTHING, logprobs=2)
        streamed, usage = stream(client, prompt, compact=EVERYTHING)
    assert proxy.paths()["compact"] == before.get("compact", 0) + 2
    assert ours.choices[0].text == streamed == direct.choices[0].text
    assert ours.choices[0].logprobs.tokens == direct.choices[0].logprobs.tokens
    assert ours.choices[0].logprobs.text_offset == direct.choices[0].logprobs.text_offset
    assert ours.choices[0].logprobs.token_logprobs == pytest.approx(direct.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert (usage.prompt_tokens, usage.completion_tokens) == (direct.usage.prompt_tokens, direct.usage.completion_tokens) == (700, 24)
    assert no_handles_left(stage)


def test_the_decode_server_holds_a_quarter_of_the_slots(stage, server, proxy):
    prompt = prose("proxy quarter", length=700)
    with proxy.client() as client:
        whole = ask(client, prompt, n=2)
        streamed, usage = stream(client, prompt)
    told = whole.model_extra["kv_transfer_params"]["kvern"]["compact"]
    assert (told["prompt_tokens"], told["slots"]) == (700, 175)
    assert {choice.text for choice in whole.choices} == {streamed}
    assert usage.prompt_tokens == 700
    assert no_handles_left(stage)


def test_a_chat_streams_through(proxy):
    text = "The lighthouse was built in 1871 and has a red roof. " * 40
    messages = [{"role": "user", "content": text + "\nWhat colour is the roof?"}]
    before = proxy.paths()["compact"]
    with proxy.client() as client:
        options = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**options)
        pieces = [event.choices[0].delta.content or "" for event in client.chat.completions.create(**options, stream=True)]
    assert proxy.paths()["compact"] == before + 2
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert len(pieces) > 2


def test_stop_strings_end_the_answer_where_the_server_would(server, proxy):
    prompt = prose("proxy stop", length=500)
    with proxy.client() as client:
        full = ask(client, prompt, compact=False).choices[0].text
        for stop in (full[:3], full[2:7], full[len(full) // 2 :][:4]):
            direct = ask(client, prompt, compact=False, stop=stop).choices[0]
            ours = ask(client, prompt, compact=EVERYTHING, stop=stop).choices[0]
            assert (ours.text, ours.finish_reason) == (direct.text, direct.finish_reason)


def test_a_client_that_hangs_up_leaves_nothing_behind(stage, server, proxy):
    with proxy.client() as client:
        events = client.completions.create(model="model", prompt=prose("proxy hang up", length=500), max_tokens=1000, stream=True)
        next(iter(events))
        events.close()
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") > 0:
        assert time.monotonic() < deadline, "the servers still work for a client that left"
        time.sleep(0.1)
    assert no_handles_left(stage)


def test_without_the_daemon_answers_come_in_full(stage, server, proxy):
    prompt = prose("proxy alone", length=500)
    with proxy.client() as client:
        direct = ask(client, prompt, compact=False).choices[0].text
        stage.daemon.kill()
        server.reset_prefix_cache()
        before = proxy.paths()["compact"]
        assert ask(client, prompt).choices[0].text == direct
        assert proxy.paths()["compact"] == before
    stage.daemon.start()
    stage.daemon.wait_sessions(3)


@pytest.mark.full
def test_a_prefill_and_a_decode_server(stage, server):
    decode = serve(stage).wait_started()
    proxy = ProxyProcess(stage.folder, prefill=server.url, decode=decode.url, daemon=stage.daemon.address, compact=QUARTER)
    try:
        proxy.wait_started()
        prompt = prose("proxy pair", length=900)
        with proxy.client() as client:
            direct = ask(client, prompt, compact=False).choices[0].text
            assert ask(client, prompt, compact=EVERYTHING).choices[0].text == direct
            before = decode.metric("vllm:prompt_tokens_total")
            ask(client, prompt)
            assert decode.metric("vllm:prompt_tokens_total") - before == 225 + 1
        assert no_handles_left(stage)
    finally:
        proxy.stop()
