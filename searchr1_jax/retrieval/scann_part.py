"""ScaNN as a part of an index: shards that fit the memory to build in, and a search tuned to a recall.

vectors/ ─ scann_index.build ─▶ scann/ ─ ScannIndex.searching(leaves, depth) ─▶ recall, queries/s ─▶ the fastest that
   └─ exact_index.top_k of the queries ─▶ truth ─────────────────────────────────┘            reaches the target
"""

import bisect
from collections.abc import Callable
import math
import time
from typing import Any, NamedTuple

import numpy as np

from searchr1_jax.retrieval import base, exact_index, part, rankers, scann_index, scann_plan, vectors as vector_files

DEPTHS = (10, 20, 40, 80, 160, 320)  # candidates rescored, that `tune` tries


class Measured(NamedTuple):
    """What `tune` chose, and how well it did on queries that it did not choose by."""

    recall_at_3: float  # share of the true best 3 that are among the 3 found
    recall_at_10: float
    queries_per_s: float  # one thread, one query at a time, 3 passages
    queries: int  # judged by
    leaves_searched: int  # in each shard
    rescored: int  # in each shard


def tune(
    index: scann_index.ScannIndex,
    vectors: np.ndarray,
    queries: np.ndarray,
    *,
    target_recall: float,
    progress: Callable[[int], None] = lambda rows: None,
) -> Measured:
    """The fastest search whose recall at 3 reaches the target, chosen on every other query, judged on the rest.

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
    queries = base.checked_queries(queries, index.dimensions)
    truth, _ = exact_index.top_k(vectors, queries, 10, progress=progress)
    ladder = sorted({min(index.settings.leaves, math.ceil(1.25**i)) for i in range(64)})
    reaching = []
    for depth in DEPTHS:

        def good(leaves, depth=depth):
            searched = index.searching(leaves_searched=leaves, rescored=depth)
            return recall(searched, queries[::2], truth[::2], 3) >= target_recall

        if good(ladder[-1]):
            reaching.append((ladder[bisect.bisect_left(ladder, True, hi=len(ladder) - 1, key=good)], depth))
    reaching = reaching or [(ladder[-1], DEPTHS[-1])]
    speeds = [_queries_per_s(index.searching(leaves_searched=a, rescored=b), queries[::2]) for a, b in reaching]
    leaves, depth = reaching[int(np.argmax(speeds))]
    best = index.searching(leaves_searched=leaves, rescored=depth)
    judged_by = queries[1::2]
    return Measured(
        recall_at_3=recall(best, judged_by, truth[1::2], 3),
        recall_at_10=recall(best, judged_by, truth[1::2], 10),
        queries_per_s=_queries_per_s(best, judged_by),
        queries=len(judged_by),
        leaves_searched=leaves,
        rescored=depth,
    )


def recall(index: base.VectorIndex, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true best k (int64[Q, >= k], -1 for "none") that are among the k found."""
    found, _ = index.search(queries, k)
    true = truth[:, :k]
    hits = (true[:, :, None] == found[:, None, :]).any(axis=2) & (true >= 0)
    return float(hits.sum() / (true >= 0).sum())


def _queries_per_s(index: scann_index.ScannIndex, queries: np.ndarray) -> float:
    began = time.perf_counter()
    for query in range(len(queries)):
        index.search(queries[query : query + 1], 3)
    return len(queries) / (time.perf_counter() - began)


def _plan(wanted: part.Wanted) -> part.Estimate:
    shard = scann_plan.shard_rows(wanted.rows, memory_bytes=wanted.memory_bytes, dimensions=wanted.dimensions)
    return scann_plan.plan(wanted.rows, wanted.dimensions, shard_rows=shard, dtype=wanted.dtype)


def _build(making: part.Making) -> dict[str, Any]:
    """Returns a `Measured`."""
    vectors = vector_files.open_vectors(making.directory / "vectors")
    rows, dimensions = vectors.shape
    shard = scann_plan.shard_rows(rows, memory_bytes=making.memory_bytes, dimensions=dimensions)
    directory, told = making.directory / "scann", lambda done: making.progress("ScaNN", done, rows)
    scann_index.build(vectors, directory, shard_rows=shard, progress=told)
    assert making.encoder is not None  # it made the vectors
    measured = tune(
        scann_index.ScannIndex.load(directory),
        vectors,
        making.encoder.encode(list(making.queries), "query"),
        target_recall=making.target_recall,
        progress=lambda done: making.progress("measuring", done, rows),
    )
    return measured._asdict()


def _how(record: dict[str, Any]) -> dict[str, Any]:
    """How it is searched, of what was measured."""
    return {name: record[name] for name in ("leaves_searched", "rescored")}


def _open(opening: part.Opening) -> rankers.ByVectors:
    index = scann_index.ScannIndex.load(opening.directory / "scann", **_how(opening.parts["scann"]))
    return rankers.ByVectors(opening.encoder(), index)


PART = part.Part(
    needs_vectors=True,
    plan=_plan,
    build=_build,
    open=_open,
    identity=_how,
    packages=("scann",),
    check=scann_index.scann_package,
    in_memory=scann_index.ScannIndex,
)
