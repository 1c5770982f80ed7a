"""The arithmetic of a decoder layer: norm, rotary positions, and attention over packed rows or a KV cache.

Attention runs inside one `shard_map`: every shard holds whole heads and whole rows, so no shard needs
another's, and indexing is local. Layouts are [B, T, heads, H] for activations and [L, S, K, C, H] for caches
(head-major: the keys of a head lie together).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax import parallel
from searchr1_jax.models import attention
from searchr1_jax.models import config as model_config

MASKED = (
    -1e30
)  # added to logits of keys that may not be seen; finite, so that a row without keys stays finite


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) · scale, in float32 whatever the dtype of x (Zhang and Sennrich, 2019)."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale_D.astype(jnp.float32)).astype(x_BTD.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: model_config.RopeScaling | None) -> np.ndarray:
    """float32[H/2], radians a position: θ^(-2i/H) (Su et al., 2021), the slow ones stretched where asked.

    Llama 3's stretch (rope_type "llama3"), by wavelength λ = 2π/f in units of the original context C:
    f stays where λ < C/high, becomes f/factor where λ > C/low, and in between
    ((1 − s)/factor + s) f with s = (C/λ − low) / (high − low).
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_positions * frequency / (2 * np.pi)  # within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * ((1 - smooth) / scaling.factor + smooth)
    return frequency.astype(np.float32)


def rotary_tables(
    position_BT: jax.Array, head_dim: int, theta: float, scaling: model_config.RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position · frequency, each float32[B, T, H/2]."""
    angle = position_BT[..., None].astype(jnp.float32) * rotary_frequencies(head_dim, theta, scaling)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head by the token's position."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def split_kv_heads(kv: jax.Array, head_axis: int) -> jax.Array:
    """K/V heads laid out over the tensor axis, repeated to its size where there are fewer of them."""
    shards, heads = parallel.axis_size("kv_heads"), kv.shape[head_axis]
    if heads % shards == 0:
        return kv
    names = ["batch"] + [None] * (kv.ndim - 1)
    names[head_axis] = "kv_heads"
    repeated = jnp.repeat(kv, shards // heads, axis=head_axis)
    return jax.sharding.reshard(repeated, parallel.spec(*names))


def packed_attention(kernel: attention.Kernel, q_BTNH, k_BTKH, v_BTKH, segment_BT) -> jax.Array:
    """Causal attention within the segments of packed rows; segment 0 is empty space. [B, T, N, H]"""
    heads = parallel.spec("batch", None, "heads", None)
    rows = parallel.spec("batch", None)
    # The kernels say nothing of how their results vary over the mesh, so nothing is checked.
    attend = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return attend(q_BTNH, split_kv_heads(k_BTKH, 2), split_kv_heads(v_BTKH, 2), segment_BT)


def cached_attention(q_BTNH, k_BKCH, v_BKCH, position_BT) -> jax.Array:
    """Attention of queries at their positions over cache entries up to and including them. [B, T, N, H]

    To be called inside a `shard_map`: all arguments are local, N a multiple of K.
    """
    batch, time, heads, width = q_BTNH.shape
    kv_heads, length = k_BKCH.shape[1:3]
    q = q_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("BTKGH,BKCH->BKGTC", q, k_BKCH, preferred_element_type=jnp.float32) * width**-0.5
    seen = jnp.arange(length) <= position_BT[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1).astype(v_BKCH.dtype)
    out = jnp.einsum("BKGTC,BKCH->BTKGH", weights, v_BKCH)
    return out.reshape(batch, time, heads, width)
