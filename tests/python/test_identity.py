import concurrent.futures
import json
import os
import time
import types

import pytest

from kvern import identity
from kvern.groups import Refused


def write_safetensors(path, tensors: dict[str, bytes]):
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(value)], "data_offsets": [len(data), len(data) + len(value)]}
        data += value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def big(seed: int, size: int = 200_000) -> bytes:
    return bytes((seed + i * 7) % 251 for i in range(size))


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["full", "sampled"])
def test_the_fingerprint_follows_content_and_not_place_or_time(tmp_path, limit):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", {"x": big(1), "y": big(2)})
    os.utime(folders[1] / "model.safetensors", (1, 1))
    one, two = [identity.fingerprint_files([folder / "model.safetensors"], limit) for folder in folders]
    assert one == two and bytes.fromhex(one)


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["full", "sampled"])
@pytest.mark.parametrize("tensor", ["x", "y"])
def test_retraining_any_one_tensor_changes_the_fingerprint(tmp_path, limit, tensor):
    path = tmp_path / "model.safetensors"
    before = {"x": big(1), "y": big(2), "tiny": b"abc"}
    write_safetensors(path, before)
    one = identity.fingerprint_files([path], limit)
    write_safetensors(path, {**before, tensor: big(9)})
    assert identity.fingerprint_files([path], limit) != one


def test_a_small_tensor_is_hashed_whole_even_when_sampling(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": big(1), "tiny": b"abc"})
    one = identity.fingerprint_files([path], 0)
    write_safetensors(path, {"x": big(1), "tiny": b"abd"})
    assert identity.fingerprint_files([path], 0) != one


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 64, (50).to_bytes(8, "little") + b"{" * 60, (2).to_bytes(8, "little") + b"[]"]
)
def test_files_that_are_no_safetensors_are_sampled_as_bytes(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content + big(3, 100))
    one = identity.fingerprint_files([path], 0)
    path.write_bytes(content + big(4, 100))
    assert identity.fingerprint_files([path], 0) != one


def config_of(model: str, load_format: str = "auto"):
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(model=model, seed=0, revision=None),
        load_config=types.SimpleNamespace(load_format=load_format, download_dir=None),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )


def test_weights_that_cannot_be_read_are_refused_unless_named(tmp_path):
    with pytest.raises(Refused, match="kvern.weights"):
        identity.weights_fingerprint(config_of(str(tmp_path)), "")
    names = [identity.weights_fingerprint(config_of(str(tmp_path)), given) for given in ("v7", "v8")]
    names.append(identity.weights_fingerprint(config_of(str(tmp_path), "dummy"), ""))
    assert len(set(names)) == 3 and all(bytes.fromhex(name) for name in names)


