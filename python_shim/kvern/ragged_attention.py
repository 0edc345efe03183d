"""Attention over compact caches whose layers keep different numbers of pages.

vLLM gives a request the same blocks in every layer. For the steps that run such requests each layer gets a table of
blocks and lengths of its own, through vLLM's own callback before each layer's attention. All tables are made at once,
before the first layer, in memory that is kept while the same requests run: most steps change lengths alone, and the
schedules that follow from them. Other steps run vLLM's own tables. There are two layouts (kernels/slot_pages.h):

- pool: a request claims as many blocks as its layers keep pages on average; what a thick layer has too much lies in pages
  that thin layers leave free. Layers must see all layers' pages as one array.
- shift: it claims as many as the thickest layer may keep, and a layer's pages are its own last ones. For engines whose
  layers' caches do not lie together.

A self-test at start-up reads pages that lie so, with NaN in all others.

A request whose layers were not all given their tables must not be heard: its first block is reported as failed, which
ends it before its token is seen.
"""

import dataclasses
import inspect
import itertools
import logging
import math
import operator

import torch

from kvern.groups import Geometry
from kvern.guard import log_once
from kvern.metadata import RAGGED_LAYOUTS, RaggedOrder, RaggedSlots

# What the CPU backend's metadata must have; all but those that are replaced are the same for all layers.
_REPLACED = ("block_table", "seq_lens", "max_seq_len", "scheduler_metadata")
_WIDTH_STEP = 16  # blocks: tables are made anew only as often as a request has grown by so many
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Tables:
    """The layers' tables for the requests of a batch, in its order. slots: of each request, or None for those that have
    ordinary caches. width: columns of the layers' tables, own_width: of the batch's. bases: what a layer adds to the
    numbers of its own pages."""

    def __init__(self, slots: tuple, width: int, own_width: int, bases: torch.Tensor, block_tokens: int, slot_pages):
        layers = len(bases)
        self.cached = [0] * len(slots)  # tokens of each request's cache
        self.longest = 0  # most tokens by which a layer's row is longer than the request's own
        columns = torch.arange(width).repeat(layers, len(slots), 1)
        offsets = bases[:, None, None].repeat(1, len(slots), width)
        longer = torch.zeros(layers, len(slots), dtype=torch.int32)
        for row, of_request in enumerate(slots):
            if of_request is None:
                continue
            layout, claimed, counts = of_request
            if len(counts) != layers:
                raise ValueError(f"the cache has {len(counts)} layers, the model {layers}")
            self.cached[row] = claimed * block_tokens
            self.longest = max(self.longest, (max(counts) - claimed) * block_tokens)
            for layer, places in enumerate(slot_pages(layout, list(counts), claimed)):
                count = min(len(places), width)
                columns[layer, row] -= len(places) - claimed
                columns[layer, row, :count] = torch.tensor([block for _, block in places[:count]])
                offsets[layer, row, :count] = bases[[owner for owner, _ in places[:count]]]
                longer[layer, row] = (len(places) - claimed) * block_tokens
        columns.clamp_(max=own_width - 1)  # what is cut lies behind all lengths
        columns += own_width * torch.arange(len(slots))[:, None]
        self._places, self._offsets, self._longer = columns.flatten(), offsets, longer
        # [layer, request, block], where what lies behind a layer's length is of no meaning, and [layer, request]
        self.block_tables, self.seq_lens = torch.empty_like(offsets), torch.empty_like(longer)
        self.alike = [tuple(row) for row in longer.tolist()]  # of each layer; where it is equal, so are all lengths

    def set_blocks(self, own: torch.Tensor) -> None:
        torch.index_select(own.reshape(-1), 0, self._places, out=self.block_tables.view(-1)).add_(self._offsets.view(-1))

    def set_lengths(self, own: torch.Tensor) -> None:
        torch.add(own, self._longer, out=self.seq_lens)


