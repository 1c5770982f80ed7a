"""Qwen2 and Qwen2.5: Llama's shape, and biases on the q, k and v projections."""

import dataclasses
import functools

from searchr1_jax.models.families import llama

_size = functools.partial(llama.size, rope_theta=1e6, norm_eps=1e-6, max_positions=32_768)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=llama.TENSORS
    | {
        "decoder.layers.bq": (llama.LAYER + "self_attn.q_proj.bias", 2),
        "decoder.layers.bk": (llama.LAYER + "self_attn.k_proj.bias", 2),
        "decoder.layers.bv": (llama.LAYER + "self_attn.v_proj.bias", 2),
    },
    attention_bias=True,
    sizes={
        "qwen2.5-0.5b": _size(896, 24, 14, 2, 4_864, vocab_size=151_936, tied=True),
        "qwen2.5-1.5b": _size(1_536, 28, 12, 2, 8_960, vocab_size=151_936, tied=True),
        "qwen2.5-3b": _size(2_048, 36, 16, 2, 11_008, vocab_size=151_936, tied=True),
        "qwen2.5-7b": _size(3_584, 28, 28, 4, 18_944, vocab_size=152_064),
        "qwen2.5-14b": _size(5_120, 48, 40, 8, 13_824, vocab_size=152_064),
        "qwen2.5-32b": _size(5_120, 64, 40, 8, 27_648, vocab_size=152_064),
        "qwen2.5-72b": _size(8_192, 80, 64, 8, 29_568, vocab_size=152_064),
    },
)
