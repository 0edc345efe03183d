"""Attention over compact caches whose layers keep different numbers of pages.

vLLM gives a request the same blocks in every layer. A ragged cache claims as many as its layers keep on average; what a
thick layer has too much lies in pages that thin layers leave free (kernels/page_pool.h). For the steps that run such
requests each layer gets a table of blocks and lengths of its own, through vLLM's own callback before each layer's
attention, and sees all layers' pages as one array. All tables are made at once, before the first layer; other steps run
vLLM's own. A self-test at start-up reads pages that lie so, with NaN in all others.

A request whose layers were not all given their tables must not be heard: its first block is reported as failed, which
ends it before its token is seen.
"""

import inspect
import logging
import math

import torch

from kvern.groups import Geometry
from kvern.guard import log_once
from kvern.metadata import RaggedOrder

# What the CPU backend's metadata must have; all but those that are replaced are the same for all layers.
_REPLACED = ("block_table", "seq_lens", "max_seq_len", "scheduler_metadata")
_WIDTH_STEP = 16  # blocks: tables are made anew only as often as a request has grown by so many
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Tables:
    """How the layers' tables follow from a batch's own. pages: of each request's layers, or None for those that have
    ordinary caches. width: columns of the layers' tables, own_width: of the batch's. Good for all batches of the same
    caches in the same order."""

    def __init__(self, pages: tuple, width: int, own_width: int, bases: torch.Tensor, block_tokens: int, pool_pages):
        layers = len(bases)
        self.claimed = [0] * len(pages)  # blocks of each request's cache
        self.longest = 0  # most blocks by which a layer's row is longer than the request's own
        columns = torch.arange(width).repeat(layers, len(pages), 1)
        offsets = bases[:, None, None].repeat(1, len(pages), width)
        longer = torch.zeros(layers, len(pages), dtype=torch.int32)
        for row, counts in enumerate(pages):
            if counts is None:
                continue
            if len(counts) != layers:
                raise ValueError(f"the cache has {len(counts)} layers, the model {layers}")
            claimed = self.claimed[row] = sum(counts) // layers
            self.longest = max(self.longest, max(counts) - claimed)
            for layer, places in enumerate(pool_pages(list(counts))):
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


