"""Exact inner-product search in JAX: all rows scored, split over the devices of this process.

    chunk 0         chunk 1         …
    rows on device 0 ──▶ more rows on device 0 ──▶ its top k ─┐
    rows on device 1 ──▶ more rows on device 1 ──▶ its top k ─┴─ merged on the host ─▶ rows, scores
    ▲ blocks of 16 queries, on every device

Every block has the same shape, so one program serves any number of queries and a query's scores do not
depend on how many came with it. No device waits for another, so that threads may search at once.

Rows are held as float32, as bfloat16 (rounded to 8 bits) or as int8 with one float32 scale a row (rounded to
1/127 of the row's largest component); queries and sums are float32 always, only the rows are approximated. The
smaller ones save memory, not time: on a CPU they take five times as long.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.retrieval import base, part, rankers, vectors as vector_files

BLOCK = 16  # queries scored together; the last block is filled up with zeros
CHUNK_ROWS = 65_536  # rows a device scores at once, at most: at 768 dimensions 200 MB, at 16 queries 4 MB of scores
TRUTH_QUERIES = 256  # whose scores of a chunk `top_k` holds at once, 67 MB
DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes a component

_Best = tuple[jax.Array, jax.Array]  # scores and rows, [Q, devices x k], each device's best first
_Chunk = tuple[jax.Array, jax.Array, jax.Array]  # see `ExactIndex._place`


class ExactIndex:
    """The rows of the highest inner product; among equals the lower row comes first.

    Usable from any thread and under any mesh, at the cost of a program per k rounded up to a power of two.

    Args:
      vectors: float[N, D], finite; an array or a memmap, of which one chunk of one device at a time is in memory twice.
        On a CPU what need not be converted is not copied: leave it as it is while the index is in use.
      devices: that share the rows.
      dtype: a key of DTYPES, what the rows are held as.
    Raises: ValueError when the vectors are not finite or there are none, or the dtype is another.
    """

    def __init__(self, vectors: np.ndarray, *, devices: base.Devices = None, dtype: str = "float32"):
        base.check_matrix(vectors)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; set it to one of {', '.join(map(repr, DTYPES))}")
        for _ in checked_blocks(vectors):
            pass
        self._rows, self._dimensions = vectors.shape
        devices = list(devices or jax.local_devices())[: self._rows]
        # The caller's mesh (thread-local, and perhaps of other devices) would be part of the program. This
        # one stands in for it wherever the search is called from.
        self._mesh = parallel.make_mesh(data=len(devices), fsdp=1, tensor=1, devices=devices)
        chunks = -(-self._rows // (CHUNK_ROWS * len(devices)))
        self._chunk_rows = -(-self._rows // (chunks * len(devices)))  # on each device
        self._chunks = [self._place(vectors, chunk, dtype) for chunk in range(chunks)]

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows and inner products, see `base.VectorIndex`. Raises: ValueError for wrong vectors or k < 1."""
        vectors = base.checked_queries(vectors, self._dimensions)
        count = len(vectors)
        vectors = np.pad(vectors, ((0, -count % BLOCK), (0, 0)))
        rows, scores = base.nothing_found(len(vectors), k)
        program_k = min(1 << (k - 1).bit_length(), self._chunk_rows * len(self._chunks))
        with jax.set_mesh(self._mesh):
            found = [self._search_block(vectors[start : start + BLOCK], program_k) for start in range(0, count, BLOCK)]
        kept = min(k, self._rows)
        for block, (block_scores, block_rows) in enumerate(jax.device_get(found)):
            best = np.lexsort((block_rows, -block_scores))[:, :kept]
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            rows[span, :kept] = np.take_along_axis(block_rows, best, axis=1)
            scores[span, :kept] = np.take_along_axis(block_scores, best, axis=1)
        return rows[:count], scores[:count]

    def _search_block(self, queries_QD: np.ndarray, k: int) -> _Best:
        """Scores and rows, [Q, devices x k], each device's best first; padding scores -inf, as the start does."""
        shape, along = (BLOCK, k * self._mesh.size), self._split(None, "batch")
        best = jax.device_put((np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)), along)
        queries_QD = jax.device_put(queries_QD, self._split(None, None))
        for chunk in self._chunks:
            best = _better(best, chunk, queries_QD, self._rows)
        return best

    def _place(self, vectors: np.ndarray, chunk: int, dtype: str) -> _Chunk:
        """The rows of a chunk, a contiguous part on each device; their scales, float32; each part's first row.

        Beyond the last row there are zeros, which are never found. Scales are 1 but for int8.
        """
        devices, length = self._mesh.size, self._chunk_rows
        firsts = (chunk * devices + np.arange(devices, dtype=np.int32)) * length
        scales = np.ones(devices * length, np.float32)

        def part(index):
            at = index[0].start or 0
            mine = vectors[firsts[0] + at : firsts[0] + at + length]
            if mine.dtype == dtype and len(mine) == length:
                return mine
            mine = np.asarray(mine, np.float32)
            if dtype == "int8":
                largest = np.abs(mine).max(axis=1)
                scale = np.where(largest > 0, largest, 1) / np.float32(127)
                scales[at : at + len(mine)] = scale
                mine = np.rint(mine / scale[:, None])
            padded = np.zeros((length, self._dimensions), jnp.dtype(dtype))
            padded[: len(mine)] = mine
            return padded

        rows = jax.make_array_from_callback((devices * length, self._dimensions), self._split("batch", None), part)
        return rows, jax.device_put(scales, self._split("batch")), jax.device_put(firsts, self._split("batch"))

    def _split(self, *axes: str | None) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self._mesh, parallel.spec(*axes))


