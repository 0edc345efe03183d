"""The connector against the signatures of every vLLM version in contract/ (see tools/vllm_contract.py)."""

import ast
import inspect
import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONTRACTS = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "contract").glob("*.json"))}

# Attributes that are read without asking first whether they are there.
REQUIRED_FIELDS = {
    "Request": [
        "request_id",
        "block_hashes",
        "num_prompt_tokens",
        "num_computed_tokens",
        "lora_request",
        "kv_transfer_params",
        "all_token_ids",
    ],
    "SchedulerOutput": ["scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"],
    "NewRequestData": ["req_id", "block_ids"],
    "CachedRequestData": ["req_ids", "new_block_ids"],
    "KVConnectorOutput": ["finished_recving"],
    "KVCacheGroupSpec": ["layer_names", "kv_cache_spec"],
    "KVCacheConfig": ["num_blocks", "kv_cache_groups"],
    "AttentionSpec": ["num_kv_heads", "head_size", "dtype"],
    "SlidingWindowSpec": ["sliding_window"],
    "BlockStored": ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"],
    "BlockRemoved": ["block_hashes"],
    "KVCacheBlock": ["block_id", "ref_cnt"],
    "LoRARequest": ["lora_int_id", "lora_path", "lora_name"],
    "KVTransferConfig": ["kv_role", "kv_connector_extra_config"],
}
# What a version may lack, and what the connector then does without. Kept in step with docs/vllm.md.
OPTIONAL = {
    "transfer results": lambda c: "get_transfer_results" in base_methods(c),
    "block state": lambda c: "kv_connector_block_state" in c["classes"]["SchedulerOutput"]["fields"],
    "hit sources": lambda c: "CacheHitSource" in c["classes"],
    "pending push work": lambda c: "has_pending_push_work" in base_methods(c),
    "pending block frees": lambda c: "has_pending_block_frees" in base_methods(c),
    "untagged event keys": lambda c: "to_event_extra_keys" in c["functions"],
    "seed before start": lambda c: "resolve_none_hash_seed" in c["functions"],
    "event locality": lambda c: "locality" in c["classes"]["BlockStored"]["fields"],
}


def base_methods(contract):
    return contract["classes"]["KVConnectorBase_V1"]["methods"]


def connector_methods() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / "python_shim" / "kvern" / "vllm.py").read_text())
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "KvernConnector"]
    return {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}


def bare(parameter: str) -> str:
    return parameter.rstrip("=!")


@pytest.fixture(params=sorted(CONTRACTS))
def contract(request):
    return CONTRACTS[request.param]


def test_there_are_contracts_and_one_is_of_the_installed_vllm():
    out = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "vllm_contract.py"), str(pathlib.Path(inspect.getfile(vllm())).parent.parent)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    installed = json.loads(out)
    assert CONTRACTS[installed["version"]] == installed


def vllm():
    import vllm

    return vllm


def test_every_abstract_method_is_there(contract):
    own = connector_methods()
    for name, method in base_methods(contract).items():
        if "abstractmethod" in method.get("decorators", ()):
            assert name in own, f"{contract['version']}: {name} is abstract"


def test_overrides_take_what_vllm_passes(contract):
    for name, node in connector_methods().items():
        theirs = base_methods(contract).get(name)
        if theirs is None or "property" in theirs.get("decorators", ()):
            continue
        wanted = [bare(p) for p in theirs["parameters"] if not p.startswith("*")]
        ours = [a.arg for a in node.args.args]
        assert ours[: len(wanted)] == wanted, f"{contract['version']}: {name}{theirs['parameters']}"
        extra = ours[len(wanted) :]
        assert len(extra) <= len(node.args.defaults), f"{contract['version']}: vLLM does not pass {extra} to {name}"
        if any(p.startswith("**") for p in theirs["parameters"]):
            assert node.args.kwarg is not None, f"{contract['version']}: {name} gets keyword arguments"


def test_the_constructor_takes_the_cache_configuration(contract):
    assert base_methods(contract)["__init__"]["parameters"][:4] == ["self", "vllm_config", "role", "kv_cache_config"]


def test_several_groups_are_supported(contract):
    methods = contract["classes"]["SupportsHMA"]["methods"]
    assert methods["request_finished_all_groups"]["parameters"] == ["self", "request", "block_ids"]


def test_attributes_that_are_read_are_there(contract):
    for name, fields in REQUIRED_FIELDS.items():
        known = contract["classes"][name]
        names = set(known["fields"]) | set(known["methods"])
        missing = [field for field in fields if field not in names]
        assert not missing, f"{contract['version']}: {name} lacks {missing}"


def test_pages_can_be_held_and_workers_can_report(contract):
    pool = contract["classes"]["BlockPool"]
    assert pool["methods"]["touch"]["parameters"] == ["self", "blocks"]
    assert pool["methods"]["free_blocks"]["parameters"][:2] == ["self", "ordered_blocks"]
    assert "blocks" in pool["fields"]
    methods = base_methods(contract)
    assert methods["bind_gpu_block_pool"]["parameters"] == ["self", "gpu_block_pool"]
    assert methods["build_connector_worker_meta"]["parameters"] == ["self"]
    assert contract["classes"]["KVConnectorWorkerMetadata"]["methods"]["aggregate"]["parameters"] == ["self", "other"]


def test_stats_fit(contract):
    stats = contract["classes"]["KVConnectorStats"]["methods"]
    assert {"reset", "aggregate", "reduce", "is_empty"} <= set(stats)
    prom = contract["classes"]["KVConnectorPromMetrics"]["methods"]
    assert [bare(p) for p in prom["__init__"]["parameters"]] == [
        "self",
        "vllm_config",
        "metric_types",
        "labelnames",
        "per_engine_labelvalues",
    ]
    assert [bare(p) for p in prom["observe"]["parameters"]] == ["self", "transfer_stats_data", "engine_idx"]


def test_functions_that_are_called_take_what_they_get(contract):
    functions = contract["functions"]
    assert functions["maybe_convert_block_hash"] == ["hash_bytes"]
    assert functions["generate_block_hash_extra_keys"] == ["request", "start_token_idx", "end_token_idx", "start_mm_idx"]
    assert functions.get("to_event_extra_keys", ["extra_keys"]) == ["extra_keys"]
    assert functions.get("resolve_none_hash_seed", ["hash_fn"]) == ["hash_fn"]
    get_ids = contract["classes"]["KVCacheBlocks"]["methods"]["get_block_ids"]["parameters"]
    assert all(p.endswith("=") for p in get_ids[1:])


def test_the_compatibility_table_says_what_each_version_lacks(contract):
    row = [
        line
        for line in (ROOT / "docs" / "vllm.md").read_text().splitlines()
        if line.startswith(f"| {contract['version'].rsplit('.', 1)[0]} |")
    ]
    assert len(row) == 1, f"docs/vllm.md has no row for {contract['version']}"
    lacks = [name for name, there in OPTIONAL.items() if not there(contract)]
    told = row[0].rstrip("|").split("|")[-1].strip()
    assert told == (", ".join(lacks) or "nothing")
