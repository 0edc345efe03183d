"""One vLLM engine in a process of its own, driven by JSON lines; tests/e2e/engine.py is the other end.

Commands come on standard input, answers leave on the file descriptor KVERN_E2E_REPLY_FD; standard output and error are
left to vLLM's log. An exception in a command is answered as {"error": ...} and ends nothing.
"""

import hashlib
import json
import os
import sys
import time
import traceback


class EngineProcess:
    def __init__(self, model: str, args: dict):
        from vllm import LLM

        self.llm = LLM(model=model, **args)
        self.engine = self.llm.llm_engine
        self.requests = {}

    # ---- the engine's inside; only there when everything runs in this one process

    @property
    def core(self):
        return self.engine.engine_core.engine_core

    @property
    def in_process(self) -> bool:
        return hasattr(self.engine.engine_core, "engine_core")

    def _pages(self):
        """Yields (group id, layer name, registered KV tensor)."""
        core = self.core
        layers = core.vllm_config.compilation_config.static_forward_context
        for group_id, group in enumerate(core.scheduler.kv_cache_config.kv_cache_groups):
            for name in group.layer_names:
                tensor = layers[name].kv_cache
                yield group_id, name, tensor[0] if isinstance(tensor, (list, tuple)) else tensor

    # ---- commands

    def submit(self, requests: list[dict]):
        """Adds requests without running a step."""
        from vllm import SamplingParams

        for request in requests:
            name = request["name"]
            prompt = {"prompt_token_ids": request["prompt"]}
            if request.get("salt"):
                prompt["cache_salt"] = request["salt"]
            extra = {}
            if request.get("kv_transfer_params"):
                extra["extra_args"] = {"kv_transfer_params": request["kv_transfer_params"]}
            parameters = SamplingParams(
                temperature=0.0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=request.get("logprobs", 5),
                skip_reading_prefix_cache=request.get("skip_reading_prefix_cache"),
                prompt_logprobs=request.get("prompt_logprobs"),
                **extra,
            )
            self.requests[name] = {"name": name, "start": time.monotonic(), "first": None, "output": None}
            self.engine.add_request(name, prompt, parameters, trace_headers=request.get("trace_headers"))

    def _step(self) -> None:
        outputs = self.engine.step()
        now = time.monotonic()
        for output in outputs:
            request = self.requests[output.request_id]
            request["output"] = output
            if request["first"] is None and output.outputs[0].token_ids:
                request["first"] = now - request["start"]

    def _done(self, name: str) -> bool:
        output = self.requests[name]["output"]
        return output is not None and output.finished

    def run(self, names: list[str], max_steps: int | None = None, until_status: str | None = None):
        """Steps until the named requests are finished, one of them has the given status, or max_steps are done.
        Returns the number of steps."""
        steps = 0
        while not all(self._done(name) for name in names):
            if max_steps is not None and steps >= max_steps:
                break
            if until_status is not None and until_status in self.status(names).values():
                break
            self._step()
            steps += 1
        return steps

    def run_until_token(self, name: str):
        """Steps until the request has generated a token."""
        while self.requests[name]["first"] is None and not self._done(name):
            self._step()

    def preempt_all(self):
        """As a reset for new weights does it: running requests lose their blocks and are scheduled again."""
        assert self.core.scheduler.reset_prefix_cache(reset_running_requests=True)

    def status(self, names: list[str]) -> dict:
        """The scheduler's status of each request that it still knows."""
        found = {}
        for request_id, request in self.core.scheduler.requests.items():
            name = request_id.rsplit("-", 1)[0]
            if name in names:
                found[name] = request.status.name
        return found

    def abort(self, names: list[str]):
        self.engine.abort_request(names)

    def forget(self, names: list[str]):
        """Drops requests that will never be collected (aborted ones)."""
        for name in names:
            self.requests.pop(name, None)

    def collect(self, names: list[str]) -> list[dict]:
        answers = []
        for name in names:
            request = self.requests.pop(name)
            output = request["output"]
            completion = output.outputs[0]
            answers.append(
                {
                    "name": name,
                    "tokens": list(completion.token_ids),
                    "logprobs": [
                        sorted((token, value.logprob) for token, value in position.items())
                        for position in completion.logprobs or []
                    ],
                    "cached_tokens": output.num_cached_tokens,
                    "finish_reason": completion.finish_reason,
                    "kv_transfer_params": output.kv_transfer_params,
                    "ttft": request["first"],
                }
            )
        return answers

    def settle(self, limit: float) -> bool:
        """Steps until the engine has nothing to do any more, saves included. Only a server steps by itself."""
        if not self.in_process:
            return True
        deadline = time.monotonic() + limit
        while self.core.scheduler.has_requests():
            if time.monotonic() > deadline:
                return False
            self._step()
            time.sleep(0.001)
        return True

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        return bool(self.llm.reset_prefix_cache(reset_connector=reset_connector))

    def poison(self, value: float):
        """Overwrites all KV memory, so that whatever is read without having been loaded shows."""
        for _, _, tensor in self._pages():
            tensor.fill_(value)

    def page_digests(self) -> dict:
        """SHA-256 over the bytes of every page in vLLM's own prefix cache, by block hash and group, all layers of the
        group in order."""
        import torch

        layers = {}
        for group_id, _, tensor in self._pages():
            layers.setdefault(group_id, []).append(tensor)
        digests = {}
        for block in self.core.scheduler.kv_cache_manager.block_pool.blocks:
            key = block.block_hash
            if key is None:
                continue
            group_id = int.from_bytes(key[-4:], "big")
            digest = hashlib.sha256()
            for tensor in layers[group_id]:
                digest.update(tensor[block.block_id].contiguous().view(torch.uint8).numpy().tobytes())
            digests[f"{bytes(key[:-4]).hex()}/{group_id}"] = digest.hexdigest()
        return digests

    def watch_queries(self, rows: int):
        """From now on the last rows of what goes into each attention layer are kept, whatever the connector does."""
        import torch

        layers = self.core.vllm_config.compilation_config.static_forward_context
        self.watched = {}

        def keep(name):
            def hook(layer, inputs):
                query = inputs[0].detach().reshape(-1, layer.num_heads, layer.head_size).float()
                old = self.watched.get(name)
                self.watched[name] = (query if old is None else torch.cat([old, query]))[-rows:].clone()

            return hook

        for hook in getattr(self, "hooks", []):
            hook.remove()
        self.hooks = [layers[name].register_forward_pre_hook(keep(name)) for _, name, _ in self._pages()]

    def save_prompt(self, name: str, tokens: int, path: str):
        """Keys and values of a running request's first tokens, [layer, head, token, dim], and the watched queries,
        [layer, head, row, dim], for torch.load."""
        import torch

        (request_id,) = [key for key in self.core.scheduler.requests if key.rsplit("-", 1)[0] == name]
        (table,) = self.core.scheduler.kv_cache_manager.get_block_ids(request_id)
        layers = self.core.vllm_config.compilation_config.static_forward_context
        keys, values, queries = [], [], []
        for _, layer_name, tensor in self._pages():
            blocks = tensor[list(table)].float()  # [blocks, heads, block, K and V]
            count, heads, size, width = blocks.shape
            both = blocks.reshape(count, heads, 2, size * width // 2)
            key, value = both[:, :, 0], both[:, :, 1]
            if layers[layer_name].isa in ("vec", "vec16"):
                key = key.reshape(count, heads, width // 2, size).transpose(2, 3)
                value = value.reshape(count, heads, size, width // 2)
            else:
                assert layers[layer_name].isa == "amx", layers[layer_name].isa
                key = key.reshape(count, heads, size // 16, width // 4, 16, 2).permute(0, 1, 2, 4, 3, 5)
                value = value.reshape(count, heads, width // 32, size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
            for found, rows in ((keys, key), (values, value)):
                rows = rows.reshape(count, heads, size, width // 2).transpose(0, 1)
                found.append(rows.reshape(heads, count * size, width // 2)[:, :tokens].clone())
            if getattr(self, "watched", None):
                queries.append(self.watched[layer_name].transpose(0, 1))
        torch.save({"keys": torch.stack(keys), "values": torch.stack(values), "queries": queries}, path)

    def break_ragged_steps(self, broken: bool) -> bool:
        """While it is broken, the last layer's attention runs without having been given tables of its own. Says whether
        that layer was ever told to read outside its own cache while it was."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group
        from vllm.forward_context import get_forward_context

        connector = get_kv_transfer_group()
        last, cache = [(name, tensor) for _, name, tensor in self._pages()][-1]
        outside, self.told_outside = getattr(self, "told_outside", False), False
        vars(connector).pop("wait_for_layer_load", None)
        if broken:
            whole = connector.wait_for_layer_load

            def leave_out_last(name: str) -> None:
                if name != last:
                    return whole(name)
                metadata = get_forward_context().attn_metadata[name]
                pages = -(-metadata.seq_lens // cache.shape[2])
                read = [row[:count] for row, count in zip(metadata.block_table, pages)]
                self.told_outside |= any(int(row.max()) >= cache.shape[0] for row in read)

            connector.wait_for_layer_load = leave_out_last
        return outside

    def time_layers(self) -> list[float]:
        """Seconds that the connector's calls before and after the layers took in each step since the last call; the first
        call starts it."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        told, self.layer_seconds = getattr(self, "layer_seconds", None), []
        if told is not None:
            return told
        connector, clock = get_kv_transfer_group(), time.perf_counter
        first = next(name for _, name, _ in self._pages())

        def timed(call):
            def wrapper(name, *arguments, **named):
                if call is before and name == first:
                    self.layer_seconds.append(0.0)
                begin = clock()
                call(name, *arguments, **named)
                seconds = clock() - begin  # before anything else is looked up, which would be timed, too
                self.layer_seconds[-1] += seconds

            return wrapper

        before, after = connector.wait_for_layer_load, connector.save_kv_layer
        connector.wait_for_layer_load, connector.save_kv_layer = timed(before), timed(after)
        return []

    def free_blocks(self) -> int:
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def metrics(self) -> dict:
        values = {}
        for metric in self.llm.get_metrics():
            labels = ",".join(f"{k}={v}" for k, v in sorted(metric.labels.items()) if k not in ("engine", "model_name"))
            for field, ending in (("value", ""), ("count", ""), ("sum", "_sum")):
                if (value := getattr(metric, field, None)) is not None:
                    values[f"{metric.name}{ending}{{{labels}}}" if labels else f"{metric.name}{ending}"] = value
        return values

    def ping(self) -> str:
        return "pong"


def main() -> None:
    reply = os.fdopen(int(os.environ["KVERN_E2E_REPLY_FD"]), "w")

    def answer(value: dict) -> None:
        reply.write(json.dumps(value) + "\n")
        reply.flush()

    settings = json.loads(sys.stdin.readline())
    try:
        process = EngineProcess(settings["model"], settings["args"])
    except BaseException as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    answer({"result": None})
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("command")
        if name == "exit":
            break
        try:
            answer({"result": getattr(process, name)(**command)})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
    process.engine.engine_core.shutdown()
    answer({"result": None})


if __name__ == "__main__":
    main()