@jax.jit
def _better(so_far: _Best, chunk: _Chunk, queries_QD: jax.Array, rows: jax.Array) -> _Best:
    """The best so far and those of a chunk, merged on each device: scores and rows, [Q, devices x k].

    `top_k` breaks ties by the lower position, and the lower rows stand first in all that it is given.
    """

    def on_a_device(so_far, chunk, queries_QD, rows):
        (best_scores, best_rows), (vectors_ND, scales_N, first) = so_far, chunk
        # Highest precision: an accelerator would otherwise round the factors to bfloat16 or TF32.
        vectors_ND = vectors_ND.astype(jnp.float32)
        scores_QN = jnp.einsum("QD,ND->QN", queries_QD, vectors_ND, precision=jax.lax.Precision.HIGHEST)
        row_N = first + jnp.arange(len(vectors_ND), dtype=jnp.int32)
        scores_QN = jnp.where(row_N < rows, scores_QN * scales_N, -jnp.inf)
        k = best_scores.shape[1]
        scores, at = jax.lax.top_k(scores_QN, min(k, len(vectors_ND)))
        scores = jnp.concatenate([best_scores, scores], axis=1)
        merged = jnp.concatenate([best_rows, row_N[at]], axis=1)
        scores, at = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(merged, at, axis=1)

    along, best = parallel.spec("batch"), parallel.spec(None, "batch")
    specs = (best, best), (parallel.spec("batch", None), along, along), parallel.spec(None, None), parallel.spec()
    merged = jax.shard_map(on_a_device, in_specs=specs, out_specs=(best, best), check_vma=False)
    return merged(so_far, chunk, queries_QD, jnp.asarray(rows, jnp.int32))


def stored_bytes(rows: int, dimensions: int, dtype: str = "float32") -> int:
    """Bytes of all devices together that an index takes: the components and a float32 scale a row."""
    return rows * (dimensions * DTYPES[dtype] + 4)


def top_k(
    vectors: np.ndarray, queries: np.ndarray, k: int, *, progress: Callable[[int], None] = lambda rows: None
) -> tuple[np.ndarray, np.ndarray]:
    """The best k rows for each query, in one pass over vectors that stay on disk: what other indexes are judged by.

    Args:
      progress: told how many rows have been compared.
    Returns: int64[Q, k] rows and float32[Q, k] products, best first, of rows that tie for the last place any.
    """
    rows, scores = base.nothing_found(len(queries), k)
    for start, block in checked_blocks(vectors):
        for first in range(0, len(queries), TRUTH_QUERIES):
            span = slice(first, first + TRUTH_QUERIES)
            products = queries[span] @ block.T
            at = np.argpartition(-products, min(k, len(block)) - 1, axis=1)[:, :k]
            found = np.concatenate([rows[span], start + at], axis=1)
            values = np.concatenate([scores[span], np.take_along_axis(products, at, axis=1)], axis=1)
            best = np.lexsort((found, -values))[:, :k]
            rows[span] = np.take_along_axis(found, best, axis=1)
            scores[span] = np.take_along_axis(values, best, axis=1)
        progress(start + len(block))
    return rows, scores


def checked_blocks(vectors: np.ndarray, *, first_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row of the first, float32[n, D]) for blocks of an array or memmap float[N, D], one in memory at a time.

    Raises: ValueError at the first block with a vector that is not finite, with its row counted from `first_row`.
    """
    for start in range(0, len(vectors), CHUNK_ROWS):
        block = np.asarray(vectors[start : start + CHUNK_ROWS], dtype=np.float32)
        base.check_finite(block, "index", first_row + start)
        yield first_row + start, block


def _plan(wanted: part.Wanted) -> part.Estimate:
    held = stored_bytes(wanted.rows, wanted.dimensions, wanted.rows_dtype or wanted.dtype)
    return part.Estimate("exact search", 0, 0, held, 0.0)


def _open(opening: part.Opening) -> rankers.ByVectors:
    vectors = vector_files.open_vectors(opening.directory / "vectors")
    index = ExactIndex(vectors, dtype=opening.rows_dtype or vectors.dtype.name)
    return rankers.ByVectors(opening.encoder(), index)


PART = part.Part(needs_vectors=True, plan=_plan, build=None, open=_open, in_memory=ExactIndex)
