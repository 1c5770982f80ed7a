"""Llama 3.x, and what others of its shape have from it: config.json in and out, and the names of tensors."""

from collections.abc import Mapping
import functools
from typing import Any

from searchr1_jax.models import config as model_config, layers

LAYER = "model.layers.{layer}."
TENSORS = {
    "decoder.embedding": ("model.embed_tokens.weight", 1),
    "decoder.norm": ("model.norm.weight", 1),
    "head": ("lm_head.weight", 1),
    "decoder.layers.attention_norm": (LAYER + "input_layernorm.weight", 1),
    "decoder.layers.wq": (LAYER + "self_attn.q_proj.weight", 2),  # [N, H, D] of [N * H, D]
    "decoder.layers.wk": (LAYER + "self_attn.k_proj.weight", 2),
    "decoder.layers.wv": (LAYER + "self_attn.v_proj.weight", 2),
    "decoder.layers.wo": (LAYER + "self_attn.o_proj.weight", 1),  # [D, N, H] of [D, N * H]
    "decoder.layers.mlp_norm": (LAYER + "post_attention_layernorm.weight", 1),
    "decoder.layers.gate": (LAYER + "mlp.gate_proj.weight", 1),
    "decoder.layers.up": (LAYER + "mlp.up_proj.weight", 1),
    "decoder.layers.down": (LAYER + "mlp.down_proj.weight", 1),
}

# The words of config.json: ModelConfig's → theirs; RopeScaling's → theirs.
_WORDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
_LEFT_OUT = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # what transformers then takes
_SCALING_WORDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def read(family: model_config.Family, config: Mapping[str, Any]) -> model_config.ModelConfig:
    """The model of a config.json in Llama's words, as transformers 4 or 5 wrote it."""
    # transformers 4: rope_theta and rope_scaling (null where there is none); 5: both in rope_parameters.
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    rope |= (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    window = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
    activation = config.get("hidden_act", "silu")
    asked = {
        "rope type": rope_type if rope_type not in ("default", "llama3") else None,
        "sliding window": config.get("sliding_window") if window else None,
        "hidden_act": activation if activation not in layers.ACTIVATIONS else None,
        "attention_bias": True if config.get("attention_bias") and not family.attention_bias else None,
        "mlp_bias": config.get("mlp_bias") or None,
        "quantization": config.get("quantization_config"),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0 or None,
    }
    refused = [f"{name} {value!r}" for name, value in asked.items() if value is not None]
    if refused:
        raise ValueError(f"config.json asks for {', '.join(refused)}, not implemented; use a checkpoint without it")
    scaling = None
    if rope_type == "llama3":
        scaling = model_config.RopeScaling(**{ours: rope[theirs] for ours, theirs in _SCALING_WORDS.items()})
    heads = config["num_attention_heads"]
    said = {**_LEFT_OUT, **config, "num_key_value_heads": config.get("num_key_value_heads") or heads}
    said["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    fields = {ours: said[theirs] for ours, theirs in _WORDS.items()}
    theta = float(rope["rope_theta"] or 10_000.0)
    return model_config.ModelConfig(family=family, rope_theta=theta, rope_scaling=scaling, **fields)


def write(config: model_config.ModelConfig) -> dict[str, Any]:
    """A config.json in Llama's words, read alike by transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""
    scaling = None
    if config.rope_scaling is not None:
        values = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in _SCALING_WORDS.items()}
        scaling = {"rope_type": "llama3"} | values
    return {theirs: getattr(config, ours) for ours, theirs in _WORDS.items()} | {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
        "use_sliding_window": False,
    }


def size(width, layers, heads, kv_heads, mlp_width, tied=False, **fields) -> dict[str, Any]:
    """The fields of a published model; `fields` are those that a family's models share."""
    own = dict(width=width, layers=layers, heads=heads, kv_heads=kv_heads, mlp_width=mlp_width, tied_embeddings=tied)
    return own | {"head_dim": width // heads} | fields


_size = functools.partial(size, vocab_size=128_256, rope_theta=5e5, norm_eps=1e-5, max_positions=131_072)
_stretched = functools.partial(
    model_config.RopeScaling, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8_192
)

FAMILY = model_config.Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    tensors=TENSORS,
    sizes={
        "llama-3.2-1b": _size(2_048, 16, 32, 8, 8_192, rope_scaling=_stretched(factor=32.0), tied=True),
        "llama-3.2-3b": _size(3_072, 28, 24, 8, 8_192, rope_scaling=_stretched(factor=32.0), tied=True),
        "llama-3.1-8b": _size(4_096, 32, 32, 8, 14_336, rope_scaling=_stretched(factor=8.0)),
        "llama-3.1-70b": _size(8_192, 80, 64, 8, 28_672, rope_scaling=_stretched(factor=8.0)),
    },
)
