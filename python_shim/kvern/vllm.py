"""KvernConnector: vLLM's way into the store.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvernConnector", "kv_connector_module_path": "kvern.vllm",
                                            "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

The class only sorts vLLM's calls to the two halves, scheduler_side and worker_side. No callback blocks, none raises.
"""

import contextlib
import logging
import os
import socket
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvern import compactions, compat, groups, identity, rotation_check
from kvern.config import OptionError, Options
from kvern.groups import Geometry, Refused
from kvern.guard import guarded, log_once, logger
from kvern.metadata import KvernMetadata
from kvern.ragged_attention import RaggedAttention
from kvern.scheduler_side import SchedulerSide
from kvern.stats import KvernPromMetrics, KvernStats
from kvern.worker_side import WorkerSide

__all__ = ["KvernConnector"]


class KvernConnector(KVConnectorBase_V1, compat.SupportsHMA):
    if compat.HIT_SOURCE is not None:
        _cache_hit_source = compat.HIT_SOURCE

    def __init__(self, vllm_config, role, kv_cache_config):
        """Throws OptionError for options that make no sense; every other trouble leaves the engine without the store."""
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.errors = 0
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._ragged: RaggedAttention | None = None  # in steps that run requests with ragged compact caches
        options = Options.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        geometry, refusal = None, ""
        try:
            self._engine = self._attributes(vllm_config)
            geometry = groups.analyse(vllm_config, kv_cache_config)
            if len(geometry.groups) > 1 and not compat.HAS_TRANSFER_RESULTS:
                raise Refused("this vLLM cannot be told of failed loads of a model with several KV-cache groups")
            if role == KVConnectorRole.SCHEDULER:
                self._scheduler = self._make_scheduler_side(vllm_config, kv_cache_config, geometry, options)
            else:
                self._worker = self._make_worker_side(geometry, options)
        except OptionError:
            raise
        except Refused as error:
            refusal = str(error)
            log_once(logging.WARNING, "Kvern: this engine runs without the store: %s.", refusal)
        except Exception as error:
            refusal = f"set-up failed ({error})"
            logger.exception("Kvern: set-up failed; this engine runs without the store.")
        if refusal and geometry is not None and role == KVConnectorRole.WORKER:
            # The scheduler side may have come up all the same: its orders must be answered.
            self._worker = WorkerSide(geometry, options, None, None, *self._ranks(geometry), refusal=refusal)

    @staticmethod
    def _attributes(vllm_config) -> dict[str, str]:
        """What `kvernctl status` and `doctor` want to know of this engine."""
        facts = {
            "vllm": compat.VLLM_VERSION,
            "model": getattr(vllm_config.model_config, "model", ""),
            "kv_load_failure_policy": getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "recompute"),
            "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        }
        return {name: str(value) for name, value in facts.items()}

    def _connect(self, options: Options, scheduler: bool):
        from kvern import _kvern as native
        from kvern import embedded

        address = options.address or embedded.start_or_join(options)
        client = native.Client(
            address,
            scheduler=scheduler,
            client_name=f"{socket.gethostname()}:{os.getpid()}",
            attributes=self._engine,
            data_plane=options.data_plane,
            server_key_file=options.server_key_file,
            client_key_file=options.client_key_file,
            insecure=options.insecure,
            profiles=options.profiles,
            staging_bytes=options.staging,
            connect_timeout_ms=options.connect_timeout_ms,
            call_timeout_ms=options.call_timeout_ms,
        )
        return native, client

    def _make_scheduler_side(self, vllm_config, kv_cache_config, geometry: Geometry, options: Options) -> SchedulerSide:
        transfer = vllm_config.kv_transfer_config
        if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
            log_once(
                logging.WARNING,
                "Kvern: kv_load_failure_policy is %r, so a load that fails fails its request. Set it to 'recompute', unless"
                " you decode from compact caches with a budget for each layer.",
                transfer.kv_load_failure_policy,
            )
        weights = identity.weights_fingerprint(vllm_config, options.weights)
        if options.compact:
            from kvern import _kvern

            try:
                _kvern.compaction_plan(options.compact, vllm_config.model_config.max_model_len)
            except ValueError as error:
                raise OptionError(f"kvern.compact is {options.compact!r}: {error}.") from None
        native, client = self._connect(options, scheduler=True)
        matcher = native.PrefixMatcher(
            client,
            block_tokens=geometry.block_tokens,
            chunk_blocks=geometry.chunk_blocks,
            groups=[(group.index, group.window) for group in geometry.groups],
            remote_deadline_ms=options.match_timeout_ms,
            prefetch_deadline_ms=options.prefetch_timeout_ms,
        )
        return SchedulerSide(
            vllm_config,
            geometry,
            options,
            client,
            matcher,
            weights,
            hash_block_tokens=compat.hash_block_tokens(vllm_config, kv_cache_config, geometry.block_tokens),
            plan_compaction=native.compaction_plan,
            connectors_before=compat.connectors_before(),
        )

    def _make_worker_side(self, geometry: Geometry, options: Options) -> WorkerSide:
        native, client = self._connect(options, scheduler=False)
        return WorkerSide(geometry, options, native, client, *self._ranks(geometry))

    @staticmethod
    def _ranks(geometry: Geometry) -> tuple[int, int]:
        """(tensor-parallel rank, pipeline-parallel rank); parallel_config.rank is 0 in every worker."""
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank(), get_pp_group().rank_in_group if geometry.pipeline_parallel > 1 else 0

    # ---------------------------------------------------------------- what kind of connector this is

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None):
        return KvernStats(data)

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return KvernPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_kv_connector_stats(self):
        side = self._scheduler or self._worker
        return side.take_stats() if side is not None else None

    def shutdown(self) -> None:
        side = self._scheduler or self._worker
        if side is not None:
            side.shutdown()

    # ---------------------------------------------------------------- scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return compactions.nothing_found(request, "this engine runs without the store")
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def get_external_cache_hit_sources(self, request, num_external_tokens: int) -> dict:
        return {compat.HIT_SOURCE: num_external_tokens} if num_external_tokens and compat.HIT_SOURCE else {}

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> KvernMetadata:
        return self._scheduler.build_connector_meta(scheduler_output) if self._scheduler is not None else KvernMetadata()

    def update_connector_output(self, connector_output) -> None:
        if self._scheduler is not None:
            self._scheduler.update_connector_output(connector_output)

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.request_finished(request, block_ids) if self._scheduler is not None else (False, None)

    def take_events(self):
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_pending_push_work()

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_pending_block_frees()

    def reset_cache(self) -> bool:
        return self._scheduler is None or self._scheduler.reset_cache()

    # ---------------------------------------------------------------- worker side

    def register_kv_caches(self, kv_caches: dict) -> None:
        if self._worker is not None:
            layers = getattr(self._vllm_config.compilation_config, "static_forward_context", {})
            # First: the ranks run the model together, and one of them may fail at what follows.
            observed = self._observe_rotation(layers)
            self._worker.register_kv_caches(kv_caches, layers, self._vllm_config)
            self._worker.test_ragged(self._step_with)
            self._worker.test_rotation(observed)

    @guarded(rotation_check.Observed())
    def _observe_rotation(self, layers: dict) -> rotation_check.Observed:
        group = self._worker.rotated_group
        if group is None:
            return rotation_check.Observed()
        rotation = identity.rotation_of(self._vllm_config.model_config, group.key_dim)
        wanted = {name: layers.get(name) for name in group.layer_names}
        return rotation_check.observe(rotation_check.engine_model(), wanted, rotation, self._vllm_config)

    @contextlib.contextmanager
    def _step_with(self, ragged):
        self.bind_connector_metadata(KvernMetadata(ragged=ragged))
        try:
            yield
        finally:
            self.bind_connector_metadata(KvernMetadata())
            super().clear_connector_metadata()

    def bind_connector_metadata(self, connector_metadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.bind(connector_metadata)
            self._ragged = self._worker.ragged

    def clear_connector_metadata(self) -> None:
        if self._worker is not None:
            self._worker.submit_stores()  # some steps end without wait_for_save
        super().clear_connector_metadata()

    @guarded()
    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.submit_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All loads are asynchronous: no layer ever waits. But this runs right before a layer's attention."""
        if self._ragged is not None:
            self._ragged.exchange(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Whole chunks are stored after the forward pass."""
        if self._ragged is not None:
            self._ragged.restore(layer_name, kv_layer)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.submit_stores()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, _ = self._take_transfers(finished_req_ids)
        return None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]):
        received, failed = self._take_transfers(finished_req_ids)
        return compat.TransferResults(finished_recving=received, failed_recving=failed)

    def _take_transfers(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        if self._worker is None:
            return set(), set()
        self._worker.requests_ended(finished_req_ids)
        self._worker.poll()
        return self._worker.take_transfers()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self):
        return self._worker.take_report() if self._worker is not None else None


def _register() -> None:
    """MultiConnector looks the class up by its name when it puts the connectors' stats together, and finds only names
    that are registered, however the class was loaded."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if KvernConnector.__name__ not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(KvernConnector.__name__, __name__, KvernConnector.__name__)


try:
    _register()
except Exception:  # another vLLM: only the stats beside other connectors need it
    logger.debug("Kvern: cannot register with vLLM's connector factory.", exc_info=True)
