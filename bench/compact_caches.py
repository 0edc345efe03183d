"""Compact caches in a real engine: slots, capacity, decode speed, and the hand-over from prefill to decode.

compact.<model>.<budget>.slots_ratio       slots of the full cache over slots claimed
compact.<model>.<budget>.decode_speedup    seconds of a decode step over the full cache, over those over the compact one
compact.<model>.<budget>.decode_limit      the same as bytes read in a step would have it: weights and KV
compact.<model>.<budget>.capacity_ratio    requests that run at once in the same KV memory, over those of the full cache
compact.<model>.<budget>.capacity_limit    prompt tokens over slots, rounded up to whole blocks
compact.handover_over_prefill              end of prefill to first token from the compact cache, over the prefill
compact.handover.<part>_s                  its parts: made (stored and compacted), decode (load and one step)
compact.tokens_per_s                       prompt tokens that the daemon compacts a second, the error's measurement included
compact.exchange_ms                        of a decode step of four requests whose 30 layers keep different numbers of
                                           slots: time in the connector's calls before and after the layers, median

Models: smollm2 (the real one), kvheavy_b1 and kvheavy_b4 (random weights, 4 layers of 16 KV heads; one long prompt, and
four of a quarter of its length at once).
"""

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from engine import BUILD, Engine, kvern_transfer  # noqa: E402
from models import kv_heavy, smollm2  # noqa: E402
from prompts import prose, tokens  # noqa: E402

sys.path.insert(0, str(BUILD / "python"))

from kvern.compact import CompactCache, Daemon as Compactions, wish  # noqa: E402

BUDGETS = ("25%", "12%", "3.2%")
STEPS = 24  # decode steps of one measurement
REPEATS = 3
READY_SECONDS = 300
HANDOVER_TOKENS = 4000
ROOM = 8  # full caches that the engine has memory for where requests are counted
KV_GIB = 4  # holds ROOM caches of the largest case
EXCHANGE_TOKENS = (900, 1000, 1100, 1200)
DTYPE_BYTES = 2
BLOCK_TOKENS = 32


@dataclasses.dataclass
class Case:
    name: str
    model: pathlib.Path
    prompts: list[list[int]]
    kv_bytes_per_token: int
    weight_bytes: int


