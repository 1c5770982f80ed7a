"""What a decoder looks like: one `ModelConfig` for all families, read from and written to config.json.

A family is a row of `FAMILIES`; what we do not implement is refused by name, never approximated.
`SIZES` names published models for planning, without files.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one family of decoders from another."""

    architecture: str  # Hugging Face class name
    attention_bias: bool = False  # biases on the q, k and v projections
    qk_norm: bool = False  # RMS norm of every query and key head before the rotary turn
    head_dim: int | None = None  # where config.json states none; None: width / heads


FAMILIES = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", attention_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "llama": Family(architecture="LlamaForCausalLM"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


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
    rope_scaling: RopeScaling | None = None
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

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json, as transformers 4 or 5 wrote it.

    Raises:
      ValueError: naming each thing in it that is not implemented, or what it lacks.
    """
    try:
        return _from_hf(config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; fetch or export the model again") from error


def _from_hf(config: dict[str, Any]) -> ModelConfig:
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not implemented; choose from {list(FAMILIES)}")
    family = FAMILIES[name]
    # transformers 4: rope_theta and rope_scaling (null where there is none); 5: both in rope_parameters.
    rope = {"rope_theta": config.get("rope_theta")} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(config, family, rope_type)
    heads = config["num_attention_heads"]
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    return ModelConfig(
        family=name,
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        rope_theta=float(rope["rope_theta"] or 10_000.0),
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_positions=config["max_position_embeddings"],
    )


def _refuse(config: dict[str, Any], family: Family, rope_type: str) -> None:
    window = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
    asked = {
        "rope type": rope_type if rope_type not in ("default", "llama3") else None,
        "sliding window": config.get("sliding_window") if window else None,
        "hidden_act": config["hidden_act"] if config.get("hidden_act", "silu") != "silu" else None,
        "attention_bias": True if config.get("attention_bias") and not family.attention_bias else None,
        "mlp_bias": config.get("mlp_bias") or None,
        "quantization": config.get("quantization_config"),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0 or None,
    }
    refused = [f"{name} {value!r}" for name, value in asked.items() if value is not None]
    if refused:
        raise ValueError(f"config.json asks for {', '.join(refused)}, not implemented; use a checkpoint without it")


def to_hf(config: ModelConfig, *, dtype: str, eos_token_id: int | None = None) -> dict[str, Any]:
    """config.json of the model, read alike by transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""
    scaling = None
    if (s := config.rope_scaling) is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
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
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "use_sliding_window": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }


def _qwen2(width, layers, heads, kv_heads, mlp_width, *, vocab_size=152_064, tied=False) -> ModelConfig:
    return ModelConfig(
        family="qwen2", vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, mlp_width=mlp_width, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=tied,
        max_positions=32_768,
    )  # fmt: skip


def _qwen3(width, layers, heads, kv_heads, mlp_width, *, tied=False) -> ModelConfig:
    return ModelConfig(
        family="qwen3", vocab_size=151_936, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=128, mlp_width=mlp_width, rope_theta=1e6, norm_eps=1e-6, tied_embeddings=tied,
        max_positions=40_960,
    )  # fmt: skip


def _llama3(width, layers, heads, kv_heads, mlp_width, *, factor, tied=False) -> ModelConfig:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8_192)
    return ModelConfig(
        family="llama", vocab_size=128_256, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, mlp_width=mlp_width, rope_theta=5e5, rope_scaling=scaling, norm_eps=1e-5,
        tied_embeddings=tied, max_positions=131_072,
    )  # fmt: skip


# fmt: off
SIZES = {
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4_864, vocab_size=151_936, tied=True),
    "qwen2.5-1.5b": _qwen2(1_536, 28, 12, 2, 8_960, vocab_size=151_936, tied=True),
    "qwen2.5-3b": _qwen2(2_048, 36, 16, 2, 11_008, vocab_size=151_936, tied=True),
    "qwen2.5-7b": _qwen2(3_584, 28, 28, 4, 18_944),
    "qwen2.5-14b": _qwen2(5_120, 48, 40, 8, 13_824),
    "qwen2.5-32b": _qwen2(5_120, 64, 40, 8, 27_648),
    "qwen2.5-72b": _qwen2(8_192, 80, 64, 8, 29_568),
    "qwen3-0.6b": _qwen3(1_024, 28, 16, 8, 3_072, tied=True),
    "qwen3-1.7b": _qwen3(2_048, 28, 16, 8, 6_144, tied=True),
    "qwen3-4b": _qwen3(2_560, 36, 32, 8, 9_728, tied=True),
    "qwen3-8b": _qwen3(4_096, 36, 32, 8, 12_288),
    "qwen3-14b": _qwen3(5_120, 40, 40, 8, 17_408),
    "qwen3-32b": _qwen3(5_120, 64, 64, 8, 25_600),
    "llama-3.2-1b": _llama3(2_048, 16, 32, 8, 8_192, factor=32.0, tied=True),
    "llama-3.2-3b": _llama3(3_072, 28, 24, 8, 8_192, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4_096, 32, 32, 8, 14_336, factor=8.0),
    "llama-3.1-70b": _llama3(8_192, 80, 64, 8, 28_672, factor=8.0),
}
# fmt: on
