"""Exact inner-product search in JAX: all rows scored on one device.

    vectors[N, D] on the device        queries[Q, D] ─ blocks of 16 ─▶ scores[16, N] ─ top k ─▶ rows, scores

Every block has the same shape, so one program serves any number of queries and a query's scores do not
depend on how many came with it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.retrieval import base

BLOCK = 16  # queries scored together; the last block is filled up with zeros


class ExactIndex:
    """The rows of the highest inner product; among equals the lower row comes first.

    Usable from any thread and under any mesh, at the cost of a program per k rounded up to a power of two.

    Args:
      vectors: float32[N, D], finite; copied to the device.
      device: where they live; the process' first device if None.
    Raises: ValueError when the vectors are not finite or there are none.
    """

    def __init__(self, vectors: np.ndarray, *, device: jax.Device | None = None):
        vectors = base.checked_vectors(vectors, "index")
        self._rows, self._dimensions = vectors.shape
        base.check_rows(self._rows)
        self._device = device or jax.local_devices()[0]
        # The caller's mesh (thread-local, and perhaps of other devices) would be part of the program. This
        # one of a single device and no axes stands in for it wherever the search is called from.
        self._mesh = jax.sharding.Mesh(np.array(self._device), ())
        self._vectors_ND = jax.device_put(vectors, self._device)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] inner products, best first; -1 and -inf for "none".

        Raises: ValueError when a vector is not finite or of another dimension, or k < 1.
        """
        base.check_k(k)
        vectors = base.checked_vectors(vectors, "query", self._dimensions)
        count = len(vectors)
        vectors = np.pad(vectors, ((0, -count % BLOCK), (0, 0)))
        program_k = min(1 << (k - 1).bit_length(), self._rows)
        with jax.set_mesh(self._mesh):
            blocks = [vectors[start : start + BLOCK] for start in range(0, count, BLOCK)]
            found = [
                _top_k(self._vectors_ND, jax.device_put(block, self._device), k=program_k) for block in blocks
            ]
        rows = np.full((len(vectors), k), -1, dtype=np.int64)
        scores = np.full((len(vectors), k), -np.inf, dtype=np.float32)
        kept = min(k, program_k)
        for block, (block_scores, block_rows) in enumerate(jax.device_get(found)):
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            rows[span, :kept] = block_rows[:, :kept]
            scores[span, :kept] = block_scores[:, :kept]
        return rows[:count], scores[:count]


@functools.partial(jax.jit, static_argnames="k")
def _top_k(vectors_ND: jax.Array, queries_QD: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """float32[Q, k] products and int32[Q, k] rows, best first; `top_k` breaks ties by the lower row."""
    # Highest precision: an accelerator would otherwise round the factors to bfloat16 or TF32.
    scores_QN = jnp.einsum("QD,ND->QN", queries_QD, vectors_ND, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(scores_QN, k)