def cases() -> list[Case]:
    real, heavy = smollm2("bfloat16"), kv_heavy()

    def weights(folder: pathlib.Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    real_token, heavy_token = 30 * 2 * 3 * 64 * DTYPE_BYTES, 4 * 2 * 16 * 64 * DTYPE_BYTES
    return [
        Case("smollm2", real, [prose("compact bench", length=HANDOVER_TOKENS)], real_token, weights(real)),
        Case("kvheavy_b1", heavy, [tokens("heavy", length=28_800)], heavy_token, weights(heavy) // 2),
        Case("kvheavy_b4", heavy, [tokens("heavy", i, length=7_200) for i in range(4)], heavy_token, weights(heavy) // 2),
    ]


@contextlib.contextmanager
def engine_of(case: Case, address: str, kv_gib: int = 2, **options):
    longest = max(map(len, case.prompts))
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            case.model,
            pathlib.Path(folder),
            transfer=kvern_transfer(address, policy="fail"),
            threads=2,
            dtype="bfloat16",
            max_model_len=longest + 256,
            environment={"VLLM_CPU_KVCACHE_SPACE": str(kv_gib)},
            **options,
        )
        try:
            yield engine.wait_started()
        finally:
            engine.stop()


def run(engine: Engine, requests: list[dict], max_tokens: int) -> tuple[list, float]:
    """Outputs, and the seconds from the last first token to the end."""
    named = [{"name": f"bench{i}", "max_tokens": max_tokens, "logprobs": None, **one} for i, one in enumerate(requests)]
    engine.call("submit", requests=named)
    names = [one["name"] for one in named]
    start = time.monotonic()
    engine.call("run", names=names, seconds=1800)
    seconds = time.monotonic() - start
    outputs = engine.collect(names)
    for output in outputs:
        assert len(output.tokens) == max_tokens, f"{output.name} ended with {output.finish_reason}"
    assert engine.call("settle", limit=120)
    return outputs, seconds - max(output.ttft for output in outputs)


def step_seconds(engine: Engine, requests: list[dict]) -> float:
    """Of one decode step of all requests at once, whose prompts are in vLLM's own prefix cache after a first run."""
    run(engine, requests, 1)
    return statistics.median(run(engine, requests, STEPS)[1] for _ in range(REPEATS)) / (STEPS - 1)


def full_request(prompt: list[int]) -> dict:
    return {"prompt": prompt, "kv_transfer_params": {"kvern": {"load": False, "store": False}}}


def compact_request(output, suffix: list[int]) -> dict:
    cache = CompactCache.from_answer(output.kv_transfer_params)
    return {"prompt": cache.prompt(suffix), "salt": cache.handle, "kv_transfer_params": cache.kv_transfer_params}


class RefusedByEngine(Exception):
    """The engine makes no such compact cache, for the reason that the text gives."""


def make(engine: Engine, compactions: Compactions, prompt: list[int], spec: str, early: bool = False):
    """The prefill's output once its compact cache is ready, and how long that took from its first token on. early: as the
    proxy waits for it, not until its error is measured."""
    wished = {"prompt": prompt, "kv_transfer_params": wish(spec)}
    (output,), seconds = run(engine, [wished], 1)
    answer = output.kv_transfer_params["kvern"]["compact"]
    if answer["state"] == "refused":
        raise RefusedByEngine(answer["reason"])
    start = time.monotonic()
    compactions.wait(answer["handle"], READY_SECONDS, early=early)
    return output, seconds + time.monotonic() - start


def speed(case: Case, engine: Engine, compactions: Compactions) -> dict:
    results = {}
    full = step_seconds(engine, [full_request(prompt) for prompt in case.prompts])
    held = sum(map(len, case.prompts))
    results[f"compact.{case.name}.full.step_ms"] = full * 1e3
    for budget in BUDGETS:
        made = [make(engine, compactions, prompt, f"snapkv(budget={budget})")[0] for prompt in case.prompts]
        slots = sum(output.kv_transfer_params["kvern"]["compact"]["slots"] for output in made)
        seconds = step_seconds(engine, [compact_request(output, output.tokens) for output in made])
        key = f"compact.{case.name}.{budget}"
        read = [case.weight_bytes + tokens_ * case.kv_bytes_per_token for tokens_ in (held, slots)]
        results |= {
            f"{key}.step_ms": seconds * 1e3,
            f"{key}.decode_speedup": full / seconds,
            f"{key}.decode_limit": read[0] / read[1],
            f"{key}.slots_ratio": held / slots,
        }
    return results


def handle_of(output) -> str:
    return output.kv_transfer_params["kvern"]["compact"]["handle"]


def handover(case: Case, engine: Engine, compactions: Compactions) -> dict:
    """Medians over prompts that nobody has seen."""
    measured = []
    for i in range(REPEATS):
        prompt = prose("handover", i, length=HANDOVER_TOKENS)
        output, made = make(engine, compactions, prompt, "snapkv(budget=12%)", early=True)
        handle = handle_of(output)
        (first,), _ = run(engine, [compact_request(output, output.tokens)], 1)
        compactions.wait(handle, READY_SECONDS)
        measured.append((output.ttft, made, first.ttft))
    prefill, made, decode = (statistics.median(column) for column in zip(*measured))
    alone = [make(engine, compactions, prose("alone", i, length=HANDOVER_TOKENS), "snapkv(budget=12%)")[0] for i in range(REPEATS)]
    compacting = statistics.median(compactions.state(handle_of(output))["seconds"] for output in alone)
    return {
        "compact.handover_over_prefill": statistics.median((one[1] + one[2]) / one[0] for one in measured),
        "compact.handover.prefill_s": prefill,
        "compact.handover.made_s": made,
        "compact.handover.decode_s": decode,
        "compact.tokens_per_s": HANDOVER_TOKENS / compacting,
    }


def exchange(engine: Engine, compactions: Compactions) -> dict:
    prompts = [prose("exchange", length=length) for length in EXCHANGE_TOKENS]
    made = [make(engine, compactions, prompt, "cake(budget=12%,window=16,allocation=cake)")[0] for prompt in prompts]
    requests = [compact_request(output, output.tokens) for output in made]
    assert all(one["salt"].startswith("kvc2.") for one in requests), "all layers got the same slots"
    run(engine, requests, 1)
    engine.call("time_layers")
    run(engine, requests, STEPS)
    return {"compact.exchange_ms": statistics.median(engine.call("time_layers")) * 1e3}


def at_once(engine: Engine, requests: list[dict]) -> int:
    """How many hold KV memory at the same time, of more than fit."""
    named = [{"name": f"many{i}", "max_tokens": STEPS, "logprobs": None, **one} for i, one in enumerate(requests)]
    names = [one["name"] for one in named]
    engine.call("submit", requests=named)
    most = 0
    while True:
        engine.call("run", names=names, max_steps=1)
        states = engine.call("status", names=names).values()
        most = max(most, sum(state in ("RUNNING", "WAITING_FOR_REMOTE_KVS") for state in states))
        if not states:
            break
    engine.collect(names)
    assert engine.call("settle", limit=120)
    return most


def capacity(case: Case, address: str, compactions: Compactions) -> dict:
    """In memory for ROOM full caches. No two requests share a block: full ones by their salts, compact ones by their handles."""
    prompt, results = case.prompts[0], {}
    blocks_of = lambda held: -(-(held + STEPS) // BLOCK_TOKENS)  # noqa: E731
    blocks = ROOM * blocks_of(len(prompt))
    with engine_of(case, address, KV_GIB, num_gpu_blocks_override=blocks + 1, max_num_seqs=512) as engine:
        whole = [full_request(prompt) | {"salt": str(i)} for i in range(ROOM + 1)]
        for one in whole[:ROOM]:
            run(engine, [one], 1)  # in turn, for else the first has ended before the last is prefilled
        full = at_once(engine, whole)
        for budget in BUDGETS:
            output, _ = make(engine, compactions, prompt, f"snapkv(budget={budget})")
            slots = output.kv_transfer_params["kvern"]["compact"]["slots"]
            made = [output]
            while len(made) <= blocks // blocks_of(slots + 1):
                made.append(make(engine, compactions, prompt, f"snapkv(budget={budget})")[0])
            compact = at_once(engine, [compact_request(one, one.tokens) for one in made])
            results[f"compact.{case.name}.{budget}.capacity_ratio"] = compact / full
            results[f"compact.{case.name}.{budget}.capacity_limit"] = len(prompt) / (-(-slots // BLOCK_TOKENS) * BLOCK_TOKENS)
            for one in made:
                compactions.delete(handle_of(one))
    return results


def measure(address: str) -> dict:
    results = {}
    with Compactions(address) as compactions:
        for case in cases():
            with engine_of(case, address) as engine:
                results |= speed(case, engine, compactions)
                if case.name == "smollm2":
                    results |= handover(case, engine, compactions)
                    results |= exchange(engine, compactions)
            results |= capacity(case, address, compactions)
    return results
