"""What a search is: text in, passages out.

    queries ─▶ Retriever ─▶ passages              what the rollout, the server and the user see
      │                        ▲
      └─▶ Ranker ─ rows ─▶ Corpus                 how a local one does it: by words, by vectors, or both
            │
            └▶ Encoder ─ vectors ─▶ VectorIndex   how one by vectors does it

Four protocols, the error of a search that finally failed, and the check every index makes of its vectors.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from searchr1_jax.core import types


class Retriever(Protocol):
    """Finds passages for queries; may be called from several threads at once."""

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """Returns one list a query, in their order: at most k passages, best first, with their scores.

        Raises: RetrievalError when a search finally failed; a failure is never an empty list.
        """
        ...


class Ranker(Protocol):
    """Finds the rows of a corpus for queries; may be called from several threads at once."""

    def rank(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] scores, best first.

        Where there are fewer than k, the row is -1 and the score -inf; a score is never NaN.
        """
        ...


class Encoder(Protocol):
    """Turns texts into vectors whose inner product says how well a passage answers a query."""

    def encode(self, texts: list[str], kind: Literal["query", "passage"]) -> np.ndarray:
        """Returns float32[N, D], finite; a passage's text is its row's contents, title line included."""
        ...


class VectorIndex(Protocol):
    """Finds the rows of the highest inner product; may be called from several threads at once."""

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] scores for float32[Q, D] vectors, best first.

        Where there are fewer than k, the row is -1 and the score -inf; a score is never NaN.
        """
        ...


class RetrievalError(RuntimeError):
    """A search that failed for good.

    Attributes:
      query: the query, or the first one of those that were sent together.
      cause: what went wrong, in words.
      attempts: how often it was tried.
      batch: how many queries were sent together.
    """

    def __init__(self, query: str, cause: str, attempts: int, batch: int = 1):
        super().__init__(query, cause, attempts, batch)
        self.query = query
        self.cause = cause
        self.attempts = attempts
        self.batch = batch

    def __str__(self) -> str:
        among = f" (one of {self.batch} sent together)" if self.batch > 1 else ""
        times = "attempt" if self.attempts == 1 else "attempts"
        return f"the search for {self.query!r}{among} failed after {self.attempts} {times}: {self.cause}"


def check_k(k: int) -> None:
    """Raises ValueError unless at least one passage is asked for."""
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 passage")


def check_rows(rows: int) -> None:
    """Raises ValueError when an index would be empty."""
    if rows < 1:
        raise ValueError("an index of 0 rows can find nothing; give it at least 1 vector")


def finite_rows(vectors: np.ndarray) -> np.ndarray:
    """bool[N], the rows of float32[N, D] whose inner products are never NaN: of finite values and squared length.

    By Cauchy and Schwarz no sum on the way to the product of two such rows exceeds what float32 holds.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(np.einsum("nd,nd->n", vectors, vectors))


def checked_vectors(vectors: np.ndarray, what: str, dimensions: int | None = None) -> np.ndarray:
    """Returns the vectors as contiguous float32[N, D].

    Args:
      vectors: [N, D].
      what: what they are, for the message.
      dimensions: the D they must have, if it is known.
    Raises: ValueError when the shape is another or a value is not finite.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or dimensions not in (None, vectors.shape[-1]):
        wanted = f"[N, {'D' if dimensions is None else dimensions}]"
        raise ValueError(f"{what} vectors have shape {list(vectors.shape)}; make them {wanted}")
    finite = finite_rows(vectors)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of {len(vectors)} {what} vectors are not finite, first row {finite.argmin()}"
            " (in a value or their squared length); mend the encoder that made them"
        )
    return vectors
