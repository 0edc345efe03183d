"""Whether the model turns its keys as the daemon believes that it does.

The slots of a compact cache stand elsewhere than their tokens did in the prompt, and the daemon turns their keys to where
they stand, by the fact `rotation`. That is read from the model's configuration, which does not tell all: there are layers
that turn nothing, models that scale their keys after they were turned, weights whose pairs come in another order. So each
worker runs the model at its start, twice on the same few tokens at different positions, and compares the keys that the
attention layers are given. Attention itself is left out: hidden states are the same in both passes then, and keys differ by
the rotation alone.
"""

import inspect
import logging

import torch

from kvern.guard import log_once

_TOKENS = 16
_SHIFTS = (1, 5, 33, 257, 2049, 4096)  # positions; the long ones tell how slow pairs turn
_FIRST_STEP = 3  # positions between the tokens of the first pass
# Of a pair's error, over its size: where vLLM keeps cosines and sines in 16 bits they are off by up to 0.4 %.
_TOLERANCE = {torch.float32: 0.01}
_TOLERANCE_16_BIT = 0.05


class _NotRun(Exception):
    """The model could not be run, for the reason that the text gives."""


def engine_model():
    """The model of the runner on whose behalf the caller was called; None if there is none among its callers."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if callable(getattr(type(caller), "get_model", None)):
            return caller.get_model()
        frame = frame.f_back
    return None


class RotationCheck:
    """One worker's. problem: why the daemon cannot move this model's keys; empty when it can. certain: the keys have been
    seen to turn otherwise, or cannot be turned by any rotation that the daemon knows."""

    def __init__(self, model, layers: dict, rotation: str, frequencies, vllm_config, pipeline_parallel: int = 1):
        """layers: vLLM's attention layers by name, all that the compact caches have. rotation: the fact. frequencies: of the
        native binding."""
        self.problem, self.certain = "", False
        if not rotation:
            return  # the daemon has no way to move the keys, and says so
        try:
            interleaved, turns = frequencies(rotation)
        except ValueError as error:
            self.problem, self.certain = str(error), True
            return
        try:
            if model is None:
                raise _NotRun("vLLM's model runner is not known")
            for name, layer in layers.items():
                if getattr(getattr(layer, "impl", None), "forward", None) is None:
                    raise _NotRun(f"vLLM shows no attention implementation of layer {name}")
            self._model, self._layers, self._vllm_config = model, layers, vllm_config
            self._inputs = self._make_inputs(pipeline_parallel)
            self.problem = self._compare(interleaved, torch.tensor(turns, dtype=torch.float64))
            self.certain = bool(self.problem)
        except Exception as error:
            what = str(error) if isinstance(error, _NotRun) else f"{type(error).__name__}: {error}"
            self.problem = f"it could not be tested how the model turns its keys ({what})"

    def log(self) -> None:
        if self.problem:
            log_once(logging.WARNING, "Kvern: compact caches are refused: %s.", self.problem)
        else:
            log_once(logging.INFO, "Kvern: the model turns its keys as its configuration says (self-test passed).")

    def _make_inputs(self, pipeline_parallel: int) -> dict:
        config = self._vllm_config
        parallel = config.parallel_config
        if parallel.data_parallel_size > 1 and getattr(config.model_config, "is_moe", False):
            raise _NotRun("experts are shared by engines that do not start at once")
        first = next(self._model.parameters())
        self._device = first.device
        tokens = torch.arange(1, 1 + 7 * _TOKENS, 7, dtype=torch.int32, device=self._device)
        inputs = {"input_ids": tokens % config.model_config.get_vocab_size()}
        if pipeline_parallel > 1:
            from vllm.distributed.parallel_state import get_pp_group

            if not get_pp_group().is_first_rank:
                between = self._model.make_empty_intermediate_tensors(_TOKENS, config.model_config.dtype, self._device)
                random = torch.Generator(device=self._device).manual_seed(1)
                for tensor in between.tensors.values():
                    tensor.normal_(generator=random)
                inputs["intermediate_tensors"] = between
        return inputs

    def _keys(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """layer -> [token, head, dim]"""
        from vllm.forward_context import set_forward_context

        seen: dict[str, torch.Tensor] = {}

        def instead_of(name: str):
            def forward(layer, query, key, value, kv_cache, attn_metadata, output=None, *_, **__):
                seen[name] = key.detach().reshape(_TOKENS, layer.num_kv_heads, -1).to("cpu", torch.float64)
                return torch.zeros_like(query) if output is None else output.zero_()

            return forward

        eager = {"skip_compiled": True} if "skip_compiled" in inspect.signature(set_forward_context).parameters else {}
        for name, layer in self._layers.items():
            layer.impl.forward = instead_of(name)
        try:
            with torch.inference_mode(), set_forward_context(None, self._vllm_config, num_tokens=_TOKENS, **eager):
                self._model(positions=positions.to(self._device), **self._inputs)
        finally:
            for layer in self._layers.values():
                del layer.impl.forward  # the class's own is back
        if missing := [name for name in self._layers if name not in seen]:
            raise _NotRun(f"layer {missing[0]} was not given its keys")
        return seen

    def _compare(self, interleaved: bool, frequencies: torch.Tensor) -> str:
        first = torch.arange(0, _TOKENS * _FIRST_STEP, _FIRST_STEP)
        room = self._vllm_config.model_config.max_model_len - int(first[-1]) - 1
        shifts = [shift for shift in _SHIFTS if shift <= room]
        if not shifts:
            raise _NotRun(f"max_model_len is below {int(first[-1]) + 1 + _SHIFTS[0]}")
        moves = torch.tensor([shifts[i % len(shifts)] for i in range(_TOKENS)])
        before, after = self._keys(first), self._keys(first + moves)
        angles = moves[:, None, None] * frequencies
        tolerance = _TOLERANCE.get(self._vllm_config.model_config.dtype, _TOLERANCE_16_BIT)
        for name in self._layers:
            error = _largest_error(before[name], after[name], angles, interleaved)
            if not error <= tolerance:  # NaN is none
                return (
                    f"layer {name} does not turn its keys as the model's configuration says, which would put the slots of a "
                    f"compact cache at wrong distances (off by {error:.2g} of a pair's size)"
                )
        return ""


def _largest_error(before: torch.Tensor, after: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> float:
    """Of any pair, or element that is not turned, over its size; root mean squares over tokens and heads. before, after:
    [token, head, dim]; angles: [token, 1, pair]."""
    pairs = angles.shape[-1]
    if 2 * pairs > before.shape[-1]:
        return float("inf")
    firsts = torch.arange(0, 2 * pairs, 2) if interleaved else torch.arange(pairs)
    seconds = firsts + (1 if interleaved else pairs)
    (x, y), (u, v) = ((keys[..., firsts], keys[..., seconds]) for keys in (before, after))
    cosines, sines = angles.cos(), angles.sin()
    errors = (x * cosines - y * sines - u).square() + (x * sines + y * cosines - v).square()
    rest, rest_after = before[..., 2 * pairs :], after[..., 2 * pairs :]
    errors = torch.cat((errors, (rest - rest_after).square()), dim=-1).sum((0, 1))
    sizes = torch.cat((u.square() + v.square(), rest_after.square()), dim=-1).sum((0, 1))
    # Pairs that are next to nothing beside the others tell nothing, but must not turn into something.
    floor = 1e-8 * sizes.max() + torch.finfo(torch.float64).tiny
    return float((errors / sizes.clamp(min=floor)).sqrt().max())
