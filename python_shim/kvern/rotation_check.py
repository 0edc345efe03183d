"""Whether the model turns its keys as the daemon believes that it does.

The slots of a compact cache stand elsewhere than their tokens did in the prompt, and the daemon turns their keys to where
they stand, by the fact `rotation`. That is read from the model's configuration, which does not tell all: there are layers
that turn nothing, models that scale their keys after they were turned, weights whose pairs come in another order. So each
worker runs the model at its start, twice on the same few tokens at different positions, and compares the keys that the
attention layers are given. Attention itself is left out: hidden states are the same in both passes then, and keys differ by
the rotation alone.
"""

import dataclasses
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
# By others than these, and none, no daemon moves keys. The native binding knows that, too, but one rank may be without it.
_RUN_SCALINGS = ("linear", "llama3", "yarn")


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


@dataclasses.dataclass
class Observed:
    """Keys that the attention layers were given, [token, head, dim] by layer, of the same tokens at two sets of positions;
    moves: by how many positions each of them moved. problem: why there are none. rotation: the fact."""

    rotation: str = ""
    dtype: torch.dtype | None = None  # the model's
    before: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    after: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    moves: torch.Tensor | None = None
    problem: str = ""


def observe(model, layers: dict, rotation: str, vllm_config) -> Observed:
    """Runs the model. Its ranks do that together: all of them must call this with the same facts, whatever else has befallen
    one of them. layers: vLLM's attention layers by name, all that the compact caches have. Never raises."""
    try:
        _look_for_obstacles(model, layers, rotation, vllm_config)
        first = torch.arange(0, _TOKENS * _FIRST_STEP, _FIRST_STEP)
        room = vllm_config.model_config.max_model_len - int(first[-1]) - 1
        shifts = [shift for shift in _SHIFTS if shift <= room]
        if not shifts:
            raise _NotRun(f"max_model_len is below {int(first[-1]) + 1 + _SHIFTS[0]}")
        moves = torch.tensor([shifts[i % len(shifts)] for i in range(_TOKENS)])
        inputs = _make_inputs(model, vllm_config)
        before, after = (_keys(model, layers, inputs, at, vllm_config) for at in (first, first + moves))
        return Observed(rotation, vllm_config.model_config.dtype, before, after, moves)
    except Exception as error:
        return Observed(rotation, problem=str(error) if isinstance(error, _NotRun) else f"{type(error).__name__}: {error}")


def _look_for_obstacles(model, layers: dict, rotation: str, vllm_config) -> None:
    scaling = dict(part.split("=", 1) for part in rotation.split(",") if part).get("scaling", "linear")
    if not rotation or scaling not in _RUN_SCALINGS:
        raise _NotRun("no such keys can be moved")
    if model is None:
        raise _NotRun("vLLM's model runner is not known")
    for name, layer in layers.items():
        if getattr(getattr(layer, "impl", None), "forward", None) is None:
            raise _NotRun(f"vLLM shows no attention implementation of layer {name}")
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and getattr(parallel, "is_moe_model", None) is not False:
        raise _NotRun("experts are shared by engines that do not start at once")
    if getattr(vllm_config, "lora_config", None) is not None:
        raise _NotRun("the model cannot be run before its adapters are set up")


def _make_inputs(model, vllm_config) -> dict:
    config = vllm_config.model_config
    device = next(model.parameters()).device
    tokens = torch.arange(1, 1 + 7 * _TOKENS, 7, dtype=torch.int32, device=device)
    inputs = {"input_ids": tokens % config.get_vocab_size()}
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        from vllm.distributed.parallel_state import get_pp_group

        if not get_pp_group().is_first_rank:
            between = model.make_empty_intermediate_tensors(_TOKENS, config.dtype, device)
            random = torch.Generator(device=device).manual_seed(1)
            for tensor in between.tensors.values():
                tensor.normal_(generator=random)
            inputs["intermediate_tensors"] = between
    return inputs


def _keys(model, layers: dict, inputs: dict, positions: torch.Tensor, vllm_config) -> dict[str, torch.Tensor]:
    from vllm.forward_context import set_forward_context

    seen: dict[str, torch.Tensor] = {}

    def instead_of(name: str):
        def forward(layer, query, key, value, kv_cache, attn_metadata, output=None, *_, **__):
            seen[name] = key.detach().reshape(_TOKENS, layer.num_kv_heads, -1).to("cpu", torch.float64)
            return torch.zeros_like(query) if output is None else output.zero_()

        return forward

    eager = {"skip_compiled": True} if "skip_compiled" in inspect.signature(set_forward_context).parameters else {}
    for name, layer in layers.items():
        layer.impl.forward = instead_of(name)
    try:
        with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=_TOKENS, **eager):
            model(positions=positions.to(inputs["input_ids"].device), **inputs)
    finally:
        for layer in layers.values():
            del layer.impl.forward  # the class's own is back
    if missing := [name for name in layers if name not in seen]:
        raise _NotRun(f"layer {missing[0]} was not given its keys")
    return seen


class RotationCheck:
    """problem: why the daemon cannot move this model's keys; empty when it can. certain: the keys have been seen to turn
    otherwise, or cannot be turned by any rotation that the daemon knows."""

    def __init__(self, observed: Observed, frequencies):
        """frequencies: of the native binding."""
        self.problem, self.certain = "", True
        if not observed.rotation:
            self.problem = "this model does not turn its keys, or it is not known how"
            return
        try:
            interleaved, turns = frequencies(observed.rotation)
        except ValueError as error:
            self.problem = str(error)
            return
        if observed.problem:
            self.problem, self.certain = f"it could not be tested how the model turns its keys ({observed.problem})", False
            return
        angles = observed.moves[:, None, None] * torch.tensor(turns, dtype=torch.float64)
        tolerance = _TOLERANCE.get(observed.dtype, _TOLERANCE_16_BIT)
        for name, before in observed.before.items():
            error = _largest_error(before, observed.after[name], angles, interleaved)
            if not error <= tolerance:  # NaN is none
                self.problem = (
                    f"layer {name} does not turn its keys as the model's configuration says, which would put the slots of a "
                    f"compact cache at wrong distances (off by {error:.2g} of a pair's size)"
                )
                return

    @property
    def refusal(self) -> str:
        """The problem, and what an operator can do about it."""
        return self.problem if self.certain else f"{self.problem}; kvern.trust_rotation makes compact caches all the same"

    def log(self) -> None:
        if self.problem:
            log_once(logging.WARNING, "Kvern: compact caches are refused: %s.", self.refusal)
        else:
            log_once(logging.INFO, "Kvern: the model turns its keys as its configuration says (self-test passed).")


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
