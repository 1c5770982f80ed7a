"""Search in this process: a corpus, an encoder and an index behind the Retriever protocol.

queries ─ encoder ─▶ vectors ─ index ─▶ rows and scores ─ corpus ─▶ passages
"""

from __future__ import annotations

import dataclasses
import os

from searchr1_jax import types
from searchr1_jax.retrieval import base
from searchr1_jax.retrieval import corpus as corpora
from searchr1_jax.retrieval import embed
from searchr1_jax.retrieval import exact_index
from searchr1_jax.retrieval import scann_index

INDEX_KINDS = {"scann": scann_index.ScannIndex, "exact": exact_index.ExactIndex}


class LocalRetriever:
    """A Retriever over one corpus, as thread-safe as its three parts (ours all are).

    Args:
      corpus: the passages.
      encoder: encodes the queries; the same that encoded the passages.
      index: of the passages' vectors, row i of the index being row i of the corpus.
    """

    def __init__(self, corpus: corpora.Corpus, encoder: base.Encoder, index: base.VectorIndex):
        self.corpus = corpus
        self.encoder = encoder
        self.index = index

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """Returns at most k passages for each query, best first, their scores the index's."""
        rows, scores = self.index.search(self.encoder.encode(queries, "query"), k)
        return [
            [
                dataclasses.replace(self.corpus[row], score=score)
                for row, score in zip(found, products, strict=True)
                if row != -1
            ]
            for found, products in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def build(
    corpus_path: str | os.PathLike, *, index: str, dimensions: int, cache_dir: str | os.PathLike | None = None
) -> LocalRetriever:
    """Fits a hashed n-gram encoder on a corpus, encodes and indexes it: seconds for 20,000 passages.

    Args:
      corpus_path: a jsonl file, see `corpus.Corpus`.
      index: a key of INDEX_KINDS.
      dimensions: D of the vectors.
      cache_dir: for the corpus' offsets, if its own folder cannot be written to.
    Raises: ValueError for an index kind that does not exist or a broken corpus; ImportError without ScaNN.
    """
    if index not in INDEX_KINDS:
        known = ", ".join(map(repr, INDEX_KINDS))
        raise ValueError(f"retriever.index is {index!r}; set it to one of {known}")
    corpus = corpora.Corpus(corpus_path, cache_dir)
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=dimensions)
    return LocalRetriever(corpus, encoder, INDEX_KINDS[index](embed.embed_corpus(encoder, corpus)))
