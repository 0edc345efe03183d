"""vLLM's real scheduler, block pool and prefix cache around a make-believe model, with the connector in between.

The model writes into each KV row a number that follows from all tokens up to there, and before each step it checks every
row that attention would read. A row that was not loaded, loaded wrongly, or overwritten too early fails the test.

With asynchronous=True steps overlap as they do on GPUs: a step is scheduled and handed to the workers before the scheduler
has seen what the one before it generated and what its workers reported; and the workers only queue the model's work, which
is done when the step's results are taken.
"""

import collections
import dataclasses
import json
import pathlib
import pickle
import types

import fake_native
import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

HEADS, DIM = 2, 4
MODULUS = 65521  # below 2^24: exact in float32


def write_checkpoint(folder: pathlib.Path, seed: int = 0, **changes) -> pathlib.Path:
    """A model folder as far as the connector looks into it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HEADS * DIM * 2,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS * 2,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(seed))
    return folder


def safetensors(seed: int) -> bytes:
    data = bytes((seed + i) % 256 for i in range(64))
    header = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def token_row(state: int, layer: int, head: int) -> torch.Tensor:
    return torch.tensor([float((state + layer * 7 + head * 13 + dim * 17) % MODULUS) for dim in range(2 * DIM)])


def query_row(state: int) -> torch.Tensor:
    return torch.tensor([[float((state + head * 3 + dim) % MODULUS) for dim in range(DIM)] for head in range(2 * HEADS)])


class AttentionImpl:
    """Of a make-believe layer, with the arguments of vLLM's own."""

    scale = DIM**-0.5

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
        return output


class AttentionLayer:
    """One rank's part of it."""

    head_size = DIM

    def __init__(self, ranks: int):
        self.num_heads, self.num_kv_heads = 2 * HEADS // ranks, HEADS // ranks
        self.impl = AttentionImpl()

    def __call__(self, query, key, value):
        return self.impl.forward(self, query.view(-1, self.num_heads, DIM), key, value, None, None, output=None)


class Model(torch.nn.Module):
    """What runs when the connector calls the model: one rank's layers, whose keys are turned as Llama's are. turns: layer
    number -> another function (keys [token, head, dim], positions) -> keys, or None where it turns nothing."""

    def __init__(self, layers: dict[str, AttentionLayer], turns: dict):
        super().__init__()
        self._layers, self._turns = layers, turns
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, positions):
        for number, layer in enumerate(self._layers.values()):
            random = torch.Generator().manual_seed(number)
            table = torch.randn(512, layer.num_kv_heads, DIM, generator=random)
            keys = self._turns.get(number, turned)(table[input_ids], positions)
            query = torch.zeros(len(input_ids), layer.num_heads * DIM)
            layer(query, keys, keys)


def turned(keys, positions, theta: float = 10000.0):
    angles = positions[:, None, None] * theta ** (-torch.arange(0, DIM, 2) / DIM)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()), dim=-1)


@dataclasses.dataclass
class Scheduled:
    """A request's part of a step: its tokens in [begin, end), and where their rows lie and what they must say."""

    request: Request
    begin: int
    end: int
    tables: tuple[list[int], ...]
    states: list[int]


