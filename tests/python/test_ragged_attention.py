"""Tables of blocks and lengths for each layer, as a ragged compact cache needs them."""

import random
import types

import fake_native
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from kvern.metadata import RAGGED_LAYOUTS, RaggedOrder, RaggedSlots
from kvern.ragged_attention import RaggedAttention

LAYERS, BLOCKS, BLOCK, WIDTH = 6, 50, 32, 40


def attention(monkeypatch, lie_together: bool = True) -> RaggedAttention:
    monkeypatch.setattr(RaggedAttention, "_set_up", lambda self, *_: "")
    monkeypatch.setattr(RaggedAttention, "_see_as_one", lambda self: "" if lie_together else "they do not lie together")
    monkeypatch.setattr(
        RaggedAttention, "_schedules", lambda self, seq_lens, starts: [tuple(each.tolist()) for each in seq_lens]
    )
    made = RaggedAttention(None, {}, {}, None, fake_native.slot_pages)
    made._layers = {f"layer{i}": types.SimpleNamespace(kv_cache=i) for i in range(LAYERS)}
    made._bases = torch.arange(LAYERS, dtype=torch.int32) * (BLOCKS if lie_together else 0)
    made._block_tokens, made._class, made._blocks = BLOCK, CPUAttentionMetadata, BLOCKS
    made._whole = "whole" if lie_together else None
    return made


def given(made: RaggedAttention, context: dict) -> list:
    """What each layer reads in the step."""
    return [metadata for *_, metadata in made._exchanges_of(context).values()]


