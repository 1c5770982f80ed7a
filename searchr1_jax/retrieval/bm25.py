"""Search by words: BM25 (Robertson and Zaragoza, 2009) over an inverted index, with bm25s.

    passages ─ terms ─▶ score of every (term, passage) pair, once ─▶ directory ─▶ mapped, not read
    query    ─ terms ─▶ sum of its terms' scores ─▶ the best rows

k1 = 0.9 and b = 0.4 are what the field's baselines use (Anserini), with Lucene's form of the formula; terms are
words of two letters and more in lower case, without English stop words, stemmed by Snowball's English stemmer.
"""

import array
from collections.abc import Callable
import logging
import os
import re
import threading
import time
from typing import Any

import numpy as np

from searchr1_jax.core import files
from searchr1_jax.retrieval import base, corpus as corpora, part

K1, B = 0.9, 0.4
# Measured on 50,000 and 150,000 passages of Wikipedia (38 distinct terms each).
PAIR_DISK_BYTES = 8.2  # of a term and a passage that holds it: score and row
PAIR_BUILD_BYTES = 40  # of these while they are sorted
ROW_BYTES = 72  # of a passage's list of terms, 4 bytes a term aside
READING_SHARE = 2.0  # seconds of building over those of reading the terms
PLANNED_ROWS = 1000  # at most, that a plan is made by
PROGRESS_ROWS = 4096  # between two calls of `progress`
_WORD = re.compile(r"\b\w\w+\b")
_thread = threading.local()  # a stemmer is for one thread


class BM25Ranker:
    """A Ranker by words over what `build` wrote, usable from several threads.

    A passage that shares no term with the query is never found; among equal scores the lower row comes first.
    """

    def __init__(self, directory: str | os.PathLike):
        self._index = _bm25s().BM25.load(directory, mmap=True, show_progress=False)

    def rank(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[Q, k] rows and float32[Q, k] BM25 scores, best first; -1 and -inf for "none"."""
        rows, scores = base.nothing_found(len(queries), k)
        for query, text in enumerate(queries):
            if ids := self._index.get_tokens_ids(_terms(text)):
                every = self._index.get_scores_from_ids(ids)
                found = _best(every, k)
                rows[query, : len(found)], scores[query, : len(found)] = found, every[found]
        return rows, scores


def build(
    corpus: corpora.Corpus, directory: str | os.PathLike, *, progress: Callable[[int], None] = lambda rows: None
) -> None:
    """Writes the index of a corpus into a directory, which appears when it is whole; `progress` is told the rows read.

    Holds the terms of the whole corpus in memory. Raises: ValueError where no passage holds a term.
    """
    number: dict[str, int] = {}
    documents = []
    for row in range(len(corpus)):
        words = _terms(corpus.contents(row))
        documents.append(array.array("i", [number.setdefault(word, len(number)) for word in words]))
        if (row + 1) % PROGRESS_ROWS == 0 or row + 1 == len(corpus):
            progress(row + 1)
    if not number:
        raise ValueError(
            f"no passage of {corpus.path} holds an English word; search it by vectors (--parts=scann or exact)"
        )
    index = _bm25s().BM25(method="lucene", k1=K1, b=B, csc_backend="numpy")
    index.index((documents, number), create_empty_token=False, show_progress=False)
    with files.whole(directory) as temporary:
        index.save(temporary, show_progress=False)


def _plan(wanted: part.Wanted) -> part.Estimate:
    """What the index of a corpus takes, at the lengths of and the speed with some passages, evenly chosen.

    Its files are mapped: as much of them is in memory as queries touch.
    """
    corpus = wanted.corpus
    assert corpus is not None  # it needs no vectors
    rows = np.unique(np.linspace(0, len(corpus) - 1, PLANNED_ROWS).astype(int))
    began = time.perf_counter()
    counts = [(len(words), len(set(words))) for words in (_terms(corpus.contents(int(row))) for row in rows)]
    seconds = time.perf_counter() - began
    words, distinct = np.mean(counts, axis=0) * len(corpus)
    disk_bytes = int(PAIR_DISK_BYTES * distinct)
    building_bytes = int(4 * words + ROW_BYTES * len(corpus) + PAIR_BUILD_BYTES * distinct)
    return part.Estimate(
        "BM25", disk_bytes, building_bytes, disk_bytes, READING_SHARE * seconds / len(rows) * len(corpus)
    )


def _build(making: part.Making) -> dict[str, Any]:
    if not (making.directory / "bm25").exists():
        rows = len(making.corpus)
        build(making.corpus, making.directory / "bm25", progress=lambda done: making.progress("BM25", done, rows))
    return {"k1": K1, "b": B}


def _open(opening: part.Opening) -> BM25Ranker:
    return BM25Ranker(opening.directory / "bm25")


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """int64[<= k]: the rows of the highest positive scores, best first, among equals the lower row."""
    floor = 0.0 if len(scores) <= k else max(0.0, np.partition(scores, -k)[-k])
    (above,) = np.nonzero(scores > floor)
    if floor > 0:
        above = np.concatenate([above, np.flatnonzero(scores == floor)[: k - len(above)]])
    return above[np.lexsort((above, -scores[above]))][:k]


def _terms(text: str) -> list[str]:
    """What of a text is searched for."""
    if not hasattr(_thread, "stemmer"):
        import Stemmer

        _thread.stop_words = frozenset(_bm25s().stopwords.STOPWORDS_EN)
        _thread.stemmer = Stemmer.Stemmer("english")
    words = [word for word in _WORD.findall(text.lower()) if word not in _thread.stop_words]
    return _thread.stemmer.stemWords(words)


def _bm25s():
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every step
    return bm25s


PART = part.Part(needs_vectors=False, plan=_plan, build=_build, open=_open, packages=("bm25s",))