class PagePool:
    """One worker's. problem says why it does not work on this engine; empty when it does."""

    def __init__(self, geometry: Geometry, kv_caches: dict, layers: dict, vllm_config, pool_pages):
        """layers: vLLM's attention layers by name. pool_pages: of the native binding. self_test() is to follow."""
        self._layers: dict[str, object] = {}
        self._blocks = 1
        self._orders: list[RaggedOrder] = []
        self._by_layer: dict[str, object] = {}  # what vLLM's layers read in this step
        self._metadata: dict[str, object] = {}  # of this step's layers, for them to read
        self._trouble = ""
        self._exchanged: set[str] = set()
        self._tables: tuple[tuple, _Tables] | None = None  # of the last batch
        self._pool_pages = pool_pages
        self._vllm_config = vllm_config
        try:
            self.problem = self._set_up(geometry, kv_caches, layers)
        except Exception as error:
            self.problem = f"its caches cannot be pooled ({type(error).__name__}: {error})"

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
        return self._see_as_one([kv_caches[name] for name in group.layer_names])

    def _see_as_one(self, caches: list[torch.Tensor]) -> str:
        first = min(caches, key=lambda cache: cache.storage_offset())
        stride = first.stride(0)
        for cache in caches:
            if cache.device.type != "cpu" or cache.shape != first.shape or cache.stride() != first.stride():
                return "the layers' caches differ in form"
            if cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                return "the layers' caches are separate allocations"
            if (cache.storage_offset() - first.storage_offset()) % stride:
                return "the layers' caches do not lie page by page"
        if first.shape[2] != self._block_tokens:
            return "a block has several pages"
        bases = [(cache.storage_offset() - first.storage_offset()) // stride for cache in caches]
        pages = max(bases) + first.shape[0]
        if pages >= 2**31:
            return "there are too many pages to be numbered"
        self._blocks = first.shape[0]
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
                if self.problem:
                    raise ValueError(self.problem)
                from vllm.forward_context import get_forward_context

                self._by_layer = get_forward_context().attn_metadata
                self._metadata = self._prepare(self._by_layer)
            layer, metadata = self._layers[name], self._metadata[name]
            # Both together, since a table's numbers lie outside the layer's own cache; and not before, since until now
            # the layer has written this step's rows to its own pages.
            self._exchanged.add(name)
            vars(layer)["kv_cache"], self._by_layer[name] = self._whole, metadata
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"

    def restore(self, name: str, kv_cache: torch.Tensor) -> None:
        """After the layer's attention."""
        if name in self._exchanged:
            vars(self._layers[name])["kv_cache"] = kv_cache

    def end_step(self) -> set[int]:
        """Blocks of the requests whose attention did not see what it should have."""
        orders, self._orders = self._orders, []
        why = self.problem or self._trouble
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
        wanted = {order.first_block: order.pages for order in self._orders}
        pages = tuple(wanted.get(block) for block in first_blocks)
        found = [block for block in first_blocks if block in wanted]
        if len(found) != len(self._orders) or set(found) != wanted.keys():
            raise ValueError(f"{len(self._orders)} such requests are scheduled, {len(found)} are in the batch")
        size = self._block_tokens
        most = -(-max(lengths) // size) + max(max(counts, default=0) for counts in wanted.values())
        key = (pages, -(-most // _WIDTH_STEP) * _WIDTH_STEP, own.block_table.shape[1])
        if self._tables is None or self._tables[0] != key:
            self._tables = key, _Tables(*key, self._bases, size, self._pool_pages)
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
        problem. To be called while nothing is in the caches."""
        if not self.problem:
            try:
                self.problem = self._test(run_step)
            except Exception as error:
                self.problem = f"the self-test failed ({type(error).__name__}: {error})"
        if self.problem:
            log_once(logging.INFO, "Kvern: compact caches give all layers the same budget here: %s.", self.problem)
        else:
            log_once(logging.INFO, "Kvern: compact caches may have a budget for each layer (pool, self-test passed).")

    def _test(self, run_step) -> str:
        """Two requests in the first layer, which borrows a page of the last, and in the last: one ragged of two blocks
        and five tokens more, one ordinary of three tokens. All pages that a layer does not read hold NaN."""
        names = list(self._layers)
        if len(names) < 2 or self._blocks < 5:
            return "a model of one layer has nothing to share" if len(names) < 2 else "the cache is too small to test"
        size = self._block_tokens
        pages = tuple(3 if name == names[0] else 1 if name == names[-1] else 2 for name in names)
        blocks = torch.tensor([[1, 2, 3], [4, 0, 0]], dtype=torch.int32)
        lengths, news = (2 * size + 5, 3), (5, 2)
        bases = self._bases.tolist()
        touched = [base + block for base in (bases[0], bases[-1]) for block in range(1, 5)]
        before = self._whole[touched].clone()
        try:
            for layer, kept in ((0, [(0, 1), (0, 2), (-1, 2)]), (-1, [(-1, 1)])):
                read = [bases[owner] + block for owner, block in kept]
                self._whole[touched] = math.nan
                self._whole[[*read, bases[layer] + 3, bases[layer] + 4]] = 0
                wrong = self._test_layer(run_step, names[layer], pages, blocks, lengths, news, read, bases[layer])
                if wrong:
                    return wrong
        finally:
            self._whole[touched] = before
        return ""

    def _test_layer(self, run_step, name, pages, blocks, lengths, news, read, base) -> str:
        from vllm.forward_context import set_forward_context

        layer, size = self._layers[name], self._block_tokens
        dtype = self._vllm_config.model_config.dtype
        random = torch.Generator().manual_seed(1)

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, layer.head_size, generator=random).to(dtype)

        def write(key, value, slots) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, self._whole, torch.tensor(slots))

        kept = [rows(len(read) * size, self._heads) for _ in range(2)]
        write(*kept, [page * size + i for page in read for i in range(size)])
        old = [rows(lengths[1] - news[1], self._heads) for _ in range(2)]
        write(*old, [(base + 4) * size + i for i in range(lengths[1] - news[1])])
        query = rows(sum(news), layer.num_heads)
        new = [rows(sum(news), self._heads) for _ in range(2)]
        slots = torch.tensor([3 * size + i for i in range(news[0])] + [4 * size + lengths[1] - news[1] + i for i in range(news[1])])
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.tensor([0, news[0], sum(news)], dtype=torch.int32)
        metadata = self._class(
            num_actual_tokens=sum(news),
            max_query_len=max(news),
            query_start_loc=starts,
            max_seq_len=max(lengths),
            seq_lens=seq_lens,
            block_table=blocks,
            slot_mapping=slots,
            scheduler_metadata=self._scheduler(starts)(layer, seq_lens),
        )
        by_layer = {each: metadata for each in self._layers}
        with torch.inference_mode(), run_step([RaggedOrder(1, pages)]):
            with set_forward_context(by_layer, self._vllm_config, slot_mapping={name: slots}):
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
