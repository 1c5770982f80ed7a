"""Qwen3 (dense): Llama's shape, an RMS norm of every query and key head, and heads of a width of their own."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from searchr1_jax.models import config as model_config
from searchr1_jax.models.families import llama

_HEAD_DIM = 128


def read(family: model_config.Family, config: Mapping[str, Any]) -> model_config.ModelConfig:
    """Llama's words; where config.json states no head_dim, it is not what the heads' number makes of the width."""
    return llama.read(family, {**config, "head_dim": config.get("head_dim") or _HEAD_DIM})


_size = functools.partial(
    llama.size, vocab_size=151_936, head_dim=_HEAD_DIM, rope_theta=1e6, norm_eps=1e-6, max_positions=40_960
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read,
    tensors=llama.TENSORS
    | {
        "decoder.layers.q_norm": (llama.LAYER + "self_attn.q_norm.weight", 1),
        "decoder.layers.k_norm": (llama.LAYER + "self_attn.k_norm.weight", 1),
    },
    qk_norm=True,
    sizes={
        "qwen3-0.6b": _size(1_024, 28, 16, 8, 3_072, tied=True),
        "qwen3-1.7b": _size(2_048, 28, 16, 8, 6_144, tied=True),
        "qwen3-4b": _size(2_560, 36, 32, 8, 9_728, tied=True),
        "qwen3-8b": _size(4_096, 36, 32, 8, 12_288),
        "qwen3-14b": _size(5_120, 40, 40, 8, 17_408),
        "qwen3-32b": _size(5_120, 64, 64, 8, 25_600),
    },
)
