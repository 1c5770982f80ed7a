"""How thoroughly a ScaNN index has to be searched to find enough, measured against exact search.

queries ─ exact_index.top_k ─▶ truth
    └──── ScannIndex.searching(leaves, depth) ─▶ recall, queries/s ─▶ the fastest that reaches the target
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import time

import numpy as np

from searchr1_jax.retrieval import base
from searchr1_jax.retrieval import exact_index
from searchr1_jax.retrieval import scann_index

DEPTHS = (10, 20, 40, 80, 160, 320)  # candidates rescored, that `tune` tries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What `tune` chose, and how well it did on queries that it did not choose by."""

    recall_at_3: float  # share of the true best 3 that are among the 3 found
    recall_at_10: float
    queries_per_s: float  # one thread, one query at a time, `k` of tune
    queries: int  # judged by
    leaves_searched: int  # in each shard
    rescored: int  # in each shard


def tune(
    index: scann_index.ScannIndex,
    vectors: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 3,
    target_recall: float,
    progress: Callable[[int], None] = lambda rows: None,
) -> Measured:
    """The fastest search whose recall at k reaches the target, chosen on every other query, judged on the rest.

    For each of DEPTHS the fewest leaves that reach it (recall grows with them); of these the fastest. Where even all
    leaves do not, the most thorough is returned: its recall tells.

    Args:
      vectors: those the index was built from; the truth comes from one pass over them.
      queries: float32[Q, D], some hundreds, like those to come.
      progress: told how many of the vectors the queries have been compared with.
    Raises: ValueError for fewer than 2 queries.
    """
    if len(queries) < 2:
        raise ValueError(f"{len(queries)} queries to tune on; give some hundreds, half of them to choose by")
    queries = base.checked_vectors(queries, "query", index.dimensions)
    truth, _ = exact_index.top_k(vectors, queries, max(k, 10), progress=progress)
    chosen_by, judged_by = (queries[::2], truth[::2]), (queries[1::2], truth[1::2])
    ladder = sorted({min(index.settings.leaves, math.ceil(1.25**i)) for i in range(64)})
    reaching = []
    for depth in [depth for depth in DEPTHS if depth >= k] or [k]:

        def good(leaves):
            searched = index.searching(leaves_searched=leaves, rescored=depth)
            return recall(searched, *chosen_by, k) >= target_recall

        at = _first(ladder, good)
        if at is not None:
            reaching.append((ladder[at], depth))
    reaching = reaching or [(ladder[-1], max(k, DEPTHS[-1]))]
    speeds = [_queries_per_s(index.searching(leaves_searched=a, rescored=b), chosen_by[0], k) for a, b in reaching]
    leaves, depth = reaching[int(np.argmax(speeds))]
    best = index.searching(leaves_searched=leaves, rescored=depth)
    return Measured(
        recall_at_3=recall(best, *judged_by, 3),
        recall_at_10=recall(best, *judged_by, 10),
        queries_per_s=_queries_per_s(best, judged_by[0], k),
        queries=len(judged_by[0]),
        leaves_searched=leaves,
        rescored=depth,
    )


def recall(index: base.VectorIndex, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true best k (int64[Q, >= k], -1 for "none") that are among the k found."""
    found, _ = index.search(queries, k)
    true = truth[:, :k]
    hits = (true[:, :, None] == found[:, None, :]).any(axis=2) & (true >= 0)
    return float(hits.sum() / (true >= 0).sum())


def _queries_per_s(index: scann_index.ScannIndex, queries: np.ndarray, k: int) -> float:
    began = time.perf_counter()
    for query in range(len(queries)):
        index.search(queries[query : query + 1], k)
    return len(queries) / (time.perf_counter() - began)


def _first(ladder: list[int], good: Callable[[int], bool]) -> int | None:
    """Position of the first that is good, by bisection; None where the last is not."""
    low, high = 0, len(ladder) - 1
    if not good(ladder[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(ladder[middle]) else (middle + 1, high)
    return low