def pool(pages: tuple[int, ...]) -> RaggedSlots:
    return RaggedSlots("pool", sum(pages) // LAYERS, pages)


def batch(rows: list[tuple[list[int], int]], **more):
    table = torch.zeros(len(rows), WIDTH, dtype=torch.int32)
    for row, (blocks, _) in enumerate(rows):
        table[row, : len(blocks)] = torch.tensor(blocks)
    lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
    metadata = CPUAttentionMetadata(
        num_actual_tokens=len(rows), max_query_len=1, query_start_loc=torch.arange(len(rows) + 1), max_seq_len=0,
        seq_lens=lengths, block_table=table, slot_mapping=None, scheduler_metadata=None, **more,
    )  # fmt: skip
    return {f"layer{i}": metadata for i in range(LAYERS)}


def random_pages(seed: int, mean: int) -> tuple[int, ...]:
    draw, pages = random.Random(seed), [mean] * LAYERS
    for _ in range(30):
        giver, taker = draw.randrange(LAYERS), draw.randrange(LAYERS)
        if pages[giver] > 1:
            pages[giver] -= 1
            pages[taker] += 1
    return tuple(pages)


@pytest.mark.parametrize("seed", range(5))
def test_each_layer_reads_its_pages_and_then_the_requests_own_blocks(monkeypatch, seed):
    made, draw = attention(monkeypatch), random.Random(seed)
    pages, level = random_pages(seed, 4), random_pages(seed + 100, 3)
    ids = draw.sample(range(1, BLOCKS), 20)
    ragged, plain, other = ids[:7], ids[7:12], ids[12:17]
    made.begin_step([RaggedOrder(ragged[0], pool(pages)), RaggedOrder(other[0], pool(level))])
    context = batch([(ragged, 6 * BLOCK + 9), (plain, 4 * BLOCK + 1), (other, 3 * BLOCK + 40)])
    shared = next(iter(context.values()))
    before = shared.seq_lens.clone(), shared.block_table.clone()
    for number, metadata in enumerate(given(made, context)):
        places = fake_native.slot_pages("pool", list(pages), 4)[number]
        wanted = [layer * BLOCKS + ragged[block] for layer, block in places] + [number * BLOCKS + b for b in ragged[4:]]
        length = pages[number] * BLOCK + 2 * BLOCK + 9
        assert metadata.seq_lens.tolist() == [length, 4 * BLOCK + 1, level[number] * BLOCK + 40]
        used = -(-length // BLOCK)
        assert metadata.block_table[0, :used].tolist() == wanted[:used]
        assert metadata.block_table[1, :5].tolist() == [number * BLOCKS + b for b in plain]
        assert metadata.max_seq_len >= max(metadata.seq_lens)
        assert metadata.scheduler_metadata == tuple(metadata.seq_lens.tolist())
        assert metadata.query_start_loc is shared.query_start_loc
    assert torch.equal(shared.seq_lens, before[0]) and torch.equal(shared.block_table, before[1])


@pytest.mark.parametrize("lie_together", [False, True])
def test_in_the_shift_layout_each_layer_reads_its_own_last_blocks(monkeypatch, lie_together):
    made = attention(monkeypatch, lie_together)
    pages, ids, plain = (4, 1, 3, 2, 2, 1), [30, 7, 41, 9, 12, 3], [20, 21]
    made.begin_step([RaggedOrder(30, RaggedSlots("shift", 4, pages))])
    found = given(made, batch([(plain, 40), (ids, 4 * BLOCK + 40)]))
    for number, (count, metadata) in enumerate(zip(pages, found)):
        base = number * BLOCKS if lie_together else 0
        assert metadata.seq_lens.tolist() == [40, count * BLOCK + 40]
        assert metadata.block_table[1, : count + 2].tolist() == [base + block for block in ids[4 - count :]]
        assert metadata.block_table[0, :2].tolist() == [base + block for block in plain]
        assert metadata.max_seq_len >= max(metadata.seq_lens)


def test_tables_follow_their_requests(monkeypatch):
    """As they grow, change places and are joined by others, whatever was kept from the step before."""
    made = attention(monkeypatch)
    slots = {3: pool(random_pages(3, 3)), 20: RaggedSlots("shift", 2, (1, 2, 2, 1, 1, 2))}
    for step in range(1, 300, 7):
        rows = [(list(range(3, 18)), 3 * BLOCK + step), (list(range(20, 34)), 2 * BLOCK + step)]
        if step % 3 == 0:
            rows.reverse()
        if step % 5 == 0:
            rows.insert(1, (list(range(40, 50)), 9 + step))
        made.begin_step([RaggedOrder(first, slots[first]) for first in slots])
        context = batch(rows)
        kept = given(made, context)
        fresh = attention(monkeypatch)
        fresh.begin_step(made._orders)
        for one, other in zip(kept, given(fresh, context)):
            assert torch.equal(one.seq_lens, other.seq_lens)
            assert one.scheduler_metadata == tuple(one.seq_lens.tolist()) and one.max_seq_len >= max(one.seq_lens)
            assert one.kvern_own is next(iter(context.values())) and one.query_start_loc is one.kvern_own.query_start_loc
            assert one.num_actual_tokens == len(rows)
            for row, length in enumerate(one.seq_lens.tolist()):
                used = -(-length // BLOCK)
                assert torch.equal(one.block_table[row, :used], other.block_table[row, :used])


def test_a_step_is_made_anew_where_anything_of_it_has_changed(monkeypatch):
    """The engine writes all steps' tables and lengths to the same memory."""
    made, pages = attention(monkeypatch), random_pages(7, 2)
    blocks, other = [3, 4, 5, 6], [9, 8, 7, 6]
    context = batch([(blocks, 2 * BLOCK + 1), (other, 70)])
    own = next(iter(context.values()))

    def check(orders):
        made.begin_step(orders)
        ragged = {order.first_block: order.slots for order in orders}
        for number, metadata in enumerate(given(made, dict.fromkeys(made._layers, own))):
            assert metadata.scheduler_metadata == tuple(metadata.seq_lens.tolist())
            for row, length in enumerate(metadata.seq_lens.tolist()):
                held, slots = own.block_table[row].tolist(), ragged.get(int(own.block_table[row, 0]))
                count = slots.pages[number] - slots.blocks if slots else 0
                assert length == own.seq_lens[row] + count * BLOCK
                read = [(number, block) for block in range(len(held))]
                if slots:
                    first = fake_native.slot_pages("pool", list(slots.pages), slots.blocks)[number]
                    read = first + [(number, block) for block in range(slots.blocks, len(held))]
                used = -(-length // BLOCK)
                assert metadata.block_table[row, :used].tolist() == [p * BLOCKS + held[b] for p, b in read[:used]]

    orders = [RaggedOrder(3, pool(pages))]
    check(orders)
    own.seq_lens += 1
    check(orders)
    own.block_table[0, 3] = 30  # the request's next block
    own.seq_lens += BLOCK
    check(orders)
    check([RaggedOrder(3, pool(random_pages(8, 2)))])  # another cache in the same blocks
    check([RaggedOrder(3, pool(pages)), RaggedOrder(9, pool(pages))])  # the other request has become one, too
    own.block_table[[0, 1]] = own.block_table[[1, 0]]
    own.seq_lens[[0, 1]] = own.seq_lens[[1, 0]]
    check(orders)
    own.seq_lens += 20 * BLOCK  # more than the tables were made for
    check(orders)


def test_what_is_not_as_expected_fails_the_ragged_requests(monkeypatch):
    good = [([3, 4, 5], 2 * BLOCK + 1), ([7, 8], 40)]
    pages = random_pages(1, 2)
    order = RaggedOrder(3, pool(pages))

    def failed(rows, orders, lie_together=True, **more):
        made = attention(monkeypatch, lie_together)
        made.begin_step(orders)
        context = types.SimpleNamespace(attn_metadata=batch(rows, **more))
        monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
        for name in made._layers:
            made.exchange(name)
        return made.end_step()

    assert failed(good, [order]) == set()
    assert failed(good, [RaggedOrder(9, order.slots)]) == {9}, "not in the batch"
    assert failed(good, [order], lie_together=False) == {3}, "a layer would not see the pages of others"
    assert failed(good, [order, order]) == {3}, "one of two is not in the batch"
    assert failed([([3, 4, 5], 2 * BLOCK)], [order]) == {3}, "no token after the cache"
    assert failed(good, [RaggedOrder(3, RaggedSlots("pool", 0, ()))]) == {3}, "nothing known of it"
    assert failed(good, [RaggedOrder(3, RaggedSlots("shift", 4, pages[1:]))]) == {3}, "another model"
    assert failed(good, [order], causal=False) == {3}
    assert failed(good, [RaggedOrder(-1, order.slots)]) == set(range(1, BLOCKS)), "nobody knows which"


def test_a_layer_that_is_not_called_fails_the_ragged_requests(monkeypatch):
    made = attention(monkeypatch)
    context = types.SimpleNamespace(attn_metadata=batch([([3, 4, 5], 2 * BLOCK + 1)]))
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    made.begin_step([RaggedOrder(3, pool(random_pages(1, 2)))])
    names = list(made._layers)
    for name in names[:-1]:
        made.exchange(name)
        assert made._layers[name].kv_cache == "whole"
        made.restore(name, "own")
        assert made._layers[name].kv_cache == "own"
    assert made.active and made.end_step() == {3} and not made.active


def test_where_caches_lie_apart_a_layer_keeps_its_own(monkeypatch):
    made = attention(monkeypatch, lie_together=False)
    context = types.SimpleNamespace(attn_metadata=batch([([3, 4, 5], 2 * BLOCK + 1)]))
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    made.begin_step([RaggedOrder(3, RaggedSlots("shift", 2, (2, 1, 1, 2, 1, 1)))])
    for number, name in enumerate(made._layers):
        made.exchange(name)
        assert made._layers[name].kv_cache == number
        made.restore(name, number)
        assert made._layers[name].kv_cache == number
    assert made.end_step() == set() and made.verdict == "shift, since they do not lie together; self-test passed"
    assert [bool(made.problems[layout]) for layout in RAGGED_LAYOUTS] == [True, False]
