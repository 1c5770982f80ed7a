"""What a decoder looks like: one `ModelConfig` for all families, read from and written to config.json.

A family is a row of `FAMILIES`; what we do not implement is refused by name, never approximated.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one family of decoders from another."""

    architecture: str  # Hugging Face class name
    attention_bias: bool  # biases on the q, k and v projections


FAMILIES = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", attention_bias=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one decoder; the dimension letters are those of `types`."""

    family: str  # a key of FAMILIES
    vocab_size: int  # V, rows of the embedding; the tokenizer may use fewer
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    mlp_width: int  # F
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool  # the output head is the embedding
    max_positions: int

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is not implemented; choose from {list(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")

    @property
    def attention_bias(self) -> bool:
        return FAMILIES[self.family].attention_bias


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json, as transformers 4 or 5 wrote it.

    Raises:
      ValueError: naming each thing in it that is not implemented.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not implemented; choose from {list(FAMILIES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope type": rope_type if rope_type != "default" else None,
        "sliding window": config.get("sliding_window") if config.get("use_sliding_window") else None,
        "hidden_act": config["hidden_act"] if config.get("hidden_act", "silu") != "silu" else None,
    }
    faults = [f"{name} {value!r}" for name, value in refused.items() if value is not None]
    if faults:
        raise ValueError(f"not implemented: {', '.join(faults)}; use a checkpoint without")
    heads = config["num_attention_heads"]
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_positions=config["max_position_embeddings"],
    )


def to_hf(config: ModelConfig, *, dtype: str, eos_token_id: int | None = None) -> dict[str, Any]:
    """config.json of the model, read alike by transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""
    return {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "use_sliding_window": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }
