"""A text encoder that needs no training: hashed n-grams weighted by how rare they are.

    text ─ lower case, no punctuation ─▶ words ─▶ each and its 3- and 4-grams ─ hash ─▶ slot, dimension, sign
    vector = Σ over the text's n-grams of  sign · idf[slot] · e[dimension],  divided by its length

The signs make collisions cancel on average (Weinberger et al., 2009, feature hashing); the inverse document
frequencies are counted on the corpus. Fit for entity-centric corpora of up to some 100,000 passages, where
the words of a query are names that the passage spells the same way.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import re
from typing import Literal, Self
import zlib

import numpy as np

from searchr1_jax.retrieval import base, corpus as corpora

SLOTS = 1 << 18  # places in which n-grams are counted for their idf
CACHED_WORDS = 1 << 17  # a few hundred bytes each
CHUNK = 2048  # passages encoded at once
_WORD = re.compile(r"[^\W_]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a text's vector, next to the inverse document frequencies."""

    dimensions: int


class HashedNgramEncoder:
    """Signed hashed n-gram vectors of unit length; a text's vector is the same in any batch and process.

    Args:
      dimensions: D of the vectors.
      idf: float32[SLOTS], weight of the n-grams that hash to each slot; `fit` counts it.
    """

    def __init__(self, *, dimensions: int, idf: np.ndarray):
        self.dimensions = dimensions
        self.settings = Settings(dimensions=dimensions)
        self.idf = np.asarray(idf, dtype=np.float32)
        self.fingerprint = hashlib.sha256(self.idf.tobytes()).hexdigest()[:16]  # differs where the frequencies do

    @classmethod
    def fit(
        cls, corpus: corpora.Corpus, *, dimensions: int = 256, progress: Callable[[int], None] = lambda rows: None
    ) -> Self:
        """Counts the inverse document frequencies on a corpus: idf = ln(1 + (N − n + ½) / (n + ½)).

        n of N passages hold an n-gram of that slot (BM25's idf, Robertson & Zaragoza, 2009, eq. 3.3, kept positive);
        `progress` is told the rows counted.
        """
        holders = np.zeros(SLOTS, dtype=np.int64)
        for row in range(len(corpus)):
            words = set(_words(corpus.contents(row)))
            if words:
                holders[np.unique(np.concatenate([_ngrams(word)[0] for word in words]))] += 1
            if (row + 1) % CHUNK == 0 or row + 1 == len(corpus):
                progress(row + 1)
        idf = np.log1p((len(corpus) - holders + 0.5) / (holders + 0.5))
        return cls(dimensions=dimensions, idf=idf)

    def encode(self, texts: list[str], kind: Literal["query", "passage"]) -> np.ndarray:
        """Returns float32[N, D] of length 1, or 0 where a text holds no letter and no digit.

        A passage's first line, its title, is counted twice.
        """
        if kind == "passage":
            texts = [text.partition("\n")[0] + "\n" + text for text in texts]
        number: dict[str, int] = {}  # of the distinct words, in order of appearance
        numbers = [[number.setdefault(word, len(number)) for word in _words(text)] for text in texts]
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float64)
        words = self._word_vectors(list(number))
        for row, members in enumerate(numbers):
            words[members].sum(axis=0, out=vectors[row])
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(length > 0, length, 1)).astype(np.float32)

    def _word_vectors(self, words: list[str]) -> np.ndarray:
        """float64[W, D], each word's weighted n-grams, not normalised."""
        if not words:
            return np.zeros((0, self.dimensions))
        ngrams = [_ngrams(word) for word in words]
        owner = np.repeat(np.arange(len(words)), [len(slots) for slots, _, _ in ngrams])
        slot, place, sign = (np.concatenate(part) for part in zip(*ngrams, strict=True))
        cell = owner * self.dimensions + place % self.dimensions
        sums = np.bincount(cell, sign * self.idf[slot], minlength=len(words) * self.dimensions)
        return sums.reshape(len(words), self.dimensions)


def embed_corpus(encoder: base.Encoder, corpus: corpora.Corpus) -> np.ndarray:
    """Returns float32[N, D], the vector of every row of the corpus."""
    chunks = [range(start, min(start + CHUNK, len(corpus))) for start in range(0, len(corpus), CHUNK)]
    return np.concatenate([encoder.encode([corpus.contents(row) for row in rows], "passage") for rows in chunks])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@functools.lru_cache(maxsize=CACHED_WORDS)
def _ngrams(word: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The word itself and its distinct 3- and 4-grams, ends marked: slot, place and sign of each.

    "mira" ─▶ <mira>  <mi mir ira ra>  <mir mira ira>
    """
    marked = f"<{word}>"
    grams = [marked, *(marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1))]
    # dict, not set: the order of a sum is part of its last bits, and a set's order differs between runs.
    codes = np.array([zlib.crc32(gram.encode()) for gram in dict.fromkeys(grams)], dtype=np.uint64)
    # CRC is linear, so like n-grams have like codes; a multiplication by the golden ratio parts them.
    mixed = codes * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed >> np.uint64(46)).astype(np.int64)
    sign = 1.0 - 2.0 * (mixed >> np.uint64(45) & np.uint64(1)).astype(np.float64)
    place = (mixed >> np.uint64(25) & np.uint64(0xFFFFF)).astype(np.int64)
    return slot, place, sign
