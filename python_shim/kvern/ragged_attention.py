"""Attention over compact caches whose layers keep different numbers of pages.

vLLM gives a request the same blocks in every layer. For the steps that run such requests each layer gets a table of
blocks and lengths of its own, through vLLM's own callback before each layer's attention. All tables are made at once,
before the first layer; other steps run vLLM's own. There are two layouts (kernels/slot_pages.h):

- pool: a request claims as many blocks as its layers keep pages on average; what a thick layer has too much lies in pages
  that thin layers leave free. Layers must see all layers' pages as one array.
- shift: it claims as many as the thickest layer may keep, and a layer's pages are its own last ones. For engines whose
  layers' caches do not lie together.

A self-test at start-up reads pages that lie so, with NaN in all others.

A request whose layers were not all given their tables must not be heard: its first block is reported as failed, which
ends it before its token is seen.
"""

import inspect
import logging
import math

import torch

from kvern.groups import Geometry
from kvern.guard import log_once
from kvern.metadata import RAGGED_LAYOUTS, RaggedOrder, RaggedSlots

# What the CPU backend's metadata must have; all but those that are replaced are the same for all layers.
_REPLACED = ("block_table", "seq_lens", "max_seq_len", "scheduler_metadata")
_WIDTH_STEP = 16  # blocks: tables are made anew only as often as a request has grown by so many
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Tables:
    """How the layers' tables follow from a batch's own. slots: of each request, or None for those that have ordinary
    caches. width: columns of the layers' tables, own_width: of the batch's. bases: what a layer adds to the numbers of
    its own pages. Good for all batches of the same caches in the same order."""

    def __init__(self, slots: tuple, width: int, own_width: int, bases: torch.Tensor, block_tokens: int, slot_pages):
        layers = len(bases)
        self.claimed = [0] * len(slots)  # blocks of each request's cache
        self.longest = 0  # most blocks by which a layer's row is longer than the request's own
        columns = torch.arange(width).repeat(layers, len(slots), 1)
        offsets = bases[:, None, None].repeat(1, len(slots), width)
        longer = torch.zeros(layers, len(slots), dtype=torch.int32)
        for row, of_request in enumerate(slots):
            if of_request is None:
                continue
            layout, claimed, counts = of_request
            if len(counts) != layers:
                raise ValueError(f"the cache has {len(counts)} layers, the model {layers}")
            self.claimed[row] = claimed
            self.longest = max(self.longest, max(counts) - claimed)
            for layer, places in enumerate(slot_pages(layout, list(counts), claimed)):
                count = min(len(places), width)
                columns[layer, row] -= len(places) - claimed
                columns[layer, row, :count] = torch.tensor([block for _, block in places[:count]])
                offsets[layer, row, :count] = bases[[owner for owner, _ in places[:count]]]
                longer[layer, row] = (len(places) - claimed) * block_tokens
        self._columns = columns.clamp_(max=own_width - 1)  # what is cut lies behind all lengths
        self._offsets, self._longer = offsets, longer

    def block_tables(self, own: torch.Tensor) -> torch.Tensor:
        """[layer, request, block]; what lies behind a layer's length is of no meaning."""
        return own.expand(len(self._columns), -1, -1).gather(2, self._columns) + self._offsets

    def seq_lens(self, own: torch.Tensor) -> torch.Tensor:
        """[layer, request]"""
        return own + self._longer


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
        self._metadata: dict[str, object] = {}  # of this step's layers, for them to read
        self._trouble = ""
        self._exchanged: set[str] = set()
        self._tables: tuple[tuple, _Tables] | None = None  # of the last batch
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
        self._orders, self._by_layer, self._metadata, self._trouble = orders, {}, {}, ""
        self._exchanged.clear()

    @property
    def active(self) -> bool:
        return bool(self._orders)

    def exchange(self, name: str) -> None:
        """Before the layer's attention. Never raises."""
        if self._trouble:
            return
        try:
            if not self._metadata:
                for order in self._orders:
                    if problem := self.problems[order.slots.layout]:
                        raise ValueError(problem)
                from vllm.forward_context import get_forward_context

                self._by_layer = get_forward_context().attn_metadata
                self._metadata = self._prepare(self._by_layer)
            layer, metadata = self._layers[name], self._metadata[name]
            # Both together, since a table's numbers lie outside the layer's own cache; and not before, since until now
            # the layer has written this step's rows to its own pages.
            self._exchanged.add(name)
            if self._whole is not None:
                vars(layer)["kv_cache"] = self._whole
            self._by_layer[name] = metadata
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"

    def restore(self, name: str, kv_cache: torch.Tensor) -> None:
        """After the layer's attention."""
        if self._whole is not None and name in self._exchanged:
            vars(self._layers[name])["kv_cache"] = kv_cache

    def end_step(self) -> set[int]:
        """Blocks of the requests whose attention did not see what it should have."""
        orders, self._orders = self._orders, []
        why = self._trouble
        if not why and len(self._exchanged) < len(self._layers):
            why = f"{len(self._exchanged)} of {len(self._layers)} layers called"
        if not orders or not why:
            return set()
        log_once(logging.ERROR, "Kvern: requests that decode from ragged compact caches fail: %s.", why)
        if any(order.first_block < 0 for order in orders):
            return set(range(1, self._blocks))
        return {order.first_block for order in orders}

    def _prepare(self, by_layer) -> dict[str, object]:
        """The metadata of every layer."""
        if not isinstance(by_layer, dict):
            raise ValueError("vLLM runs the batch in parts")
        own = by_layer[next(iter(self._layers))]
        if type(own) is not self._class or any(by_layer[name] is not own for name in self._layers):
            raise ValueError("the layers do not share one CPUAttentionMetadata")
        if own.dynamic_causal is not None or own.causal is not True:
            raise ValueError("the attention is not causal")
        first_blocks, lengths = own.block_table[:, 0].tolist(), own.seq_lens.tolist()
        wanted = {order.first_block: order.slots for order in self._orders}
        slots = tuple(wanted.get(block) for block in first_blocks)
        found = [block for block in first_blocks if block in wanted]
        if len(found) != len(self._orders) or set(found) != wanted.keys():
            raise ValueError(f"{len(self._orders)} such requests are scheduled, {len(found)} are in the batch")
        size = self._block_tokens
        most = -(-max(lengths) // size) + max(max(each.pages, default=0) for each in wanted.values())
        key = (slots, -(-most // _WIDTH_STEP) * _WIDTH_STEP, own.block_table.shape[1])
        if self._tables is None or self._tables[0] != key:
            self._tables = key, _Tables(*key, self._bases, size, self._slot_pages)
        tables = self._tables[1]
        if any(length <= claimed * size for length, claimed in zip(lengths, tables.claimed)):
            raise ValueError("a request has no tokens after its cache")
        longest = max(lengths) + tables.longest * size
        return self._metadata_of(own, tables.block_tables(own.block_table), tables.seq_lens(own.seq_lens), longest)

    def _metadata_of(self, own, tables: torch.Tensor, seq_lens: torch.Tensor, longest: int) -> dict[str, object]:
        schedules: dict[tuple, torch.Tensor] = {}
        fields = vars(own)
        metadata = {}
        schedule_of = self._scheduler(own.query_start_loc)
        for (name, layer), table, lengths, key in zip(
            self._layers.items(), tables.unbind(0), seq_lens.unbind(0), map(tuple, seq_lens.tolist())
        ):
            schedule = schedules.get(key)
            if schedule is None:
                schedule = schedules[key] = schedule_of(layer, lengths)
            changed = self._class.__new__(self._class)
            vars(changed).update(fields)
            changed.kvern_own = own  # for those who look for requests by their blocks
            changed.block_table, changed.seq_lens = table, lengths
            changed.max_seq_len, changed.scheduler_metadata = longest, schedule
            metadata[name] = changed
        return metadata

    def _scheduler(self, query_start_loc: torch.Tensor):
        """Makes (layer, seq_lens) -> schedule, as CPUAttentionMetadataBuilder.build() has it made. What is the same for all
        layers is looked up once: a step may need one of each."""
        from vllm import _custom_ops, envs

        make, splits = _custom_ops.cpu_attn_get_scheduler_metadata, envs.VLLM_CPU_ATTN_SPLIT_KV
        dtype, cache_dtype = self._vllm_config.model_config.dtype, self._vllm_config.cache_config.cache_dtype
        kv_heads = self._heads

        def schedule(layer, seq_lens: torch.Tensor) -> torch.Tensor:
            return make(
                num_reqs=seq_lens.shape[0],
                num_heads=layer.num_heads,
                num_kv_heads=kv_heads,
                head_dim=layer.head_size,
                seq_lens=seq_lens,
                dtype=dtype,
                query_start_loc=query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=layer.isa,
                enable_kv_split=splits,
                dynamic_causal=None,
                kv_cache_dtype=cache_dtype,
            )

        return schedule

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
                self._whole, self._bases = None, torch.zeros_like(self._bases)
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
            scheduler_metadata=self._scheduler(starts)(layer, seq_lens),
        )
        by_layer = {each: metadata for each in self._layers}
        with torch.inference_mode(), run_step([RaggedOrder(1, slots)]):
            with set_forward_context(by_layer, self._vllm_config, slot_mapping={name: where}):
                found = layer(query.reshape(sum(news), -1), *(part.reshape(sum(news), -1) for part in new))
            if self._trouble or self._exchanged != {name}:
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
