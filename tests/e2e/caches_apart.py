"""A connector for engines whose layers' caches are allocations of their own, as vLLM versions before one storage for all
layers had them."""

import torch

from kvern.vllm import KvernConnector


class CachesApart(KvernConnector):
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        apart = {name: cache.clone() for name, cache in kv_caches.items()}
        for name, cache in apart.items():
            layers[name].kv_cache = cache
        super().register_kv_caches(apart)
