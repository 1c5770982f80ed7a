"""Search in this process: a corpus and a ranker behind the Retriever protocol.

queries ─ ranker ─▶ rows and scores ─ corpus ─▶ passages
"""

import dataclasses
import os

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, corpus as corpora, embed, parts, rankers


@dataclasses.dataclass(frozen=True)
class LocalRetriever:
    """A Retriever over one corpus, as thread-safe as its two parts (ours all are)."""

    corpus: corpora.Corpus
    ranker: base.Ranker

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """Returns at most k passages for each query, best first, their scores the ranker's."""
        rows, scores = self.ranker.rank(queries, k)
        return [
            [dataclasses.replace(self.corpus[row], score=s) for row, s in zip(found, sums, strict=True) if row != -1]
            for found, sums in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def build(
    corpus_path: str | os.PathLike, *, index: str, dimensions: int, cache_dir: str | os.PathLike | None = None
) -> LocalRetriever:
    """Fits a hashed n-gram encoder on a corpus, encodes and indexes it: seconds for 20,000 passages.

    Args:
      index: a key of parts.IN_MEMORY, or "auto" for `parts.default`.
      cache_dir: for the corpus' offsets, if its own folder cannot be written to.
    Raises: ValueError for a broken corpus; ImportError without ScaNN.
    """
    index = parts.default() if index == "auto" else index
    corpus = corpora.Corpus(corpus_path, cache_dir)
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=dimensions)
    vectors = parts.IN_MEMORY[index](embed.embed_corpus(encoder, corpus))
    return LocalRetriever(corpus, rankers.ByVectors(encoder, vectors))
