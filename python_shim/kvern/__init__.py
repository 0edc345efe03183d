"""Kvern: a KV-cache service for LLM serving. kvern.vllm has the connector for vLLM."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("kvern")
except importlib.metadata.PackageNotFoundError:  # a build folder
    __version__ = "0+unknown"
