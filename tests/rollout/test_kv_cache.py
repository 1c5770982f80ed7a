"""Live caches: what a call writes where, and what it attends to, against loops in float64.

caches full of earlier texts, rows of new tokens ─▶ attention ─▶ attended, caches         slow() does it again
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.rollout import kv_cache

BLOCK = kv_cache.BLOCK
LONG = 2 * BLOCK + 22  # the third block overlaps the second
SLOTS, LAYER = 8, 1  # the second of two layers
CONFIG = slow_decoder.tiny_config(heads=8, kv_heads=2, head_dim=16)
EXACT = dict(atol=2e-6, rtol=0)  # float32, sums of up to LONG products of a few units
NOWHERE = 10**6  # a place beyond every context

# In each row the queries of one call; one token a row is a decode step, where row i is slot i.
BORDERS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, LONG - 1]


def draw(seed, *shape, dtype=np.float32):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def caches(context, dtype=np.float32):
    """Keys and values of every slot, the whole context long."""
    return draw(1, 2, 2, SLOTS, CONFIG.kv_heads, context, CONFIG.head_dim, dtype=dtype)


def new_tokens(rows, time, dtype=np.float32):
    """Queries, keys and values."""
    heads = (CONFIG.heads, CONFIG.kv_heads, CONFIG.kv_heads)
    return [draw(seed, rows, time, n, CONFIG.head_dim, dtype=dtype) for seed, n in enumerate(heads, start=2)]


def decode_places(places):
    return np.array(places)[:, None]


def chunk_places(starts, counts, time):
    """Tokens of each row from its start on, padding at its end."""
    place = np.arange(time)
    return np.where(place < np.array(counts)[:, None], np.array(starts)[:, None] + place, NOWHERE)


def slow(kv, row_slots, position, q, k, v):
    """Attended[R, T, N, H] (NaN for padding) and caches, in float64."""
    keys, values = kv = np.array(kv, np.float64)
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    context, group = keys.shape[3], CONFIG.heads // CONFIG.kv_heads
    real = list(np.argwhere(position < context))
    for row, t in real:
        for slot in [s for s in row_slots[row] if s < SLOTS]:
            keys[LAYER, slot, :, position[row, t]] = k[row, t]
            values[LAYER, slot, :, position[row, t]] = v[row, t]
    out = np.full(q.shape, np.nan)
    for row, t in real:
        slot, end = row_slots[row][0], position[row, t] + 1
        for head in range(CONFIG.heads):
            seen = (LAYER, slot, head // group, slice(end))
            scores = keys[seen] @ q[row, t, head] / CONFIG.head_dim**0.5
            weights = np.exp(scores - scores.max())
            out[row, t, head] = weights @ values[seen] / weights.sum()
    return out, kv


@functools.cache
def program(mesh):
    """The attention of a mesh, compiled once for each of the shapes that it meets."""
    del mesh
    return jax.jit(kv_cache.attention)


def attend(kv, row_slots, position, q, k, v):
    """Attended and caches as numpy arrays, on the mesh in use; `row_slots` None where row i is slot i."""
    abstract = kv_cache.abstract(CONFIG, slots=SLOTS, context=kv.shape[4], dtype=kv.dtype)
    cache = kv_cache.KVCache(*[jax.device_put(x, a.sharding) for x, a in zip(kv, abstract, strict=True)])
    if row_slots is not None:  # slots are numbered anew in each shard, and one beyond its last is none
        of_shard = SLOTS // parallel.axis_size("batch")
        row_slots = np.where(row_slots < SLOTS, row_slots % of_shard, of_shard).astype(np.int32)
    kv_heads = "kv_heads" if CONFIG.kv_heads % parallel.axis_size("kv_heads") == 0 else None
    rows = parallel.to_mesh((row_slots, position.astype(np.int32)), "batch", None)
    q = parallel.to_mesh(q, "batch", None, "heads", None)
    k, v = parallel.to_mesh((k, v), "batch", None, kv_heads, None)
    out, cache = program(jax.sharding.get_mesh())(cache, jnp.int32(LAYER), *rows, q, k, v)
    return np.asarray(out), np.stack([np.asarray(x) for x in cache])


def assert_as_slow(row_slots, position, *, context=LONG):
    """The places that mean something, and every place of the caches: what was written, and the rest untouched."""
    kv, new = caches(context), new_tokens(*position.shape)
    out, kept = attend(kv, row_slots, position, *new)
    of_rows = [[slot] for slot in range(SLOTS)] if row_slots is None else row_slots
    expected, expected_kv = slow(kv, of_rows, position, *new)
    real = position < context
    np.testing.assert_allclose(out[real], expected[real], **EXACT)
    np.testing.assert_array_equal(kept, expected_kv)


# Against the loops.


@pytest.mark.parametrize("context", [BLOCK // 2 + 1, BLOCK, 2 * BLOCK, LONG])
def test_a_decoded_token_sees_its_own_slot_up_to_itself(laptop, context):
    assert_as_slow(None, decode_places([place % context for place in BORDERS]), context=context)


@pytest.mark.parametrize("longest", [0, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_it_does_so_whatever_the_number_of_blocks_in_use(laptop, longest):
    assert_as_slow(None, decode_places([longest, 0, NOWHERE, longest // 2, NOWHERE, 0, 1 % (longest + 1), 0]))


CHUNKS = {
    "within a block and over the borders of blocks": ([3, BLOCK - 5, 2 * BLOCK - 1, BLOCK], [12, 12, 12, 12]),
    "at the context's end": ([LONG - 12, LONG - 5, LONG - 1, 0], [12, 5, 1, 12]),
    "with padding and a row of nothing else": ([0, BLOCK + 7, 40, 9], [1, 3, 0, 11]),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_a_chunk_is_written_to_all_its_slots_and_reads_the_first(laptop, case):
    """Slots that a row shares are not alike before it: what is read is the first one's past."""
    slots = np.array([[5, 0, 2], [1, SLOTS, SLOTS], [7, 4, SLOTS], [3, 6, SLOTS]])  # SLOTS: none
    assert_as_slow(slots, chunk_places(*CHUNKS[case], 12))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_eight_devices_attend_as_one_does(shape):
    """On 1x2x4 there are fewer K/V heads than tensor shards. The shards' rows need different numbers of blocks."""
    with jax.set_mesh(meshes.make(*shape)):
        assert_as_slow(None, decode_places(BORDERS))
        slots = np.array([[1, 0], [3, 2], [4, SLOTS], [6, 7]])
        assert_as_slow(slots, chunk_places([1, BLOCK - 5, 2 * BLOCK - 1, LONG - 9], [12, 12, 0, 9], 12))


