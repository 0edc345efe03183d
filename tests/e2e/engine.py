"""Drives real vLLM engines from a test: Engine for the offline API, Server for `vllm serve` over HTTP."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import time

import requests

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = pathlib.Path(os.environ.get("KVERN_BUILD", ROOT / "build" / "release"))

START_SECONDS = 300  # three imports of vLLM and a model on a busy machine
COMMAND_SECONDS = 300


class EngineDied(Exception):
    """The engine process ended while it was needed. Carries the end of its log."""


class EngineHung(Exception):
    """The engine process gave no answer in time. Carries the end of its log."""


@dataclasses.dataclass
class Output:
    name: str
    tokens: list[int]
    logprobs: list
    cached_tokens: int
    finish_reason: str
    kv_transfer_params: dict | None
    ttft: float

    def same_as(self, other: "Output") -> bool:
        """Equal tokens and bit-identical log-probabilities."""
        return self.tokens == other.tokens and self.logprobs == other.logprobs


def difference(one: Output, other: Output) -> str:
    """Says in words how two outputs differ, for the message of a failed assertion."""
    equal = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens)) if a != b), len(one.tokens))
    largest = 0.0
    for a, b in zip(one.logprobs[:equal], other.logprobs[:equal]):
        there = dict(map(tuple, b))
        largest = max([largest, *(abs(value - there[token]) for token, value in a if token in there)])
    return (
        f"{one.name} against {other.name}: first {equal} of {len(one.tokens)} tokens equal, "
        f"largest difference of a log-probability there {largest:g}, "
        f"cached tokens {one.cached_tokens} and {other.cached_tokens}"
    )


def engine_environment(threads: int = 1, single_process: bool = True, **extra: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        PYTHONPATH=os.pathsep.join(filter(None, [str(BUILD / "python"), os.environ.get("PYTHONPATH")])),
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # one core more would be reserved, and binding fights with other processes
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS=str(threads),
        VLLM_ENABLE_V1_MULTIPROCESSING="0" if single_process else "1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_SERVER_DEV_MODE="1",
        VLLM_LOGGING_LEVEL="DEBUG",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    environment.update(extra)
    return environment


# Whoever is slow on a crowded machine is still found: no test shall fail because something took longer than usual.
PATIENCE = {
    "setup_timeout_ms": 120_000,
    "connect_timeout_ms": 60_000,
    "call_timeout_ms": 60_000,
    "match_timeout_ms": 10_000,
    "prefetch_timeout_ms": 60_000,
    "load_timeout_ms": 120_000,
    "store_timeout_ms": 120_000,
}


def kvern_transfer(address: str | None, policy: str = "recompute", **options) -> dict:
    """What a user writes into --kv-transfer-config."""
    extra = {f"kvern.{name}": value for name, value in {**PATIENCE, **options}.items()}
    if address is not None:
        extra["kvern.address"] = address
    return {
        "kv_connector": "KvernConnector",
        "kv_connector_module_path": "kvern.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


def tail(log: pathlib.Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class Process:
    """A child in its own process group, with a log file; nothing of the group outlives stop()."""

    _numbers = itertools.count()

    def __init__(self, name: str, folder: pathlib.Path):
        self.log = folder / f"{name}-{next(self._numbers)}.log"
        self.child: subprocess.Popen | None = None

    def spawn(self, command: list[str], **options) -> None:
        with open(self.log, "wb") as log:
            # A group, but no session of its own: where Linux shares the processors out by session (autogroup), its
            # version 6.18 lets other sessions wait for up to a minute while the ranks of an engine spin.
            self.child = subprocess.Popen(command, stdout=log, stderr=log, process_group=0, **options)

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to the whole group, worker processes included."""
        os.killpg(self.child.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 of everything at once."""
        if self.child is not None:
            try:
                self.signal(signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.child.wait()


class Engine(Process):
    """One offline engine. Prompts are token ids. Methods that are not defined here are commands of engine_process.py."""

    def __init__(
        self,
        model: pathlib.Path,
        folder: pathlib.Path,
        *,
        transfer: dict | None = None,
        threads: int = 1,
        single_process: bool = True,
        prefix: list[str] = (),
        environment: dict[str, str] | None = None,
        **args,
    ):
        super().__init__("engine", folder)
        settings = {
            "dtype": "float32",
            "block_size": 32,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
        }
        if single_process and "tensor_parallel_size" not in args:
            settings["distributed_executor_backend"] = "uni"
        if transfer is not None:
            settings["kv_transfer_config"] = transfer
        settings.update(args)
        self._names = itertools.count()
        reply_read, reply_write = os.pipe()
        self.spawn(
            [*prefix, sys.executable, str(HERE / "engine_process.py")],
            stdin=subprocess.PIPE,
            pass_fds=[reply_write],
            env=engine_environment(
                threads, single_process, KVERN_E2E_REPLY_FD=str(reply_write), **(environment or {})
            ),
        )
        os.close(reply_write)
        self._reply = reply_read
        self._buffer = b""
        self.child.stdin.write(json.dumps({"model": str(model), "args": settings}).encode() + b"\n")
        self.child.stdin.flush()

    def wait_connected(self, clients: int = 2) -> None:
        """The daemon counts a session before the client has all that belongs to it; this waits for the clients' own word.
        To be called when the daemon has counted them, so that their losses are in the log too."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while True:
            log = self.log.read_text(errors="replace")
            ended = re.findall(r"^kvern: .*ended the session", log, re.MULTILINE)
            if log.count("kvern: connected to") - len(ended) == clients:
                return
            if time.monotonic() > deadline:
                raise EngineHung(f"no {clients} clients are connected\n{tail(self.log)}")
            time.sleep(0.02)

    def wait_started(self, seconds: float = START_SECONDS) -> "Engine":
        """The constructor returns at once, so that several engines can start side by side."""
        self._receive(seconds)
        return self

    def _receive(self, seconds: float):
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._reply], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineHung(f"no answer within {seconds:.0f} s; {self.log}:\n{tail(self.log)}")
            data = os.read(self._reply, 1 << 20)
            if not data:
                raise EngineDied(f"exit code {self.child.wait()}; {self.log}:\n{tail(self.log)}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}; {self.log}:\n{tail(self.log)}")
        return answer["result"]

    def send(self, command: str, **arguments) -> None:
        """Starts a command without waiting for its answer; finish() brings it."""
        self.child.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self.child.stdin.flush()

    def finish(self, seconds: float = COMMAND_SECONDS):
        return self._receive(seconds)

    def call(self, command: str, seconds: float = COMMAND_SECONDS, **arguments):
        self.send(command, **arguments)
        return self.finish(seconds)

    def __getattr__(self, command: str):
        if command.startswith("_"):
            raise AttributeError(command)
        return lambda **arguments: self.call(command, **arguments)

    def submit(self, prompts: list[list[int]], max_tokens: int = 16, names: list[str] | None = None, **options):
        """Adds requests; returns their names."""
        names = names or [f"r{next(self._names)}" for _ in prompts]
        requests_ = [
            {"name": name, "prompt": prompt, "max_tokens": max_tokens, **options} for name, prompt in zip(names, prompts)
        ]
        self.call("submit", requests=requests_)
        return names

    def collect(self, names: list[str]) -> list[Output]:
        return [Output(**answer) for answer in self.call("collect", names=names)]

    def generate_all(
        self, prompts: list[list[int]], max_tokens: int = 16, wait_saves: bool = True, **options
    ) -> list[Output]:
        names = self.submit(prompts, max_tokens, **options)
        self.call("run", names=names)
        outputs = self.collect(names)
        if wait_saves:
            assert self.call("settle", limit=60), "the engine still had saves to do a minute after its last request"
        return outputs

    def generate(self, prompt: list[int], max_tokens: int = 16, **options) -> Output:
        return self.generate_all([prompt], max_tokens, **options)[0]

    def forget_kv(self, poison: float | None = 50.0) -> None:
        """Empties vLLM's own prefix cache and overwrites the KV memory, so that only an external store can help."""
        assert self.call("reset_prefix_cache"), "vLLM would not reset its prefix cache: some blocks are still held"
        if poison is not None:
            self.call("poison", value=poison)

    def stop(self, seconds: float = 60) -> None:
        """Ends the engine in good order; kills whatever is left of it."""
        if self.alive:
            try:
                self.call("exit", seconds=seconds)
                self.child.wait(seconds)
            except (EngineDied, EngineHung, OSError, RuntimeError, subprocess.TimeoutExpired):
                pass
        self.kill()
        if self._reply >= 0:
            os.close(self._reply)
            self._reply = -1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server(Process):
    """`vllm serve`: front end, engine core and worker as processes of their own."""

    def __init__(self, model: pathlib.Path, folder: pathlib.Path, *, transfer: dict | None, threads: int = 1, **options):
        super().__init__("serve", folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = {
            "host": "127.0.0.1",
            "port": str(self.port),
            "served-model-name": "model",
            "dtype": "float32",
            "block-size": "32",
            "max-model-len": "2048",
            "max-num-seqs": "8",
            **{name.replace("_", "-"): str(value) for name, value in options.items()},
        }
        command = [str(pathlib.Path(sys.executable).parent / "vllm"), "serve", str(model), "--enforce-eager"]
        command += ["--enable-prompt-tokens-details"]
        for name, value in arguments.items():
            command += [f"--{name}", value]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        self.spawn(command, stdin=subprocess.DEVNULL, env=engine_environment(threads, single_process=False))

    def wait_started(self, seconds: float = START_SECONDS) -> "Server":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                raise EngineDied(f"vllm serve ended with {self.child.returncode}; {self.log}:\n{tail(self.log)}")
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return self
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        raise EngineHung(f"vllm serve was not healthy after {seconds:.0f} s; {self.log}:\n{tail(self.log)}")

    def complete(self, prompt: list[int], max_tokens: int = 16, seconds: float = COMMAND_SECONDS, **options) -> dict:
        """One greedy streamed completion: {"text", "ttft", "cached_tokens"}."""
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        start = time.monotonic()
        answer = {"text": "", "ttft": None, "cached_tokens": None}
        with requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=seconds) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                event = json.loads(line[len(b"data: ") :])
                if event.get("choices"):
                    if answer["ttft"] is None:
                        answer["ttft"] = time.monotonic() - start
                    answer["text"] += event["choices"][0]["text"]
                details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                answer["cached_tokens"] = details.get("cached_tokens", answer["cached_tokens"])
        return answer

    def reset_prefix_cache(self) -> None:
        """Pages are still held for a moment after the last token, while their save is under way."""
        deadline = time.monotonic() + 30
        while True:
            response = requests.post(f"{self.url}/reset_prefix_cache", timeout=60)
            response.raise_for_status()
            if self.metric("vllm:kv_cache_usage_perc") == 0:
                return
            assert time.monotonic() < deadline, "vLLM still holds KV blocks half a minute after its last request"
            time.sleep(0.1)

    def metric(self, name: str) -> float:
        """The sum over all label sets of a metric on vLLM's own endpoint; 0 where there is none."""
        total = 0.0
        for line in requests.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line.startswith((name + "{", name + " ")):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def stop(self, seconds: float = 60) -> None:
        if self.alive:
            os.kill(self.child.pid, signal.SIGTERM)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
