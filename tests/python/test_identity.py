import concurrent.futures
import json
import os
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


def lora(path, number=1):
    return types.SimpleNamespace(lora_int_id=number, lora_path=str(path), lora_name="a")


def test_an_adapter_whose_files_change_under_its_id_has_no_digest_any_more(tmp_path):
    write_safetensors(tmp_path / "adapter_model.safetensors", {"x": b"1"})
    (tmp_path / "adapter_config.json").write_text("{}")
    digests = identity.AdapterDigests(Now())
    known, one = digests.get(lora(tmp_path))
    assert known and one
    write_safetensors(tmp_path / "adapter_model.safetensors", {"x": b"22"})
    assert digests.get(lora(tmp_path)) == (True, "")
    known, two = digests.get(lora(tmp_path, number=2))  # loaded anew
    assert known and two and two != one


def test_an_adapter_that_is_not_there_has_no_digest(tmp_path):
    assert identity.AdapterDigests(Now()).get(lora(tmp_path / "nowhere")) == (True, "")


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
