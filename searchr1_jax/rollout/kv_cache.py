"""KV caches that live as long as their episodes: one dense row of C places for each slot of the engine.

    keys, values   [L, S, K, C, H], head-major, slots split over the batch axes, heads over the tensor axis

A cache holds all tokens of its sequence but the last: that one is *pending* and is consumed by whatever comes
next, a decoded token or an appended chunk. Writes are scatters inside a `shard_map`, so they are local and in
place when the cache is donated; a write beyond C, or to a slot number beyond the shard's, is dropped.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config

BLOCK = 64  # places that attention looks at together; 32 to 128 take as long on a CPU
MASKED = -1e30  # logit of a place that may not be seen; finite, as a block may hold nothing else


class KVCache(NamedTuple):
    """Keys (rotated) and values of every slot."""

    keys: Any  # dtype[L, S, K, C, H]
    values: Any  # the same; arrays, or what stands for their shapes


def _specs(kv_heads: int):
    shards = parallel.axis_size("kv_heads")
    heads = "kv_heads" if kv_heads % shards == 0 else None
    cache = parallel.spec(None, "batch", heads, None, None)
    return cache, parallel.spec("batch", None, heads, None), parallel.spec("batch", None, "heads", None)


def abstract(config: model_config.ModelConfig, *, slots: int, context: int, dtype: jnp.dtype) -> KVCache:
    """Shapes and shardings of the cache on the mesh in use."""
    shape = (config.layers, slots, config.kv_heads, context, config.head_dim)
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), _specs(config.kv_heads)[0])
    return KVCache(*[jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)] * 2)


def attention(cache: KVCache, layer, row_slots_RG, position_RT, q_RTNH, k_RTKH, v_RTKH):
    """Writes the rows' keys and values into their slots, then attends over everything up to each position.

    A row reads its first slot and writes all of them: the samples of one question share the row that
    appends their prompt. What has a place beyond C, such as the padding at a row's end, writes nothing.

    Args:
      row_slots_RG: int32[R, G], slots of each row, local to the row's shard; slots and rows are split alike.
        None: row i is slot i alone.
      position_RT: int32[R, T], place of each token in its sequence.
    Returns: attended[R, T, N, H] and the cache.
    """
    cache_spec, kv_spec, q_spec = _specs(cache.keys.shape[2])
    row_spec = parallel.spec("batch", None)
    in_place = row_slots_RG is None
    if in_place:
        row_slots_RG = jnp.zeros_like(position_RT)

    @functools.partial(
        jax.shard_map,
        in_specs=(cache_spec, cache_spec, jax.P(), row_spec, row_spec, q_spec, kv_spec, kv_spec),
        out_specs=(q_spec, cache_spec, cache_spec),
        check_vma=False,  # the number of blocks differs from shard to shard
    )
    def attend(keys, values, layer, row_slots, position, q, k, v):
        if in_place:
            row_slots = jnp.arange(len(position))[:, None]
        slot = row_slots[:, :, None]  # [R, G, 1]: slot and place lie together, heads and width follow

        def write(cache, new):
            return cache.at[layer, slot, :, position[:, None, :]].set(new[:, None], mode="drop")

        keys, values = write(keys, k), write(values, v)
        mine = functools.partial(_heads_of_shard, query_heads=q.shape[2], kv_heads=cache.keys.shape[2])

        def block(first, size):
            """Keys and values [R, K, size, H] of the rows, from place `first` on."""

            def cut(cache):
                _, slots, heads, _, width = cache.shape
                part = jax.lax.dynamic_slice(cache, (layer, 0, 0, first, 0), (1, slots, heads, size, width))[0]
                return mine(part if in_place else part[row_slots[:, 0]])

            return cut(keys), cut(values)

        return attend_by_blocks(q, block, position, keys.shape[3]), keys, values

    out, keys, values = attend(*cache, layer, row_slots_RG, position_RT, q_RTNH, k_RTKH, v_RTKH)
    return out, KVCache(keys, values)


def attend_by_blocks(q_RTNH, block, position_RT, context: int) -> jax.Array:
    """Attention over the places up to each position, `BLOCK` of them at a time and no more than are in use.

    A running softmax (Milakov and Gimelshein, 2018) makes the work follow the longest of the rows. A block that a row
    sees nothing of leaves its sums as they were, bit by bit, so a row's result depends on no other row.

    Args:
      block: of first place and size: keys and values, dtype[R, K, size, H] each.
      position_RT: int32[R, T]; a position of C or beyond asks for nothing, its result means nothing.
    Returns: dtype[R, T, N, H].
    """
    rows, time, heads, width = q_RTNH.shape
    size = min(BLOCK, context)
    kv_heads = jax.eval_shape(lambda: block(0, size))[0].shape[1]
    group = heads // kv_heads
    # The queries that share a K/V head lie together: one matrix product for all of them.
    q_RKQH = (q_RTNH * width**-0.5).reshape(rows, time, kv_heads, group, width)
    q_RKQH = q_RKQH.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * time, width)
    position_R1Q1 = jnp.tile(position_RT, (1, group))[:, None, :, None]
    in_use = jnp.max(jnp.where(position_RT < context, position_RT, 0)) + 1

    def add(i, sums):
        highest, total, out = sums
        first = jnp.minimum(i * size, context - size)  # the last block may overlap the one before it
        keys, values = block(first, size)
        place = first + jnp.arange(size)
        seen = (place >= i * size) & (place <= position_R1Q1)
        logits = jnp.einsum("RKQH,RKCH->RKQC", q_RKQH, keys, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, MASKED)
        new = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weights, kept = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
        part = jnp.einsum("RKQC,RKCH->RKQH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new, total * kept + jnp.sum(weights, axis=-1), out * kept[..., None] + part

    zeros = jnp.zeros(q_RKQH.shape[:3], jnp.float32)
    sums = jnp.full_like(zeros, MASKED), zeros, jnp.zeros(q_RKQH.shape, jnp.float32)
    _, total, out = jax.lax.fori_loop(0, (in_use + size - 1) // size, add, sums)
    out = (out / total[..., None]).astype(q_RTNH.dtype).reshape(rows, kv_heads, group, time, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, time, heads, width)


def _heads_of_shard(kv: jax.Array, *, query_heads: int, kv_heads: int) -> jax.Array:
    """The K/V heads that this shard's query heads attend to, where replicated K/V hold all of them."""
    shards = parallel.axis_size("heads")
    if kv_heads % shards == 0:
        return kv
    group = query_heads * shards // kv_heads  # query heads that share one K/V head
    first = parallel.shard_index("heads") * query_heads // group
    return jax.lax.dynamic_slice_in_dim(kv, first, max(1, query_heads // group), axis=1)
