"""Takes the last queries of a prompt from the attention layers, while the engine computes them anyway.

For the steps in which a request that asked has some of its last tokens computed, the `forward` of each layer's attention
implementation is replaced by one that copies these rows first; in all other steps the engine runs its own. The rows of a
request are found by its length after the step and the block of its last token, which no other request of a batch has
both: the block is written in this very step, so whoever shares it is longer.
"""

import dataclasses
import inspect
import logging
import math

import torch

from kvern.groups import Geometry
from kvern.guard import log_once
from kvern.metadata import CaptureOrder

_ARGUMENTS = ("layer", "query", "key", "value", "kv_cache", "attn_metadata")
_TEST_TOKENS = 2


@dataclasses.dataclass
class _Captured:
    first: int  # position of the first row
    rows: int
    seen: dict[str, set[int]]  # layer -> rows that are there
    queries: dict[str, torch.Tensor]  # layer -> [rows, heads, dim], on the engine's device


class QueryCapture:
    """One worker's. problem says why it does not work on this engine; empty when it does."""

    def __init__(self, geometry: Geometry, kv_caches: dict, layers: dict, vllm_config):
        """layers: vLLM's attention layers by name. Runs the first one on a few rows, without a cache, as a self-test."""
        self._layers: dict[str, object] = {}
        self._page_tokens = 0
        self._pages_per_block = 1
        self._orders: list[CaptureOrder] = []
        self._located: list[tuple[object, list]] = []
        self._captured: dict[str, _Captured] = {}
        self._installed = False
        try:
            self.problem = self._set_up(geometry, kv_caches, layers, vllm_config)
        except Exception as error:
            self.problem = f"the self-test of query capture failed ({type(error).__name__}: {error})"
        if self.problem:
            log_once(logging.WARNING, "Kvern: compact caches by methods that read queries are refused: %s.", self.problem)
        else:
            log_once(logging.INFO, "Kvern: queries can be captured on this engine (self-test passed).")

    def _set_up(self, geometry: Geometry, kv_caches: dict, layers: dict, vllm_config) -> str:
        group = geometry.groups[0]
        if len(geometry.groups) > 1:
            return "the model has several KV-cache groups"
        for name in group.layer_names:
            layer = layers.get(name)
            forward = getattr(getattr(layer, "impl", None), "forward", None)
            if forward is None:
                return f"vLLM shows no attention implementation of layer {name}"
            if tuple(inspect.signature(forward).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
                return f"{type(layer.impl).__name__}.forward takes other arguments than {', '.join(_ARGUMENTS)}"
            self._layers[name] = layer
        mode = getattr(getattr(vllm_config, "compilation_config", None), "cudagraph_mode", None)
        if mode is not None and mode.mixed_mode().name == "FULL":
            return "CUDA graphs replay whole prefills (cudagraph_mode FULL); use FULL_AND_PIECEWISE or PIECEWISE"
        self._page_tokens = kv_caches[group.layer_names[0]].shape[2]
        self._pages_per_block = group.block_tokens // self._page_tokens
        return self._self_test(group.layer_names[0], kv_caches[group.layer_names[0]], vllm_config)

    def _self_test(self, name: str, kv_cache: torch.Tensor, vllm_config) -> str:
        """A pass through vLLM's own attention layer, as in its warm-up: without metadata nothing is read or written."""
        from vllm.forward_context import set_forward_context

        layer = self._layers[name]
        dtype = vllm_config.model_config.dtype
        shape = (_TEST_TOKENS, layer.num_heads, layer.head_size)
        sent = torch.arange(math.prod(shape), device=kv_cache.device).reshape(shape).to(dtype)
        other = torch.zeros(_TEST_TOKENS, layer.num_kv_heads * layer.head_size, device=kv_cache.device, dtype=dtype)
        seen = []
        forward = layer.impl.forward

        def spy(layer, query, *arguments, **named):
            seen.append(query.clone())
            return forward(layer, query, *arguments, **named)

        layer.impl.forward = spy
        try:
            with torch.inference_mode(), set_forward_context(None, vllm_config):
                layer(sent.reshape(_TEST_TOKENS, -1), other, other)
        finally:
            del layer.impl.forward
        if len(seen) != 1 or seen[0].shape != sent.shape or not torch.equal(seen[0], sent):
            return "vLLM's attention layer does not hand its queries to impl.forward as they came"
        return ""

    # ---------------------------------------------------------------- a step

    def begin_step(self, orders: list[CaptureOrder]) -> None:
        self._located = []
        self._orders = [] if self.problem else orders
        if bool(self._orders) == self._installed:
            return
        for name, layer in self._layers.items():
            if self._orders:
                layer.impl.forward = self._capturing(name, layer.impl.forward)
            else:
                del layer.impl.forward  # the class's own is back
        self._installed = bool(self._orders)

    def _capturing(self, name: str, forward):
        def capturing(layer, query, key, value, kv_cache, attn_metadata, *arguments, **named):
            if attn_metadata is not None:
                try:
                    self._copy_rows(name, query, attn_metadata)
                except Exception as error:  # the engine goes on; what is missing shows when the queries are taken
                    log_once(logging.WARNING, "Kvern: queries could not be captured (%s: %s).", type(error).__name__, error)
            return forward(layer, query, key, value, kv_cache, attn_metadata, *arguments, **named)

        return capturing

    def _copy_rows(self, name: str, query: torch.Tensor, metadata) -> None:
        # Beside requests with ragged caches the layers' blocks have other numbers.
        for order, source, begin, end in self._locate(getattr(metadata, "kvern_own", metadata)):
            captured = self._captured.get(order.request)
            if captured is None or (captured.first, captured.rows) != (order.first, order.rows):
                captured = self._captured[order.request] = _Captured(order.first, order.rows, {}, {})
            if name not in captured.queries:
                captured.queries[name] = torch.empty(
                    (order.rows, *query.shape[1:]), dtype=query.dtype, device=query.device
                )
            captured.queries[name][begin:end].copy_(query[source : source + end - begin])
            captured.seen.setdefault(name, set()).update(range(begin, end))

    def _locate(self, metadata) -> list[tuple[CaptureOrder, int, int, int]]:
        """(order, row of the batch, rows of the capture [begin, end)); looked up once for all layers that share metadata."""
        for known, rows in self._located:
            if known is metadata:
                return rows
        lengths, starts = metadata.seq_lens.tolist(), metadata.query_start_loc.tolist()
        rows = []
        for order in self._orders:
            page = (order.end - 1) // self._page_tokens
            wanted = order.last_block * self._pages_per_block + page % self._pages_per_block
            for row, length in enumerate(lengths):
                tokens = starts[row + 1] - starts[row]
                if length != order.end or tokens != order.end - order.begin or int(metadata.block_table[row, page]) != wanted:
                    continue
                first = max(order.begin, order.first)
                last = min(order.end, order.first + order.rows)
                rows.append((order, starts[row] + first - order.begin, first - order.first, last - order.first))
                break
        self._located.append((metadata, rows))
        return rows

    # ---------------------------------------------------------------- what was captured

    def take(self, request: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """[rows, heads, dim] of each layer in order, in host memory, scaled so that q·k / sqrt(dim) is what the layer's
        softmax sees. Empty when not all of them have been captured."""
        captured = self._captured.pop(request, None)
        if captured is None:
            return []
        taken = []
        for name, layer in self._layers.items():
            if len(captured.seen.get(name, ())) < captured.rows:
                return []
            queries = captured.queries[name]
            scale = getattr(layer.impl, "scale", None)
            factor = scale * math.sqrt(queries.shape[-1]) if isinstance(scale, float) else 1.0
            if not math.isclose(factor, 1.0, rel_tol=1e-5):
                queries = queries * factor
            taken.append(queries.to(device="cpu", dtype=dtype).contiguous())
        return taken

    def forget(self, requests) -> None:
        for request in requests:
            self._captured.pop(request, None)
