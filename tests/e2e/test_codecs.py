"""bf16 comes back bit by bit; codec chains come back close, and the table says how close."""

import dataclasses
import math
import re
import subprocess

import pytest

from daemon import binary
from engine import difference
from models import smollm2
from prompts import prose

PROMPT_TOKENS = 1500
WHOLE_BLOCKS = 1472  # of 32 and of 64 tokens
GENERATED = 64
# Where next-token distributions are compared: behind so many tokens of the exact continuation.
FORCED = range(0, GENERATED, 4)
TOP = 20  # as many log-probabilities as vLLM gives


@dataclasses.dataclass(frozen=True)
class Chain:
    spec: str
    most_bytes: float  # share of the raw bytes that it must stay below, headers included
    least_agreement: float = 0.0  # of the greedy tokens; only where less means wrong pages
    full: bool = False  # long matrix only


CHAINS = [
    Chain("raw | zstd", 0.75, least_agreement=1.0),
    Chain("int8", 0.55, least_agreement=0.2),
    Chain("int8 | zstd", 0.55, full=True),
    Chain("fp8", 0.55, full=True),
    Chain("int4", 0.33),
    Chain("int3", 0.28, full=True),
    Chain("int2", 0.22, full=True),
    Chain("unrotate | int8", 0.55, least_agreement=0.2, full=True),
    Chain("unrotate | int4", 0.33),
    Chain("minicache | int4", 0.40, full=True),
    Chain("centroid(ratio=0.5)", 0.70, full=True),
    Chain("centroid(ratio=0.5) | int8", 0.40, full=True),
    Chain("centroid(ratio=0.5) | int4", 0.26),
    Chain("unrotate | centroid(ratio=0.5) | int4", 0.26, full=True),
]


@pytest.fixture(scope="module")
def daemon(stage):
    return stage.start_daemon()


def agreement(one, other) -> float:
    return sum(a == b for a, b in zip(one.tokens, other.tokens)) / len(other.tokens)


def divergence(exact: dict[int, float], other: dict[int, float]) -> float:
    """KL divergence in nats over the exact distribution's likeliest tokens; what is left of both is one more outcome."""
    common = exact.keys() & other.keys()
    terms = [(math.exp(exact[token]), math.exp(other[token])) for token in common]
    rest = [max(1e-9, 1 - sum(pair[i] for pair in terms)) for i in (0, 1)]
    return sum(p * math.log(p / q) for p, q in [*terms, tuple(rest)] if p > 0)


def next_distributions(engine, text: list[int], continuation: list[int]) -> list[dict[int, float]]:
    """Of the tokens after the text and so many tokens of the continuation, on whatever pages the engine has."""
    prompts = [text + continuation[:count] for count in FORCED]
    quiet = {"kvern": {"load": False, "store": False}}
    outputs = engine.generate_all(prompts, max_tokens=1, logprobs=TOP, kv_transfer_params=quiet)
    return [dict(map(tuple, output.logprobs[0])) for output in outputs]


def test_bf16_pages_are_restored_bit_by_bit(stage, daemon):
    engine = stage.engine(smollm2(), dtype="bfloat16", block_size=64).wait_started()
    text = prose("bf16", length=PROMPT_TOKENS)
    cold = engine.generate(text, max_tokens=32)
    hit = engine.generate(text, max_tokens=32)
    pages = engine.page_digests()
    engine.forget_kv()
    restored = engine.generate(text, max_tokens=32)
    assert restored.cached_tokens == hit.cached_tokens == WHOLE_BLOCKS
    there = engine.page_digests()
    common = pages.keys() & there.keys()
    assert len(common) >= 23
    # The last page may hold tokens of this run.
    assert all(pages[key] == there[key] for key in common)
    print(f"bf16: {difference(restored, hit)}; {difference(hit, cold)}")
    assert restored.same_as(hit), difference(restored, hit)
    engine.stop()