def test_safetensors_are_preferred_as_vllm_prefers_them(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"x": b"1"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert [path.name for path in identity.weight_files(tmp_path)] == ["model.safetensors"]


class Now(concurrent.futures.Executor):
    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


LATER = 3600.0  # an engine that starts so much later than the test


def lora(path, number=1, name="a", **more):
    return types.SimpleNamespace(lora_int_id=number, lora_path=str(path), lora_name=name, **more)


def adapter_in(folder, content=b"1"):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", {"x": content})
    (folder / "adapter_config.json").write_text("{}")
    return folder


def digests_of(started: float) -> identity.AdapterDigests:
    return identity.AdapterDigests(Now(), time.time() + started)


def test_an_adapter_that_is_older_than_the_engine_has_a_digest(tmp_path):
    one, two = (digests_of(LATER).get(lora(adapter_in(tmp_path / name), name=name)) for name in "ab")
    assert one[0] and one[1] and one == two, "it follows content alone"


def test_an_adapter_whose_files_change_has_no_digest_any_more(tmp_path):
    digests = digests_of(LATER)
    known, one = digests.get(lora(adapter_in(tmp_path / "x")))
    assert known and one
    adapter_in(tmp_path / "x", b"22")
    assert digests.get(lora(tmp_path / "x")) == (True, "")
    assert digests.get(lora(tmp_path / "x", number=2)) == (True, ""), "vLLM's prefix cache does not tell ids apart"
    for again in (lora(tmp_path / "x", number=3, name="b"), lora(adapter_in(tmp_path / "y", b"22"), number=4)):
        known, two = digests.get(again)
        assert known and two and two != one


@pytest.mark.parametrize("started", [-3600.0, 0.0, identity._CLOCK_MARGIN_SECONDS - 1], ids=["before", "now", "after"])
def test_an_adapter_that_changed_after_the_engines_start_may_be_another_than_was_loaded(tmp_path, started):
    """Say it was loaded, overwritten and then first asked for: the engine has what is no longer there."""
    digests = digests_of(started)
    assert digests.get(lora(adapter_in(tmp_path / "x"))) == (True, "")
    assert digests.get(lora(tmp_path / "x")) == (True, "")
    digests.loading(lora(tmp_path / "x"))
    assert digests.get(lora(tmp_path / "x")) == (True, ""), "vLLM does not read again what it has"


def test_a_copy_with_the_old_time_of_change_is_not_taken_for_old(tmp_path):
    adapter_in(tmp_path / "x")
    for place in (tmp_path / "x", *(tmp_path / "x").iterdir()):
        os.utime(place, (1, 1))
    assert digests_of(0).get(lora(tmp_path / "x")) == (True, "")


@pytest.mark.parametrize("moved", ["folder", "link", "file"])
def test_old_files_that_took_the_place_of_others_are_not_taken_for_old(tmp_path, monkeypatch, moved):
    adapter_in(tmp_path / "x"), adapter_in(tmp_path / "y", b"2")
    time.sleep(0.1)
    started = time.time()
    monkeypatch.setattr(identity, "_CLOCK_MARGIN_SECONDS", 0.0)
    digests = identity.AdapterDigests(Now(), started)
    assert digests.get(lora(tmp_path / "x"))[1]
    time.sleep(0.1)
    if moved == "folder":
        (tmp_path / "y").rename(tmp_path / "z")
    elif moved == "link":
        (tmp_path / "z").symlink_to(tmp_path / "y")
    else:
        (tmp_path / "z").mkdir()
        for file in list((tmp_path / "y").iterdir()):
            (tmp_path / "z" / file.name).symlink_to(file)
    assert digests.get(lora(tmp_path / "z", number=2, name="z")) == (True, "")


@pytest.mark.parametrize("load_inplace", [False, True])
def test_an_id_that_was_another_adapters_may_stand_for_that(tmp_path, load_inplace):
    digests = digests_of(LATER)
    adapter_in(tmp_path / "x"), adapter_in(tmp_path / "y", b"2")
    assert digests.get(lora(tmp_path / "x"))[1]
    again = lora(tmp_path / "y", name="b", load_inplace=load_inplace)
    assert bool(digests.get(again)[1]) is load_inplace


def executor():
    from vllm.v1.executor.abstract import Executor

    class Ranks(Executor):
        def __init__(self):
            self.loaded = []

        def collective_rpc(self, method, args=(), **_):
            self.loaded.append((method, args))
            return [True]

        _init_executor = check_health = None

    Ranks.__abstractmethods__ = frozenset()
    return Ranks()


def test_an_adapter_that_is_seen_being_loaded_may_be_new(tmp_path):
    digests, ranks = digests_of(-3600), executor()
    identity.watch_loads(digests)
    identity.watch_loads(digests_of(0))
    request = lora(adapter_in(tmp_path / "x"))
    assert ranks.add_lora(request) and ranks.loaded == [("add_lora", (request,))]
    known, one = digests.get(request)
    assert known and one
    adapter_in(tmp_path / "x", b"22")
    assert digests.get(request) == (True, "")


def test_an_adapter_that_is_overwritten_between_its_load_and_its_first_request_has_no_digest(tmp_path):
    digests = digests_of(-3600)
    identity.watch_loads(digests)
    executor().add_lora(lora(adapter_in(tmp_path / "x")))
    adapter_in(tmp_path / "x", b"2")
    assert digests.get(lora(tmp_path / "x")) == (True, "")


def test_looking_at_an_adapter_never_keeps_it_from_being_loaded(tmp_path, monkeypatch):
    digests, ranks = digests_of(0), executor()
    identity.watch_loads(digests)
    assert ranks.add_lora(lora(tmp_path / "nowhere"))
    monkeypatch.setattr(digests, "_look", lambda *_, **__: 1 / 0)
    assert ranks.add_lora(lora(tmp_path))
    assert len(ranks.loaded) == 2


def test_an_adapter_that_is_not_there_has_no_digest(tmp_path):
    assert digests_of(0).get(lora(tmp_path / "nowhere")) == (True, "")


def test_ranges_are_written_shortly():
    assert identity._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def text_config(**fields):
    return types.SimpleNamespace(**fields)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "Llama", "style=neox,theta=100000,dim=64"),
        ({"rope_theta": 10000.0, "rope_scaling": None}, "GPTJ", "style=interleaved,theta=10000,dim=64"),
        (
            {"rope_parameters": LLAMA3},
            "Llama",
            "style=neox,theta=500000,dim=64,scaling=llama3,factor=8,original=8192,low=1,high=4",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "truncate": False,
                                 "original_max_position_embeddings": 32768}},
            "Qwen3",
            "style=neox,theta=1000000,dim=64,scaling=yarn,factor=4,original=32768,truncate=false",
        ),
        (
            {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
            "Phi",
            "style=neox,theta=10000,dim=16",
        ),
        ({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, "Llama",
         "style=neox,theta=10000,dim=64,scaling=linear,factor=2.5"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "Llama",
         "style=neox,theta=10000,dim=64,scaling=dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         "Gemma3", ""),
        ({}, "Opt", ""),
    ],
)  # fmt: skip
def test_the_rotation_says_how_keys_turn(config, architecture, expected):
    assert identity.rotation(text_config(**config), 64, [architecture + "ForCausalLM"]) == expected
