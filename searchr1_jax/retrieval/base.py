"""What a search is: text in, passages out.

    queries ─▶ Retriever ─▶ passages              what the rollout, the server and the user see
      │                        ▲
      └─▶ Ranker ─ rows ─▶ Corpus                 how a local one does it: by words, by vectors, or both
            │
            └▶ Encoder ─ vectors ─▶ VectorIndex   how one by vectors does it

Four protocols, the error of a search that finally failed, and the checks every index makes of its vectors.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from searchr1_jax.core import parallel, types

Devices = Sequence[parallel.Device] | None  # of this process; all of them if None


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
        """Returns rows and scores for float32[Q, D] vectors, as `Ranker.rank` does for queries."""
        ...


class RetrievalError(RuntimeError):
    """A search that failed for good: its query, or the first of a batch sent together; why; after how many attempts."""

    def __init__(self, query: str, cause: str, attempts: int, batch: int = 1):
        super().__init__(query, cause, attempts, batch)
        self.query, self.cause, self.attempts, self.batch = query, cause, attempts, batch

    def __str__(self) -> str:
        among = f" (one of {self.batch} sent together)" if self.batch > 1 else ""
        times = "attempt" if self.attempts == 1 else "attempts"
        return f"the search for {self.query!r}{among} failed after {self.attempts} {times}: {self.cause}"


def check_k(k: int) -> None:
    """Raises ValueError unless at least one passage is asked for."""
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 passage")


def nothing_found(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int64[Q, k] rows and float32[Q, k] scores that say "none", -1 and -inf, to be filled. Raises: see `check_k`."""
    check_k(k)
    return np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32)


def check_matrix(vectors: np.ndarray) -> None:
    """Raises ValueError unless there is at least one vector to index; reads none of them."""
    if vectors.ndim != 2:
        raise ValueError(f"index vectors have shape {list(vectors.shape)}; make them [N, D]")
    if not len(vectors):
        raise ValueError("an index of 0 rows can find nothing; give it at least 1 vector")


def finite_rows(vectors: np.ndarray) -> np.ndarray:
    """bool[N], the rows of float32[N, D] whose inner products are never NaN: of finite values and squared length.

    By Cauchy and Schwarz no sum on the way to the product of two such rows exceeds what float32 holds.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(np.einsum("nd,nd->n", vectors, vectors))


def check_finite(vectors: np.ndarray, what: str, first_row: int = 0) -> None:
    """Raises ValueError where not all rows of float32[N, D] are `finite_rows`; they are numbered from `first_row`."""
    finite = finite_rows(vectors)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of {len(vectors)} {what} vectors are not finite, first row"
            f" {first_row + finite.argmin()} (in a value or their squared length); mend the encoder that made them"
        )


def checked_queries(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The queries as contiguous float32[N, D]. Raises: ValueError when D is another or a value is not finite."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dimensions:
        raise ValueError(f"query vectors have shape {list(vectors.shape)}; make them [N, {dimensions}]")
    check_finite(vectors, "query")
    return vectors