def test_bfloat16_caches_lose_what_bfloat16_must(laptop):
    """Two roundings, of the weights and of the result, each by 2⁻⁹ of at most the largest value.

    The queries are long: were their products rounded too, by 2⁻⁹ of some 30, the weights would be off by 6%.
    """
    position = decode_places(BORDERS)
    kv, (q, k, v) = caches(LONG, jnp.bfloat16), new_tokens(SLOTS, 1, jnp.bfloat16)
    new = 8 * q, k, v
    out, kept = attend(kv, None, position, *new)
    assert out.dtype == kept.dtype == jnp.bfloat16
    expected, expected_kv = slow(kv, [[slot] for slot in range(SLOTS)], position, *new)
    largest = np.abs(np.asarray(kv[1], np.float64)).max()
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=2 * 2**-9 * largest, rtol=0)
    np.testing.assert_array_equal(kept.astype(np.float64), expected_kv)


# To the last bit.

COMPANY = [0, BLOCK - 1, BLOCK, 2 * BLOCK + 3, LONG - 1, NOWHERE]  # places of all other rows


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 1, LONG - 1])
def test_a_decoded_rows_result_is_the_same_bits_whatever_the_others_are_at(laptop, place):
    results = set()
    for others in COMPANY:
        position = decode_places([others, others, place, *[others] * 5])
        out, _ = attend(caches(LONG), None, position, *new_tokens(SLOTS, 1))
        results.add(out[2].tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("start, count", [(0, 12), (BLOCK - 5, 12), (LONG - 7, 7)])
def test_a_chunks_result_is_the_same_bits_whatever_the_other_rows_are_at(laptop, start, count):
    results = set()
    slots = np.array([[0], [1], [2], [3]])
    for others in COMPANY:
        position = chunk_places([others, start, others, others], [12, count, 12, 12], 12)
        out, _ = attend(caches(LONG), slots, position, *new_tokens(4, 12))
        results.add(out[1, :count].tobytes())
    assert len(results) == 1


def test_what_an_earlier_episode_left_behind_changes_no_bit(laptop):
    kv, position = caches(LONG), decode_places(BORDERS)
    beyond = np.arange(LONG)[:, None] > position[:, None, None]  # [S, K, C, H]
    outs = [attend(np.where(beyond, left, kv), None, position, *new_tokens(SLOTS, 1))[0] for left in (0, 1e30)]
    np.testing.assert_array_equal(*outs)


def test_blocks_that_nobody_is_in_are_not_looked_at(laptop):
    """What they hold is not a number, and would be felt even with a weight of 0."""
    kv = caches(LONG)
    kv[..., BLOCK:, :] = np.nan
    for places in ([BLOCK - 1, *[0] * 7], [NOWHERE, 3, *[NOWHERE] * 6]):
        position = decode_places(places)
        out, _ = attend(kv, None, position, *new_tokens(SLOTS, 1))
        assert np.isfinite(out[position < LONG]).all()
    out, _ = attend(kv, None, decode_places([BLOCK, *[0] * 7]), *new_tokens(SLOTS, 1))
    assert np.isnan(out[0]).all()  # it would be
