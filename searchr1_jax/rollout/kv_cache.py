"""KV caches that live as long as their episodes: one dense row of C places for each slot of the engine.

    keys, values   [L, S, K, C, H], head-major, slots split over the batch axes, heads over the tensor axis

A cache holds all tokens of its sequence but the last: that one is *pending* and is consumed by whatever comes
next, a decoded token or an appended chunk. Writes are scatters inside a `shard_map`, so they are local and in
place when the cache is donated; a write beyond C, or to a slot number beyond the shard's, is dropped.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from searchr1_jax import parallel
from searchr1_jax.models import config as model_config
from searchr1_jax.models import layers


class KVCache(NamedTuple):
    """Keys (rotated) and values of every slot."""

    keys: jax.Array  # dtype[L, S, K, C, H]
    values: jax.Array  # dtype[L, S, K, C, H]


def _specs(kv_heads: int):
    shards = parallel.axis_size("kv_heads")
    heads = "kv_heads" if kv_heads % shards == 0 else None
    cache = parallel.spec(None, "batch", heads, None, None)
    return cache, parallel.spec("batch", None, heads, None), parallel.spec("batch", None, "heads", None)


def make(config: model_config.ModelConfig, *, slots: int, context: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache on the mesh in use."""
    shape = (config.layers, slots, config.kv_heads, context, config.head_dim)
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), _specs(config.kv_heads)[0])
    zeros = jax.jit(lambda: KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), out_shardings=sharding)
    return zeros()


def attention(cache: KVCache, layer, row_slots_RG, position_RT, q_RTNH, k_RTKH, v_RTKH):
    """Writes the rows' keys and values into their slots, then attends over everything up to each position.

    A row reads its first slot and writes all of them: the samples of one question share the row that
    appends their prompt. Padding at a row's end has places beyond C, so that it writes nothing.

    Args:
      layer: int32[], the layer whose part of the cache is meant.
      row_slots_RG: int32[R, G], slots of each row, local to the row's shard; slots and rows are split alike.
      position_RT: int32[R, T], place of each token in its sequence.
    Returns: attended[R, T, N, H] and the cache.
    """
    cache_spec, kv_spec, q_spec = _specs(cache.keys.shape[2])
    row_spec = parallel.spec("batch", None)

    @functools.partial(
        jax.shard_map,
        in_specs=(cache_spec, cache_spec, jax.P(), row_spec, row_spec, q_spec, kv_spec, kv_spec),
        out_specs=(q_spec, cache_spec, cache_spec),
    )
    def attend(keys, values, layer, row_slots, position, q, k, v):
        slot = row_slots[:, :, None]  # [R, G, 1]: slot and place lie together, heads and width follow

        def write(cache, new):
            return cache.at[layer, slot, :, position[:, None, :]].set(new[:, None], mode="drop")

        keys, values = write(keys, k), write(values, v)
        read = row_slots[:, 0]
        mine = functools.partial(_heads_of_shard, query_heads=q.shape[2], kv_heads=cache.keys.shape[2])
        out = layers.cached_attention(q, mine(keys[layer, read]), mine(values[layer, read]), position)
        return out, keys, values

    out, keys, values = attend(*cache, layer, row_slots_RG, position_RT, q_RTNH, k_RTKH, v_RTKH)
    return out, KVCache(keys, values)


def _heads_of_shard(kv: jax.Array, *, query_heads: int, kv_heads: int) -> jax.Array:
    """The K/V heads that this shard's query heads attend to, where replicated K/V hold all of them."""
    shards = parallel.axis_size("heads")
    if kv_heads % shards == 0:
        return kv
    group = query_heads * shards // kv_heads  # query heads that share one K/V head
    first = parallel.shard_index("heads") * query_heads // group
    return jax.lax.dynamic_slice_in_dim(kv, first, max(1, query_heads // group), axis=1)
