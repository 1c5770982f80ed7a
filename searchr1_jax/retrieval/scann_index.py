"""Approximate inner-product search with ScaNN (Guo et al., 2020), on the CPU.

    few rows    every row is scored
    many rows   a tree of √N leaves ─▶ the nearest quarter ─▶ 4-bit codes ─▶ the best rescored exactly

ScaNN comes without TensorFlow here and only for x86-64 Linux, so it is imported when an index is made.
"""

from __future__ import annotations

import math

import numpy as np

from searchr1_jax.retrieval import base

BRUTE_FORCE_ROWS = 20_000  # below, scoring every row is faster than any tree, and exact
LEAVES_SHARE = 0.25  # of the leaves a query visits; on real embeddings 5/10/25% found .68/.82/.945
RESCORED = 200  # candidates of the codes that are scored exactly
CODED_BLOCKS = 256  # blocks of dimensions ScaNN can sum in 16 bits, its fast way
ANISOTROPY = 0.2  # threshold of the anisotropic loss, ScaNN's value for vectors of unit length


class ScannIndex:
    """The rows of (nearly) highest inner product.

    A query's result depends neither on the queries beside it nor on threads, and two builds from the same
    vectors are equal.

    Args:
      vectors: float32[N, D], finite; copied.
    Raises:
      ValueError: when the vectors are not finite (ScaNN would abort the process) or there are none.
      ImportError: when ScaNN has no wheel for this machine.
    """

    def __init__(self, vectors: np.ndarray):
        vectors = base.checked_vectors(vectors, "index")
        self._rows, self._dimensions = vectors.shape
        base.check_rows(self._rows)
        builder = _scann().builder(vectors, min(RESCORED, self._rows), "dot_product")
        if self._rows < BRUTE_FORCE_ROWS:
            builder.score_brute_force()
        else:
            leaves = math.isqrt(self._rows)
            # Not from random centres, ScaNN's default: their seed differs from build to build.
            builder.tree(leaves, math.ceil(LEAVES_SHARE * leaves), random_init=False)
            block = max(2, math.ceil(self._dimensions / CODED_BLOCKS))
            builder.score_ah(block, anisotropic_quantization_threshold=ANISOTROPY)
            builder.reorder(RESCORED)
        self._searcher = builder.build()

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] inner products, best first; -1 and -inf for "none".

        Raises: ValueError when a vector is not finite or of another dimension, or k < 1.
        """
        base.check_k(k)
        vectors = base.checked_vectors(vectors, "query", self._dimensions)
        rows = np.full((len(vectors), k), -1, dtype=np.int64)
        scores = np.full((len(vectors), k), -np.inf, dtype=np.float32)
        candidates = max(k, RESCORED)
        # One by one: in a batch the last bits of a score depend on the batch's size, hence near ties too. It
        # takes two to three times as long, 3 ms for 64 queries on 5,000 rows. Short results come short here,
        # while the batched call fills them with row 0 and NaN.
        for query, vector in enumerate(vectors):
            found, products = self._searcher.search(vector, min(k, self._rows), min(candidates, self._rows))
            rows[query, : len(found)] = found
            scores[query, : len(found)] = products
        return rows, scores


def available() -> bool:
    """Whether ScaNN can be imported on this machine."""
    try:
        _scann()
    except ImportError:
        return False
    return True


def _scann():
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ImportError(
            'the package "scann" cannot be imported here; it has wheels for x86-64 Linux only.'
            ' Install it there (pip install scann), or set retriever.index = "exact"'
        ) from error
    return scann_ops_pybind
