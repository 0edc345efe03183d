import types

import pytest
import torch

from kvern import layout
from kvern.groups import Geometry, Group, Refused, group_chunk_blocks


def group(**changes) -> Group:
    values = dict(
        index=0, window=0, block_tokens=32, chunk_blocks=8, heads=2, model_heads=2, key_dim=4, value_dim=4, dtype="float32",
        layer_names=("m.0.attn", "m.1.attn"), layer_begin=0, group_layers=2,
    )
    return Group(**{**values, **changes})


def describe(tensor, isa=None, **changes):
    one = group(**changes)
    geometry = Geometry((one,), 32, 8, 1, 1, 1)
    layers = {} if isa is None else {name: types.SimpleNamespace(isa=isa) for name in one.layer_names}
    return layout.describe(geometry, {name: tensor for name in one.layer_names}, layers)[0]


@pytest.mark.parametrize("isa, packing", [("vec", "cpu_vec"), ("vec16", "cpu_vec"), ("amx", "cpu_amx"), (None, "rows")])
def test_the_packing_follows_the_attention_of_the_cpu(isa, packing):
    found = describe(torch.zeros(10, 2, 32, 8), isa)
    assert found.packing == packing and found.pages_per_block == 1
    address, reachable, pages, page, head, token, value = found.layers[0]
    assert (reachable, pages, page, head) == (10 * 2 * 32 * 8 * 4, 10, 2 * 32 * 8 * 4, 32 * 8 * 4)
    assert (token, value) == ((8 * 4, 4 * 4) if packing == "rows" else (0, 0))


def test_rows_may_lie_in_any_order():
    storage = torch.zeros(10, 32, 2, 8)  # token before head
    address, reachable, pages, page, head, token, value = describe(storage.permute(0, 2, 1, 3)).layers[0]
    assert (page, head, token, value) == (32 * 2 * 8 * 4, 8 * 4, 2 * 8 * 4, 16)
    assert reachable == storage.numel() * 4


def test_interleaved_layers_reach_no_further_than_their_view():
    storage = torch.zeros(10, 3, 2, 32, 8)
    found = describe(storage[:, 1])
    address, reachable, pages, page, *_ = found.layers[0]
    assert page == 3 * 2 * 32 * 8 * 4 and address == storage.data_ptr() + 2 * 32 * 8 * 4
    assert address + reachable <= storage.data_ptr() + storage.numel() * 4


def test_kernel_blocks_that_are_smaller_than_the_schedulers():
    assert describe(torch.zeros(20, 2, 16, 8)).pages_per_block == 2


@pytest.mark.parametrize(
    "tensor, isa, words",
    [
        (torch.zeros(10, 2, 32, 8), "neon", ["neon", "vec"]),
        (torch.zeros(10, 2, 32, 8, device="meta"), None, ["host and CUDA memory only"]),
        (torch.zeros(2, 10, 32, 2, 4), None, ["shape"]),
        (torch.zeros(10, 3, 32, 8), None, ["2 heads"]),
        (torch.zeros(10, 2, 32, 16)[..., ::2], None, ["gaps"]),
        (torch.zeros(10, 2, 32, 16)[..., :8], "vec", ["gaps"]),
        (torch.zeros(10, 2, 24, 8), None, ["24 tokens"]),
    ],
)
def test_unknown_layouts_are_refused_with_a_sentence(tensor, isa, words):
    with pytest.raises(Refused) as error:
        describe(tensor, isa)
    for word in words:
        assert word in str(error.value)


def test_layers_without_a_cache_are_refused():
    geometry = Geometry((group(),), 32, 8, 1, 1, 1)
    with pytest.raises(Refused, match="m.1.attn"):
        layout.describe(geometry, {"m.0.attn": torch.zeros(10, 2, 32, 8)}, {})


def test_groups_with_a_window_shorter_than_a_chunk_are_stored_block_by_block():
    assert group_chunk_blocks(32, 0) == 8 and group_chunk_blocks(512, 0) == 1
    assert group_chunk_blocks(32, 255) == 1 and group_chunk_blocks(32, 256) == 8