class MiniEngine:
    def __init__(
        self,
        model: pathlib.Path,
        connector_class,
        *,
        blocks: int = 64,
        block_size: int = 32,
        windows: tuple[int, ...] = (0,),  # one group each; 0: full attention
        max_batched: int = 1024,
        ranks: int = 1,
        policy: str = "recompute",
        role: str = "kv_both",
        options: dict | None = None,
        events: bool = False,
        caching: bool = True,
        attention: bool = True,  # False: vLLM shows no attention layers
        turns: dict | None = None,  # see Model
        asynchronous: bool = False,
        set_rank=lambda rank: None,
        transfer: KVTransferConfig | None = None,
    ):
        self.asynchronous = asynchronous
        self._turns = turns or {}
        self.block_size = block_size
        self.windows = windows
        self.ranks = ranks
        heads = HEADS // ranks
        specs = []
        for window in windows:
            common = dict(block_size=block_size, num_kv_heads=heads, head_size=DIM, dtype=torch.float32)
            specs.append(SlidingWindowSpec(sliding_window=window, **common) if window else FullAttentionSpec(**common))
        self.layer_names = [[f"model.layers.{group}.attn"] for group in range(len(windows))]
        page = specs[0].page_size_bytes
        self.kv_cache_config = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[
                KVCacheTensor(size=page * blocks, layers=names, layer_stride=page * blocks, block_stride=page)
                for names in self.layer_names
            ],
            kv_cache_groups=[KVCacheGroupSpec(names, spec) for names, spec in zip(self.layer_names, specs)],
        )
        self.kv_cache_config.hash_block_size = block_size
        self.config = VllmConfig(
            model_config=ModelConfig(
                model=str(model), tokenizer=str(model), skip_tokenizer_init=True, dtype="float32", seed=0,
                max_model_len=2048,
            ),
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=caching),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=max_batched, max_num_seqs=8, max_model_len=2048, is_encoder_decoder=False,
                enable_chunked_prefill=True, async_scheduling=False,
            ),
            parallel_config=ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="uni")
            if ranks == 1
            else ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp"),
            device_config=DeviceConfig("cpu"),
            load_config=LoadConfig(),
            kv_transfer_config=transfer
            or KVTransferConfig(
                kv_connector=connector_class.__name__,
                kv_connector_module_path=connector_class.__module__,
                kv_role=role,
                kv_load_failure_policy=policy,
                kv_connector_extra_config={"kvern.address": "unix:///fake", **(options or {})},
            ),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=events, publisher="null"),
        )
        self.config.cache_config.num_gpu_blocks = blocks
        self.config.scheduler_config.async_scheduling = asynchronous  # vLLM's CPU platform turns it off
        self.attention: list[dict[str, AttentionLayer]] = []  # of each rank
        self.pages, self.workers = [], []
        self.stream = fake_native.TransferWorker.stream = fake_native.Stream()
        for rank in range(ranks):
            set_rank(rank)
            self.attention.append({names[0]: AttentionLayer(ranks) for names in self.layer_names} if attention else {})
            self.config.compilation_config.static_forward_context.update(self.attention[rank])
            # One storage for all groups: only block ids keep them apart.
            storage = torch.full((blocks, heads, block_size, 2 * DIM), float("nan"))
            self.pages.append(storage)
            worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self.kv_cache_config)
            worker.register_kv_caches({names[0]: storage for names in self.layer_names})
            self.workers.append(worker)
        hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(block_size, hash_fn)
        self.scheduler = self.config.scheduler_config.get_scheduler_cls()(
            self.config, self.kv_cache_config, StructuredOutputManager(self.config), block_size, block_size,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.aggregator = KVOutputAggregator.from_connector(self.connector, ranks)
        self.events: list = []  # as vLLM publishes them: its own and the connector's
        self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)
        self.steps = 0
        self._running: collections.deque = collections.deque()  # steps whose results the scheduler has not seen
        self._tokens: dict[str, list[int]] = {}  # request -> its tokens as the workers know them
        self.tells_failures_by_block = False  # as vLLM 0.29 does it
        self.numbers = 0
        self.compact_prompts: dict[str, list[int]] = {}  # handle -> the prompt that its cache was made of
        self.forwarded: dict[str, int] = {}  # request -> tokens that were computed rather than loaded
        self.finish_params: dict[str, dict | None] = {}

    def get_model(self) -> Model:
        """As vLLM's model runner has it, of the rank that is set up last."""
        return Model(self.attention[-1], self._turns)

    # ---------------------------------------------------------------- requests

    def add(self, prompt: list[int], max_tokens: int = 4, params: dict | None = None, **options) -> Request:
        extra = {"extra_args": {"kv_transfer_params": params}} if params is not None else {}
        self.numbers += 1
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, stop_token_ids=options.pop("stop_token_ids", None), **extra
        )
        if options.pop("skip_reading", False):
            sampling.skip_reading_prefix_cache = True
        sampling.prompt_logprobs = options.pop("prompt_logprobs", None)
        name = options.pop("request_id", f"r{self.numbers}")
        request = Request(
            name, list(prompt), sampling, None, block_hasher=self.hasher, **options
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def run(self, *requests: Request, limit: int = 2000) -> None:
        for _ in range(limit):
            if all(request.is_finished() for request in requests):
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps: {[request.status for request in requests]}")

    def settle(self, limit: int = 100) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests() and not self._running:
                return
            self.step()
        raise AssertionError("the engine never comes to rest")

    def generate(self, prompt: list[int], max_tokens: int = 4, **options) -> Request:
        request = self.add(prompt, max_tokens, **options)
        self.run(request)
        self.settle()
        return request

    def forget(self) -> None:
        """Empties vLLM's own prefix cache and the pages."""
        assert self.scheduler.reset_prefix_cache()
        for pages in self.pages:
            pages.fill_(float("nan"))

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    # ---------------------------------------------------------------- a step

    def step(self) -> None:
        """One turn of EngineCore.step() or, where steps overlap, of step_with_batch_queue()."""
        if self.scheduler.has_requests():
            output = self._launch()
            if len(self._running) < self.config.max_concurrent_batches and output.total_num_scheduled_tokens:
                return
        if self._running:
            self._take_results()

    def preempt_all(self, **options) -> bool:
        """vLLM can do it between steps alone: what runs is waited for."""
        while self._running:
            self._take_results()
        return self.scheduler.reset_prefix_cache(reset_running_requests=True, **options)

    def _take_results(self) -> None:
        output, result, batch = self._running.popleft()
        if self.asynchronous:
            self._forward(batch)
        for part in self.scheduler.update_from_output(output, result).values():
            for one in part.outputs:
                if one.finish_reason is not None:
                    self.finish_params[one.request_id] = one.kv_transfer_params

    def _launch(self):
        """Schedules a step and hands it to all ranks."""
        output = self.scheduler.schedule()
        self.steps += 1
        metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        batch = []
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            end = request.num_computed_tokens  # schedule() has already moved it on
            if request.num_tokens >= end:
                self._tokens[request_id] = list(request.all_token_ids)
            assert len(self._tokens[request_id]) >= end, f"{request_id}: a token is read before it is generated"
            tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            tables = tuple(list(table) for table in tables)
            batch.append(Scheduled(request, end - count, end, tables, self._states_of(request, end)))
            self.forwarded[request_id] = self.forwarded.get(request_id, 0) + count
        self.stream.queued += 1
        next_tokens = [
            [] if one.request.is_prefill_chunk else [self._next_token(one.request, one.end)] for one in batch
        ]
        for rank, worker in enumerate(self.workers):
            worker.handle_preemptions(metadata)
            worker.bind_connector_metadata(metadata)
            self._attend(rank, batch)
        if not self.asynchronous:
            self._forward(batch)
        outputs = [self._finish_rank_step(worker, output, batch, next_tokens) for worker in self.workers]
        result = outputs[0] if self.ranks == 1 else self.aggregator.aggregate(outputs)
        self._running.append((output, result, batch))
        return output

    def _finish_rank_step(self, worker, output, batch: list[Scheduled], next_tokens) -> ModelRunnerOutput:
        worker.start_load_kv(None)
        worker.wait_for_save()
        if self.tells_failures_by_block:
            sent, received = worker.get_finished(output.finished_req_ids)
            transfers = KVConnectorTransferResults(finished_sending=sent or set(), finished_recving=received or set())
        else:
            transfers = worker.get_transfer_results(output.finished_req_ids)
        connector_output = KVConnectorOutput(
            finished_sending=transfers.finished_sending or None,
            finished_recving=transfers.finished_recving or None,
            failed_recving=transfers.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
            kv_connector_worker_meta=pickle.loads(pickle.dumps(worker.build_connector_worker_meta())),
        )
        worker.clear_connector_metadata()
        ids = [one.request.request_id for one in batch]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=next_tokens,
            kv_connector_output=connector_output,
        )

    # ---------------------------------------------------------------- the model

    def _attend(self, rank: int, batch: list[Scheduled]) -> None:
        """Hands each layer the batch's queries as vLLM does: rows of all requests, in an order that nobody is told."""
        if not batch or not self.attention[rank]:
            return
        queries, starts, lengths, tables = [], [0], [], []
        for one in batch[::-1]:
            states = self._states(self._tokens[one.request.request_id][: one.end])
            queries += [query_row(state).chunk(self.ranks)[rank] for state in states[one.begin : one.end]]
            starts.append(len(queries))
            lengths.append(one.end)
            tables.append(one.tables[0])
        width = max(map(len, tables))
        metadata = types.SimpleNamespace(
            query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(lengths),
            block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        )
        for layer in self.attention[rank].values():
            layer.impl.forward(layer, torch.stack(queries), None, None, None, metadata, output=None)

    @staticmethod
    def _states(tokens) -> list[int]:
        states, state = [], 1
        for token in tokens:
            state = (state * 1000003 + token + 1) % (1 << 61)
            states.append(state)
        return states

    def _states_of(self, request: Request, end: int) -> list[int]:
        """What the rows of the request must say. Behind a handle they are the last of the prompt's own."""
        states = self._states(self._tokens[request.request_id][:end])
        prompt = self.compact_prompts.get(request.cache_salt)
        if prompt is not None:
            slots = int(request.cache_salt.split(".")[2])
            states[:slots] = self._states(prompt)[-slots:][:end]
        return states

    def _next_token(self, request: Request, end: int) -> int:
        tokens = self._tokens[request.request_id]
        token = self._states(tokens[:end])[-1] % 500
        if end == len(tokens):
            tokens.append(token)
        return token

    def _forward(self, batch: list[Scheduled]) -> None:
        """The model's work on a step's rows, in the pages of all ranks."""
        for rank, pages in enumerate(self.pages):
            for one in batch:
                for group, window in enumerate(self.windows):
                    self._compute(rank, pages, one, group, window)
        self.stream.advance()

    def _compute(self, rank: int, pages, one: Scheduled, group: int, window: int) -> None:
        table, name, size = one.tables[group], one.request.request_id, self.block_size
        first = max(0, one.begin - window + 1) if window else 0
        for head in range(pages.shape[1]):
            for position in range(first, one.begin):
                block = table[position // size]
                assert block != 0, f"{name}: position {position} of group {group} is in the null block"
                found = pages[block, head, position % size]
                wanted = token_row(one.states[position], group, rank * pages.shape[1] + head)
                assert torch.equal(found, wanted), (
                    f"{name}: wrong KV at position {position} of group {group}, block {block}: "
                    f"{found.tolist()} is not {wanted.tolist()}"
                )
            for position in range(one.begin, one.end):
                block = table[position // size]
                if block:
                    row = token_row(one.states[position], group, rank * pages.shape[1] + head)
                    pages[block, head, position % size] = row