@dataclasses.dataclass
class _Batch:
    """What the layers read in steps that run the same requests in the same order."""

    key: tuple
    longest: int  # sequence that the tables are wide enough for
    tables: _Tables
    orders: list[RaggedOrder] = dataclasses.field(default_factory=list)  # these and
    blocks: torch.Tensor | None = None  # the engine's table are what the tables were last made from
    # layer: its attributes, and the cache and the metadata for it to read
    exchanges: dict[str, tuple[dict, torch.Tensor, object]] = dataclasses.field(default_factory=dict)
    # By what is added to the requests' lengths: the lengths, and the metadata of all layers that have these. They share
    # schedules.
    alike: dict[tuple, tuple[torch.Tensor, list[dict]]] = dataclasses.field(default_factory=dict)
    own: dict = dataclasses.field(default_factory=dict)  # the engine's metadata that the layers' was last made from


class RaggedAttention:
    """One worker's. problems: layout -> why this engine cannot read it; empty when it can."""

    def __init__(self, geometry: Geometry, kv_caches: dict, layers: dict, vllm_config, slot_pages):
        """layers: vLLM's attention layers by name. slot_pages: of the native binding. self_test() is to follow."""
        self._layers: dict[str, object] = {}
        self._caches: list[torch.Tensor] = []  # the layers' own
        self._whole: torch.Tensor | None = None  # all of them as one, where they lie so
        self._blocks = 1
        self._orders: list[RaggedOrder] = []
        self._by_layer: dict[str, object] = {}  # what vLLM's layers read in this step
        self._exchanges: dict[str, tuple[dict, torch.Tensor, object]] = {}  # of this step, see _Batch
        self._prepared = False
        self._trouble = ""
        self._batch: _Batch | None = None  # the last one
        self._slot_pages = slot_pages
        self._vllm_config = vllm_config
        self.problems = dict.fromkeys(RAGGED_LAYOUTS, "")
        try:
            obstacle = self._set_up(geometry, kv_caches, layers)
            self.problems = dict.fromkeys(RAGGED_LAYOUTS, obstacle)
            if not obstacle:
                self.problems["pool"] = self._see_as_one()
        except Exception as error:
            obstacle = f"its layers' caches are not of a kind that is known ({type(error).__name__}: {error})"
            self.problems = dict.fromkeys(RAGGED_LAYOUTS, obstacle)

    def _set_up(self, geometry: Geometry, kv_caches: dict, layers: dict) -> str:
        group = geometry.groups[0]
        if len(geometry.groups) > 1 or group.window:
            return "not all layers have full attention"
        if geometry.pipeline_parallel > 1:
            return "not every rank has all layers"
        if self._vllm_config.kv_transfer_config.kv_load_failure_policy != "fail":
            return "kv_load_failure_policy is not 'fail'"
        try:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata
        except ImportError:
            return "this vLLM has no CPU attention of the kind that is known"
        self._class = CPUAttentionMetadata
        missing = [name for name in _REPLACED if name not in inspect.signature(CPUAttentionMetadata).parameters]
        if missing:
            return f"CPUAttentionMetadata has no {', '.join(missing)}"
        for name, layer in layers.items():
            impl = getattr(layer, "impl", None)
            if impl is None:
                continue
            if type(impl) is not CPUAttentionBackendImpl:
                return f"the attention {type(impl).__name__} is not known; CPUAttentionBackendImpl is"
            if name not in group.layer_names or getattr(impl, "kv_sharing_target_layer_name", None):
                return "layers share caches"
            if impl.sliding_window not in (None, -1) or impl.alibi_slopes is not None:
                return "layers tell distances by the number of a slot"
        self._layers = {name: layers[name] for name in group.layer_names}
        if not all("kv_cache" in vars(layer) for layer in self._layers.values()):
            return "layers do not hold their caches themselves"
        self._block_tokens = group.block_tokens
        self._heads = group.heads
        self._caches = [kv_caches[name] for name in group.layer_names]
        shape = self._caches[0].shape
        if any(cache.device.type != "cpu" or cache.shape != shape for cache in self._caches):
            return "the layers' caches differ in form"
        if shape[2] != self._block_tokens:
            return "a block has several pages"
        self._blocks = shape[0]
        self._bases = torch.zeros(len(self._caches), dtype=torch.int32)
        forms = {((layer.num_heads, self._heads, layer.head_size), layer.isa) for layer in self._layers.values()}
        if len(forms) > 1:
            return "the layers differ in their heads"
        from vllm import envs

        config = self._vllm_config
        kept = config.model_config.dtype, config.cache_config.cache_dtype, envs.VLLM_CPU_ATTN_SPLIT_KV
        self._schedule_facts = *forms.pop(), *kept
        return ""

    def _see_as_one(self) -> str:
        first = min(self._caches, key=lambda cache: cache.storage_offset())
        stride = first.stride(0)
        for cache in self._caches:
            if cache.stride() != first.stride():
                return "the layers' caches differ in form"
            if cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                return "the layers' caches are separate allocations"
            if (cache.storage_offset() - first.storage_offset()) % stride:
                return "the layers' caches do not lie page by page"
        bases = [(cache.storage_offset() - first.storage_offset()) // stride for cache in self._caches]
        pages = max(bases) + first.shape[0]
        if pages >= 2**31:
            return "there are too many pages to be numbered"
        self._bases = torch.tensor(bases, dtype=torch.int32)
        self._whole = first.as_strided((pages, *first.shape[1:]), first.stride())
        return ""

    # ---------------------------------------------------------------- a step

    def begin_step(self, orders: list[RaggedOrder]) -> None:
        self._orders, self._by_layer, self._exchanges = orders, {}, {}
        self._prepared, self._trouble = False, ""

    @property
    def active(self) -> bool:
        return bool(self._orders)

    def exchange(self, name: str) -> None:
        """Before the layer's attention. Never raises."""
        exchange = self._exchanges.get(name)
        if exchange is None:
            if self._prepared:  # nothing for any layer, or this one is unknown
                self._trouble = self._trouble or f"{name} is not known"
                return
            self._prepare()
            return self.exchange(name)
        layer, cache, metadata = exchange
        # Both together, since a table's numbers lie outside the layer's own cache; and not before, since until now the
        # layer has written this step's rows to its own pages.
        layer["kv_cache"] = cache
        self._by_layer[name] = metadata

    def restore(self, name: str, kv_cache: torch.Tensor) -> None:
        """After the layer's attention. kv_cache: the layer's own."""
        exchange = self._exchanges.get(name)
        if exchange is not None:
            exchange[0]["kv_cache"] = kv_cache

    def _exchanged(self) -> list[str]:
        """The layers that were given their tables."""
        return [name for name, (*_, metadata) in self._exchanges.items() if self._by_layer.get(name) is metadata]

    def end_step(self) -> set[int]:
        """Blocks of the requests whose attention did not see what it should have."""
        orders, self._orders = self._orders, []
        if not orders:
            return set()
        why, exchanged = self._trouble, len(self._exchanged())
        if not why and exchanged < len(self._layers):
            why = f"{exchanged} of {len(self._layers)} layers called"
        if not why:
            return set()
        log_once(logging.ERROR, "Kvern: requests that decode from ragged compact caches fail: %s.", why)
        if any(order.first_block < 0 for order in orders):
            return set(range(1, self._blocks))
        return {order.first_block for order in orders}

    def _prepare(self) -> None:
        """Makes the exchanges of all layers, or none."""
        self._prepared = True
        try:
            from vllm.forward_context import get_forward_context

            self._by_layer = get_forward_context().attn_metadata
            self._exchanges = self._exchanges_of(self._by_layer)
        except Exception as error:
            self._batch = None  # it may be half written
            self._trouble = f"{type(error).__name__}: {error}"

    def _exchanges_of(self, by_layer) -> dict[str, tuple[dict, torch.Tensor, object]]:
        if not isinstance(by_layer, dict):
            raise ValueError("vLLM runs the batch in parts")
        own = next(iter(by_layer.values()))
        if type(own) is not self._class or not all(map(operator.is_, by_layer.values(), itertools.repeat(own))):
            raise ValueError("the layers do not share one CPUAttentionMetadata")
        if own.dynamic_causal is not None or own.causal is not True:
            raise ValueError("the attention is not causal")
        lengths = own.seq_lens.tolist()
        longest, batch = max(lengths), self._batch
        if (
            batch is None
            or batch.longest < longest
            or batch.orders != self._orders
            or not torch.equal(batch.blocks, own.block_table)
        ):
            batch = self._batch = self._batch_of(own.block_table, longest)
        if len(lengths) != len(batch.tables.cached):
            raise ValueError("the batch has more lengths than tables, or fewer")
        if any(map(operator.le, lengths, batch.tables.cached)):
            raise ValueError("a request has no tokens after its cache")
        batch.tables.set_lengths(own.seq_lens)
        fields, before = vars(own), batch.own
        changed = {name: fields[name] for name in fields if fields[name] is not before.get(name) and name not in _REPLACED}
        changed["kvern_own"] = own  # for those who look for requests by their blocks
        alike = batch.alike.values()
        for (_, metadata), schedule in zip(alike, self._schedules([rows for rows, _ in alike], own.query_start_loc)):
            changed["scheduler_metadata"] = schedule
            for of_layer in metadata:
                of_layer.update(changed)
        batch.own = dict(fields)
        return batch.exchanges

    def _batch_of(self, blocks: torch.Tensor, longest: int) -> _Batch:
        """The last one, with other blocks, if it ran the same requests."""
        for order in self._orders:
            if problem := self.problems[order.slots.layout]:
                raise ValueError(problem)
        first_blocks = blocks[:, 0].tolist()
        wanted = {order.first_block: order.slots for order in self._orders}
        found = [block for block in first_blocks if block in wanted]
        if len(found) != len(self._orders) or set(found) != wanted.keys():
            raise ValueError(f"{len(self._orders)} such requests are scheduled, {len(found)} are in the batch")
        slots = tuple(map(wanted.get, first_blocks))
        size, extra = self._block_tokens, max(max(each.pages, default=0) for each in wanted.values())
        width = -(-(-(-longest // size) + extra) // _WIDTH_STEP) * _WIDTH_STEP
        key = (slots, width, blocks.shape[1])
        batch = self._batch
        if batch is None or batch.key != key:
            batch = _Batch(key, (width - extra) * size, _Tables(*key, self._bases, size, self._slot_pages))
            tables = zip(batch.tables.block_tables, batch.tables.seq_lens, batch.tables.alike)
            for (name, layer), (table, lengths, longer) in zip(self._layers.items(), tables):
                metadata = self._class.__new__(self._class)
                fields = vars(metadata)
                fields["block_table"], fields["seq_lens"] = table, lengths
                fields["max_seq_len"] = batch.longest + batch.tables.longest  # a bound will do
                cache = vars(layer)["kv_cache"] if self._whole is None else self._whole
                batch.exchanges[name] = vars(layer), cache, metadata
                batch.alike.setdefault(longer, (lengths, []))[1].append(fields)
        batch.tables.set_blocks(blocks)
        batch.orders, batch.blocks = self._orders, blocks.clone()  # the engine writes the next step's to the same place
        return batch

    def _schedules(self, seq_lens: list[torch.Tensor], query_start_loc: torch.Tensor) -> list[torch.Tensor]:
        """As CPUAttentionMetadataBuilder.build() has one made, but not through vLLM's function for that, which takes a
        quarter of the time: a step may need one for each layer."""
        heads, isa, dtype, cache_dtype, splits = self._schedule_facts
        make, before = torch.ops._C.get_scheduler_metadata, (len(seq_lens[0]), *heads)
        after = (dtype, query_start_loc, True, -1, isa, splits, None, cache_dtype)  # causal, no window
        return [make(*before, lengths, *after) for lengths in seq_lens]

    # ---------------------------------------------------------------- self-test

    def self_test(self, run_step) -> None:
        """run_step(orders): a context in which vLLM's layers call the connector as in a step with these orders. Sets
        problems. To be called while nothing is in the caches."""
        for layout, problem in self.problems.items():
            if problem:
                continue
            try:
                self.problems[layout] = self._test(layout, run_step)
            except Exception as error:
                self.problems[layout] = f"the self-test failed ({type(error).__name__}: {error})"
            if layout == "pool" and self.problems[layout]:
                self._whole, self._bases, self._batch = None, torch.zeros_like(self._bases), None
        if all(self.problems.values()):
            log_once(logging.INFO, "Kvern: compact caches give all layers the same budget here: %s.", self.verdict)
        else:
            log_once(logging.INFO, "Kvern: compact caches may have a budget for each layer (%s).", self.verdict)

    @property
    def verdict(self) -> str:
        """The layout and that its self-test passed, or why there is none. For people."""
        pool, shift = (self.problems[layout] for layout in RAGGED_LAYOUTS)
        if not pool:
            return "pool, self-test passed"
        return shift or f"shift, since {pool}; self-test passed"

    def _test(self, layout: str, run_step) -> str:
        """Two requests in the first layer, which keeps a page more than the last, and in the last: one ragged of two
        blocks and five tokens more, one ordinary of three tokens. All pages that a layer does not read hold NaN."""
        names = list(self._layers)
        if len(names) < 2 or self._blocks < 5:
            return "a model of one layer has nothing to share" if len(names) < 2 else "the cache is too small to test"
        thick = 3 if layout == "pool" else 2
        pages = tuple(thick if name == names[0] else 1 if name == names[-1] else 2 for name in names)
        slots = RaggedSlots(layout, 2, pages)
        ends = (self._caches[0], self._caches[-1])
        before = [cache[1:5].clone() for cache in ends]
        try:
            places = self._slot_pages(layout, list(pages), 2)
            for layer in (0, len(names) - 1):
                for cache in ends:
                    cache[1:5] = math.nan
                self._caches[layer][3:5] = 0
                read = [(self._caches[owner], block + 1) for owner, block in places[layer]]
                if wrong := self._test_layer(run_step, names[layer], slots, read, self._caches[layer]):
                    return wrong
        finally:
            for cache, rows in zip(ends, before):
                cache[1:5] = rows
        return ""

    def _test_layer(self, run_step, name: str, slots: RaggedSlots, read: list, own: torch.Tensor) -> str:
        """read: (cache, block) of the pages that the layer keeps of a request with the blocks 1, 2 and 3."""
        from vllm.forward_context import set_forward_context

        layer, size = self._layers[name], self._block_tokens
        blocks = torch.tensor([[1, 2, 3], [4, 0, 0]], dtype=torch.int32)
        lengths, news = (2 * size + 5, 3), (5, 2)
        dtype = self._vllm_config.model_config.dtype
        random = torch.Generator().manual_seed(1)

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, layer.head_size, generator=random).to(dtype)

        def write(key, value, cache, first: int) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, cache, torch.arange(first, first + len(key)))

        kept = [rows(len(read) * size, self._heads) for _ in range(2)]
        for page, (cache, block) in enumerate(read):
            write(*(part[page * size : (page + 1) * size] for part in kept), cache, block * size)
        old = [rows(lengths[1] - news[1], self._heads) for _ in range(2)]
        write(*old, own, 4 * size)
        query = rows(sum(news), layer.num_heads)
        new = [rows(sum(news), self._heads) for _ in range(2)]
        where = torch.tensor([3 * size + i for i in range(news[0])] + [4 * size + lengths[1] - news[1] + i for i in range(news[1])])
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.tensor([0, news[0], sum(news)], dtype=torch.int32)
        metadata = self._class(
            num_actual_tokens=sum(news),
            max_query_len=max(news),
            query_start_loc=starts,
            max_seq_len=max(lengths),
            seq_lens=seq_lens,
            block_table=blocks,
            slot_mapping=where,
            scheduler_metadata=self._schedules([seq_lens], starts)[0],
        )
        by_layer = {each: metadata for each in self._layers}
        with torch.inference_mode(), run_step([RaggedOrder(1, slots)]):
            with set_forward_context(by_layer, self._vllm_config, slot_mapping={name: where}):
                found = layer(query.reshape(sum(news), -1), *(part.reshape(sum(news), -1) for part in new))
            if self._trouble or self._exchanged() != [name]:
                return f"vLLM's layers do not call the connector as they should ({self._trouble or 'no call'})"
        found = found.reshape(query.shape).float()
        begin = 0
        for (keys, values), count in zip((kept, old), news):
            now = slice(begin, begin + count)
            exact = _attention(
                query[now], torch.cat([keys, new[0][now]]), torch.cat([values, new[1][now]]), layer.impl.scale
            )
            if not torch.allclose(found[now], exact, rtol=0, atol=_TOLERANCE.get(dtype, 0)):
                return "the attention of a layer does not read the pages that its table names"
            begin += count
        return ""


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """[row, head, dim]: causal attention of the last rows over all tokens, by definition."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(group, 1) for part in (keys, values))
    logits = torch.einsum("rhd,thd->hrt", query.float(), keys) * scale
    rows, tokens = query.shape[0], keys.shape[0]
    late = torch.arange(tokens)[None, :] > torch.arange(tokens - rows, tokens)[:, None]
    return torch.einsum("hrt,thd->rhd", logits.masked_fill(late, -math.inf).softmax(-1), values)
