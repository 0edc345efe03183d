"""Models of the end-to-end tests: the real small one, and random-weight ones with the shapes that it lacks.

All are seeded, so that two machines get the same weights, and kept under build/models.
"""

import fcntl
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / "build" / "models"
RANDOM_VOCABULARY = 2048

sys.path.insert(0, str(ROOT / "tools"))
from make_model import smollm2  # noqa: E402,F401


def _scale(model, seed: int) -> None:
    """Draws weights so large that greedy output wanders: with the usual small ones one token repeats for ever, and a
    wrong KV cache would not show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                continue
            fan_in = parameter.shape[-1]
            gain = 1.0 if "embed" in name else 1.5 / fan_in**0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)


def _make(name: str, seed: int, build) -> pathlib.Path:
    folder = MODELS / f"{name}-seed{seed}"
    MODELS.mkdir(parents=True, exist_ok=True)
    with open(MODELS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            model = build()
            _scale(model, seed)
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            partial.rename(folder)
    return folder


def _sizes(heads: int = 8, kv_heads: int = 4, **more) -> dict:
    """What a configuration says of four layers with heads of 64; more: changes and additions."""
    sizes = dict(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=heads * 64,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    return sizes | more


# Scalings of the rotation whose angles do not depend on the prompt's length.
ROTATIONS = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
    },
}


def random_llama(heads: int = 8, kv_heads: int = 4, seed: int = 1, rope: str | None = None) -> pathlib.Path:
    """Four layers, head_dim 64; divisible over two tensor-parallel ranks. rope: a key of ROTATIONS."""

    def build():
        from transformers import LlamaConfig, LlamaForCausalLM

        turns = {"rope_parameters": ROTATIONS[rope]} if rope else {}
        return LlamaForCausalLM(LlamaConfig(**_sizes(heads, kv_heads, **turns)))

    return _make(f"llama-{heads}q{kv_heads}kv{f'-{rope}' if rope else ''}", seed, build)


def random_gemma3(seed: int = 1) -> pathlib.Path:
    """Six layers, five of them with a sliding window of 128 tokens: six KV-cache groups in one memory."""

    def build():
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                **_sizes(4, 2, num_hidden_layers=6),
                query_pre_attn_scalar=64,
                sliding_window=128,
                layer_types=["sliding_attention"] * 5 + ["full_attention"],
            )
        )

    return _make("gemma3-window128", seed, build)


def kv_heavy(seed: int = 1) -> pathlib.Path:
    """Little to compute and much to keep: 16 KB of KV for a token in bf16, as many KV heads as query heads."""

    def build():
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**_sizes(16, 16, hidden_size=512, max_position_embeddings=32768)))

    return _make("llama-kv-heavy", seed, build)


def retrained(model: pathlib.Path, seed: int) -> pathlib.Path:
    """A copy of a checkpoint whose weights differ a little, as after more training; everything else is the same."""
    folder = model.with_name(f"{model.name}-retrained{seed}")
    with open(MODELS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            import torch
            from safetensors.torch import load_file, save_file

            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(model, partial)
            generator = torch.Generator().manual_seed(seed)
            for path in partial.glob("*.safetensors"):
                tensors = load_file(path)
                for name, tensor in tensors.items():
                    if tensor.dim() > 1:
                        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.05
                        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
                save_file(tensors, path, metadata={"format": "pt"})
            partial.rename(folder)
    return folder


# Architectures that turn their keys each in a way of its own: class of the configuration and of the model in transformers,
# and what the configuration says beside the sizes.
ARCHITECTURES = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),  # scales keys before they are turned
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),  # turns a part of each
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"partial_rotary_factor": 0.5}),  # and neighbouring pairs
    "cohere": ("CohereConfig", "CohereForCausalLM", {"tie_word_embeddings": True}),  # neighbouring pairs
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),  # turns nothing in every fourth layer
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {}),  # scales keys after they were turned
}


def random_of(architecture: str, seed: int = 1) -> pathlib.Path:
    """Four layers of eight query and four KV heads of 64."""

    def build():
        import torch
        import transformers

        config, model, more = ARCHITECTURES[architecture]
        settings = _sizes(pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 and "norm" in name:  # no two alike, as in trained models
                parameter.data.copy_(torch.linspace(0.5, 1.5, len(parameter)))
        return made

    return _make(architecture, seed, build)
