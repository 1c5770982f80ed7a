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


def embed(table_VD: jax.Array, token_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tokens' rows of a parameter, dtype[B, T, D]. Each shard of the vocabulary looks up its own, the rest is zero.

    So what travels is as large as the rows, and not as the table. The gradient is added up in float32: in bfloat16 that
    of a token would stop growing where it comes often, after 256 equal terms. Each device adds up the part of the width
    that it keeps, so that none holds the gradient of a whole table.
    """
    return _embed(table_VD, token_BT, jnp.dtype(dtype), jax.typeof(table_VD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_VD, token_BT, dtype, kept):
    rows = parallel.spec("batch", None)
    whole_VD = parallel.gather_weight(table_VD.astype(dtype), ("vocab", "embed"))

    @functools.partial(
        jax.shard_map, in_specs=(parallel.spec("vocab", None), rows), out_specs=parallel.spec("batch", None, None)
    )
    def look_up(table, token):
        if parallel.axis_size("vocab") == 1:
            return parallel.sum_over("vocab", table[token])
        local, mine = _own(token, len(table))
        return parallel.sum_over("vocab", jnp.where(mine[..., None], table[local], 0))

    return look_up(whole_VD, token_BT)


def _own(token: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Inside a `shard_map`: the row of each token in this shard of the vocabulary, and whether it is there."""
    local = token - parallel.shard_index("vocab") * rows
    mine = (local >= 0) & (local < rows)
    return jnp.where(mine, local, 0), mine


def _embedded(table_VD, token_BT, dtype, kept):
    return _embed(table_VD, token_BT, dtype, kept), token_BT


def _embedding_gradient(dtype, kept, token_BT, gradient_BTD):
    tokens, slices = parallel.spec("replica", None), parallel.spec("replica", None, "embed")
    rows, width = (n // parallel.axis_size(name) for n, name in zip(kept.shape, ("vocab", "embed"), strict=True))

    @functools.partial(jax.shard_map, in_specs=(tokens, slices), out_specs=parallel.spec("vocab", "embed"))
    def add_up(token, gradient):
        local, mine = _own(token, rows)
        terms = jnp.where(mine[..., None], gradient.astype(jnp.float32), 0.0)
        empty = parallel.vary_over("batch", parallel.vary_over("vocab", jnp.zeros((rows, width), jnp.float32)))
        return parallel.sum_over("replica", empty.at[local].add(terms))

    moved = jax.sharding.reshard(token_BT, tokens), jax.sharding.reshard(gradient_BTD, slices)
    return jax.sharding.reshard(add_up(*moved).astype(kept.dtype), kept.sharding.spec), None


_embed.defvjp(_embedded, _embedding_gradient)


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