class Bench:
    """One engine, its exact continuation of one prompt, and what each chain made of it."""

    def __init__(self, stage, daemon):
        self.daemon = daemon
        self.engine = stage.engine(smollm2(), dtype="bfloat16").wait_started()
        self.text = prose("codecs", length=PROMPT_TOKENS)
        quiet = {"kvern": {"load": False, "store": False}}
        self.exact = self.engine.generate(self.text, max_tokens=GENERATED, kv_transfer_params=quiet)
        self.distributions = next_distributions(self.engine, self.text, self.exact.tokens)
        self.known = set(re.findall(r"\w+", self.refusal("no_such_codec").split("there are:")[1]))
        self.rows: list[str] = []

    def refusal(self, spec: str) -> str:
        """What the daemon says to a chain that it does not take."""
        config = self.daemon.config.with_name("refused.toml")
        config.write_text(f'[codec]\ndefault = "{spec}"\n')
        checked = subprocess.run(
            [binary("kvernd"), "--check-config", str(config)], capture_output=True, text=True, timeout=60
        )
        assert checked.returncode != 0, f"kvernd takes the chain {spec!r}"
        return checked.stdout + checked.stderr

    def knows(self, spec: str) -> bool:
        return all(step.split("(")[0].strip() in self.known for step in spec.split("|"))

    def run(self, chain: Chain) -> None:
        engine, daemon = self.engine, self.daemon
        daemon.ctl("flush", "--all")
        engine.forget_kv()
        before = daemon.bytes_stored()
        engine.generate(self.text, max_tokens=1, kv_transfer_params={"kvern": {"load": False, "codec": chain.spec}})
        raw, encoded = (after - then for after, then in zip(daemon.bytes_stored(), before))
        assert raw > 0, f"{chain.spec} stored nothing"
        engine.forget_kv()
        restored = engine.generate(
            self.text, max_tokens=GENERATED, kv_transfer_params={"kvern": {"store": False}}
        )
        assert restored.cached_tokens == WHOLE_BLOCKS
        others = next_distributions(engine, self.text, self.exact.tokens)
        kl = sum(map(divergence, self.distributions, others)) / len(others)
        agree = agreement(restored, self.exact)
        self.rows.append(
            f"{chain.spec:40} {encoded / raw:6.3f} {restored.ttft * 1000:9.1f} {agree:8.2f} {kl:10.5f}"
        )
        assert math.isfinite(kl)
        assert encoded / raw < chain.most_bytes
        assert agree >= chain.least_agreement, "so little agreement means wrong pages, not quantisation"


@pytest.fixture(scope="module")
def bench(stage, daemon):
    bench = Bench(stage, daemon)
    yield bench
    bench.engine.stop()
    head = f"{'chain':40} {'bytes':>6} {'first ms':>9} {'agree':>8} {'KL nats':>10}"
    cold = f"{'(computed)':40} {'':6} {bench.exact.ttft * 1000:9.1f}"
    print("\n" + "\n".join([head, cold, *bench.rows]))


@pytest.mark.parametrize(
    "chain",
    [pytest.param(chain, id=chain.spec, marks=[pytest.mark.full] if chain.full else []) for chain in CHAINS],
)
def test_a_chain_keeps_what_it_promises(bench, chain):
    if not bench.knows(chain.spec):
        pytest.skip("this daemon has no such step")
    bench.run(chain)


def test_unsound_chains_are_refused_with_the_reason(bench):
    assert "int8 comes before zstd" in bench.refusal("zstd | int8")
    assert "compact caches" in bench.refusal("cake(budget=25%) | int8")


def test_a_request_with_an_unsound_chain_is_served_and_not_stored(bench, daemon):
    daemon.ctl("flush", "--all")
    bench.engine.forget_kv()
    before = daemon.bytes_stored()
    output = bench.engine.generate(
        bench.text, max_tokens=4, kv_transfer_params={"kvern": {"load": False, "codec": "zstd | int8"}}
    )
    assert output.tokens == bench.exact.tokens[:4]
    assert daemon.bytes_stored() == before
    assert daemon.metric("kvern_refused_total", reason="codec") > 0
