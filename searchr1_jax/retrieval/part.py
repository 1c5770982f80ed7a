"""What a part of an index is: one way to find the rows of a corpus, made once and kept on disk.

    Wanted  ─ plan ─▶ Estimate                     before anything is made
    Making  ─ build ─▶ files, and what the manifest records of them
    Opening ─ open ─▶ Ranker

A part is a file that ends with its `Part`, and a row of `parts.PARTS`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from searchr1_jax.retrieval import base, corpus as corpora, vectors as vector_files

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Wanted(NamedTuple):
    """What is known of an index before it is made."""

    rows: int  # of the corpus
    corpus: corpora.Corpus | None  # None: it is not there yet, and only parts that need vectors are planned
    dimensions: int  # of the vectors; 0: there are none
    dtype: str  # of the vectors on disk
    rows_dtype: str  # of the rows that exact search holds; empty: as on disk
    memory_bytes: int  # that building may take


class Estimate(NamedTuple):
    """What a part takes."""

    part: str
    disk_bytes: int
    building_bytes: int  # of memory
    serving_bytes: int  # of memory
    seconds: float | None  # to build it; None: not estimated


class Making(NamedTuple):
    """An index that is being made; its vectors are on disk, where a part needs them."""

    directory: pathlib.Path  # of the index
    corpus: corpora.Corpus
    encoder: vector_files.KnownEncoder | None  # None: no part needs vectors
    queries: Sequence[str]  # to tune and measure on
    memory_bytes: int  # that building may take
    target_recall: float  # at 3
    progress: Progress


class Opening(NamedTuple):
    """An index that is being opened."""

    directory: pathlib.Path  # of the index
    parts: dict[str, dict[str, Any]]  # what each part's `build` returned
    encoder: Callable[[], vector_files.KnownEncoder]  # opens that of the vectors
    rows_dtype: str  # of the rows that exact search holds; empty: as on disk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One way to find rows, as an index on disk has it."""

    needs_vectors: bool
    plan: Callable[[Wanted], Estimate]
    build: Callable[[Making], dict[str, Any]] | None  # None: the vectors are all it needs
    open: Callable[[Opening], base.Ranker]
    identity: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record  # what of the record decides answers
    packages: tuple[str, ...] = ()  # whose versions a manifest notes
    check: Callable[[], object] = lambda: None  # raises ImportError where it cannot be built
    in_memory: Callable[[np.ndarray], base.VectorIndex] | None = None  # an index of vectors, float32[N, D], at once
