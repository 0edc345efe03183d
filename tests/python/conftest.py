import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent.parent / "python_shim"))
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fake_native  # noqa: E402

# The connector imports its native half by name; here it is the fake, whatever is built.
sys.modules["kvern._kvern"] = fake_native


@pytest.fixture
def store():
    fake_native.Client.store = fake_native.Store()
    return fake_native.Client.store


@pytest.fixture
def model(tmp_path):
    import mini_engine

    return mini_engine.write_checkpoint(tmp_path / "model")


@pytest.fixture(params=[False, True], ids=["steps-in-turn", "steps-overlap"])
def engine(request, store, model, monkeypatch):
    """Makes engines: engine(blocks=..., windows=..., ...)."""
    import mini_engine
    from vllm.distributed import parallel_state

    from kvern.vllm import KvernConnector

    def set_rank(rank):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: rank)

    def make(folder=model, **options):
        options.setdefault("asynchronous", request.param)
        return mini_engine.MiniEngine(folder, KvernConnector, set_rank=set_rank, **options)

    return make
