"""Rows of a corpus for queries: by vectors, and several ways together.

queries ─ encoder ─▶ vectors ─ index ─▶ rows, scores                        ByVectors
queries ─▶ each ranker's best ─ reciprocal rank fusion ─▶ rows, scores      Fused
"""

from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np

from searchr1_jax.retrieval import base

RRF_K = 60  # what Cormack et al. found best, and all have taken since
FUSED = 100  # rows of each ranker that take part, at least


@dataclasses.dataclass(frozen=True)
class ByVectors:
    """The rows whose vectors have the highest inner product with the query's."""

    encoder: base.Encoder  # of the queries; the same that encoded the passages
    index: base.VectorIndex  # of the passages' vectors, row i of the index being row i of the corpus

    def rank(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] inner products, best first; -1 and -inf for "none"."""
        return self.index.search(self.encoder.encode(queries, "query"), k)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several rankers' rows by reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009).

        score(row) = Σ over rankers  1 / (60 + rank of the row there, from 1)

    Only each ranker's best 100 (or k, if that is more) take part; among equals the lower row comes first.
    """

    rankers: Sequence[base.Ranker]

    def rank(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] fused scores, best first; -1 and -inf for "none"."""
        found = [ranker.rank(queries, max(k, FUSED))[0] for ranker in self.rankers]
        rows, scores = base.nothing_found(len(queries), k)
        for query in range(len(queries)):
            fused = fuse(ranked[query][ranked[query] >= 0].tolist() for ranked in found)
            for place, (row, score) in enumerate(fused[:k]):
                rows[query, place], scores[query, place] = row, score
        return rows, scores


def fuse(rankings: Iterable[Sequence[int]]) -> list[tuple[int, float]]:
    """Rows of several rankings, best first each, with their fused scores, best first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
