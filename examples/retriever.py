"""A retriever of your own: the passages whose whole title stands in the query, the longest titles first.

python -m searchr1_jax.train --config=… --workdir=… --config.retriever.index=examples.retriever:ByTitle
python -m searchr1_jax.serve --index=examples.retriever:ByTitle --corpus=corpus.jsonl
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from searchr1_jax.core import settings as settings_lib, types
from searchr1_jax.retrieval import corpus as corpora
from searchr1_jax.run import run_directory


class ByTitle:
    """A Retriever (see `searchr1_jax.retrieval.base`), made of the settings and the workdir of a run."""

    def __init__(self, settings: settings_lib.Settings, workdir: pathlib.Path):
        self.corpus = _corpus(settings, workdir)
        self.rows: dict[tuple[str, ...], list[int]] = {}  # by the words of a title
        for row in range(len(self.corpus)):
            self.rows.setdefault(_words(self.corpus[row].title), []).append(row)
        self.longest = max(map(len, self.rows))  # title, in words

    @staticmethod
    def identity(settings: settings_lib.Settings, workdir: pathlib.Path) -> str:
        """What the answers depend on beside the name: a cache of queries keeps them for this corpus alone."""
        return _corpus(settings, workdir).sha256[:16]

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """At most k passages a query, called from several threads; a score is the number of words of the title."""
        return [self._search(_words(query))[:k] for query in queries]

    def _search(self, words: tuple[str, ...]) -> list[types.Passage]:
        scores = {}  # of rows; longer titles come later
        for length in range(1, self.longest + 1):
            for start in range(len(words) - length + 1):
                scores |= dict.fromkeys(self.rows.get(words[start : start + length], ()), float(length))
        best = sorted(scores, key=lambda row: -scores[row])
        return [dataclasses.replace(self.corpus[row], score=scores[row]) for row in best]


def _corpus(settings: settings_lib.Settings, workdir: pathlib.Path) -> corpora.Corpus:
    return corpora.Corpus(run_directory.find(settings.data.corpus, workdir, "data.corpus"), workdir / "data")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))
