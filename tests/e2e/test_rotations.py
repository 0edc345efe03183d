"""Models that turn their keys in other ways than Llama: a compact cache is right, or refused."""

import pytest

from kvern import compact
from models import random_of
from prompts import tokens
from test_compact import Bench

SPEC = "streaming(budget=20%)"
full = pytest.mark.full


@pytest.fixture(scope="module", autouse=True)
def daemon(stage):
    return stage.start_daemon({"compact.state_dir": str(stage.folder / "compact")})


@pytest.fixture
def bench(stage, architecture):
    bench = Bench(stage, random_of(architecture))
    yield bench
    bench.engine.stop()
    bench.close()


@pytest.mark.parametrize(
    "architecture", [pytest.param("qwen3", marks=full), pytest.param("phi3", marks=full), "glm4", pytest.param("cohere", marks=full)]
)
def test_keys_are_moved_as_the_model_turns_them(bench, architecture):
    bench.watches = False
    bench.check(SPEC, tokens(architecture, length=700), tokens(architecture, "suffix", length=9))


@pytest.mark.parametrize("architecture", ["smollm3", pytest.param("hunyuan", marks=full)])
def test_a_model_whose_keys_cannot_be_moved_is_told_so(stage, bench, architecture):
    """vLLM runs both through transformers, and their configurations do not tell."""
    output = bench.engine.generate(
        tokens(architecture, length=300), max_tokens=3, kv_transfer_params=compact.wish(SPEC)
    )
    answer = output.kv_transfer_params["kvern"]["compact"]
    assert answer["state"] == "refused" and "does not turn its keys" in answer["reason"]
    doctor = stage.daemon.ctl("doctor")
    assert "makes no compact caches: layer" in doctor, doctor
