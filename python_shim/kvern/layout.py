"""Describes the engine's KV tensors to the native binding: addresses and strides, and how K and V lie in a page."""

import dataclasses

from kvern.groups import Geometry, Group, Refused

# vLLM's CPU attention packs K and V of a (page, head) in an order of its own, named by the layer's `isa`.
_CPU_PACKINGS = {"vec": "cpu_vec", "vec16": "cpu_vec", "amx": "cpu_amx"}


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Arguments of TransferWorker.register_group that depend on the tensors."""

    packing: str
    pages_per_block: int
    layers: list[tuple[int, int, int, int, int, int, int]]
    on_device: bool = False  # CUDA memory, which the daemon reads and writes itself


def _packing(layer) -> str:
    isa = getattr(layer, "isa", None)
    if isa is None:
        return "rows"
    packing = _CPU_PACKINGS.get(isa)
    if packing is None:
        raise Refused(
            f"vLLM's CPU attention keeps its cache in the layout {isa!r} on this machine; Kvern knows "
            f"{', '.join(sorted(_CPU_PACKINGS))}"
        )
    return packing


def _reachable_bytes(tensor) -> int:
    """From the view's first element to the end of its last one."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return elements * tensor.element_size()


def _layer(name: str, tensor, group: Group, packing: str) -> tuple[int, int, int, int, int, int, int]:
    width = group.key_dim + group.value_dim
    if tensor.device.type not in ("cpu", "cuda"):
        raise Refused(f"the KV cache is on {tensor.device}; Kvern reads and writes host and CUDA memory only")
    if tensor.dim() != 4 or tensor.shape[1] != group.heads or tensor.shape[3] != width:
        raise Refused(
            f"the KV cache of layer {name} has the shape {tuple(tensor.shape)}; Kvern knows "
            f"[blocks, {group.heads} heads, tokens, {width} = K and V]"
        )
    page_tokens = tensor.shape[2]
    if group.block_tokens % page_tokens:
        raise Refused(f"the pages of layer {name} hold {page_tokens} tokens, its blocks {group.block_tokens}")
    page, head, token, element = (stride * tensor.element_size() for stride in tensor.stride())
    if element != tensor.element_size():
        raise Refused(f"the KV rows of layer {name} have gaps between their elements")
    if packing != "rows" and token != width * tensor.element_size():
        raise Refused(f"the pages of layer {name} have gaps between their tokens, which the layout {packing} cannot have")
    value_offset = group.key_dim * tensor.element_size() if packing == "rows" else 0
    return (
        tensor.data_ptr(),
        _reachable_bytes(tensor),
        tensor.shape[0],
        page,
        head,
        token if packing == "rows" else 0,
        value_offset,
    )


def describe(geometry: Geometry, kv_caches: dict, attention_layers: dict) -> list[GroupLayout]:
    """One entry per group. attention_layers: vLLM's layer objects by name. Throws Refused."""
    layouts = []
    for group in geometry.groups:
        missing = [name for name in group.layer_names if name not in kv_caches]
        if missing:
            raise Refused(f"vLLM registered no KV cache for the layers {', '.join(missing[:3])}")
        packings = {_packing(attention_layers.get(name)) for name in group.layer_names}
        page_tokens = {kv_caches[name].shape[2] for name in group.layer_names if kv_caches[name].dim() == 4}
        devices = {kv_caches[name].device for name in group.layer_names}
        if len(packings) > 1 or len(page_tokens) > 1 or len(devices) > 1:
            raise Refused(f"the layers of KV-cache group {group.index} do not share one layout")
        packing = packings.pop()
        layers = [_layer(name, kv_caches[name], group, packing) for name in group.layer_names]
        layouts.append(
            GroupLayout(
                packing=packing,
                pages_per_block=group.block_tokens // page_tokens.pop(),
                layers=layers,
                on_device=devices.pop().type == "cuda",
            )
        )
    return layouts
