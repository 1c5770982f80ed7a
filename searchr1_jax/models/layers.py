"""The arithmetic of a decoder layer: norm, rotary positions, and attention over packed rows.

Attention runs inside one `shard_map`: every shard holds whole heads and whole rows, so no shard needs
another's, and indexing is local. How a layer attends to live caches is told in `rollout.kv_cache`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.models import attention, config as model_config

# By the names of config.json. SwiGLU's and GeGLU's (Shazeer, 2020), the latter with tanh for the normal distribution's.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def embed(table_VD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """The tokens' rows of the table, [B, T, D]; each shard of the vocabulary looks up its own, and the rest is zero.

    So what travels is as large as the rows, and not as the table.
    """
    rows = parallel.spec("batch", None)

    @functools.partial(
        jax.shard_map, in_specs=(parallel.spec("vocab", None), rows), out_specs=parallel.spec("batch", None, None)
    )
    def look_up(table, token):
        if parallel.axis_size("vocab") == 1:
            return parallel.sum_over("vocab", table[token])
        local = token - parallel.shard_index("vocab") * len(table)
        mine = (local >= 0) & (local < len(table))
        found = table[jnp.where(mine, local, 0)]
        return parallel.sum_over("vocab", jnp.where(mine[..., None], found, 0))

    return look_up(table_VD, token_BT)


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
    heads, rows = parallel.spec("batch", None, "heads", None), parallel.spec("batch", None)
    # The kernels say nothing of how their results vary over the mesh, so nothing is checked.
    attend = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return attend(q_BTNH, split_kv_heads(k_BTKH, 2), split_kv_heads(v_BTKH, 2), segment_BT)
