"""Approximate inner-product search with ScaNN (Guo et al., 2020), on the CPU.

    few rows    every row is scored
    many rows   a tree of √N leaves ─▶ the nearest leaves ─▶ 4-bit codes ─▶ the best rescored by their vectors

    vectors[N, D], a memmap ─ build, a shard at a time ─▶ directory ─ load ─▶ ScannIndex ─ search ─▶ the shards' best
                                                                                 │                   merged
                              the cheapest search that finds enough ◀─ scann_part ─┘

ScaNN comes without TensorFlow here and only for x86-64 Linux, so it is imported when an index is made.
"""

from collections.abc import Callable
import concurrent.futures
import copy
import dataclasses
import json
import math
import os
import pathlib
import shutil
from typing import Any, NamedTuple, Self
import zlib

import numpy as np

from searchr1_jax.core import files
from searchr1_jax.retrieval import base, exact_index

BRUTE_FORCE_ROWS = 20_000  # below, scoring every row is faster than any tree, and exact
LEAVES_SHARE = 0.25  # of the leaves a query visits untuned; on real embeddings 5/10/25% found .68/.82/.945
CODED_BLOCKS = 256  # blocks of dimensions ScaNN can sum in 16 bits, its fast way
RECORD = "index.json"  # in an index's directory, written last; in a shard's, what the shard was made from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How one shard is built and, unless told otherwise, searched."""

    leaves: int  # of the tree; 0: no tree and no codes, every row is scored exactly
    leaves_searched: int  # by a query
    dimensions_a_code: int  # that one code of 4 bits stands for
    anisotropy: float = 0.2  # threshold of the anisotropic loss (Guo et al., eq. 7); 0.2 is ScaNN's for unit length
    soar: float | None = 1.5  # λ of SOAR (Sun et al., 2023): a row may lie in a second leaf too; None: in one only
    rescored: int = 200  # candidates of the codes that are scored by their vectors
    # Of the vectors they are rescored by. With "float32" the last bit of a score may differ from call to call: it
    # depends on the order of the candidates, which ScaNN draws. The others were never seen to.
    dtype: str = "bfloat16"
    training_rows: int = 100_000  # sampled, on which tree and codes are trained

    @classmethod
    def for_rows(cls, rows: int, dimensions: int) -> Self:
        """Those for a shard of so many rows: brute force where that is faster, else a tree of √N leaves."""
        leaves = 0 if rows < BRUTE_FORCE_ROWS else math.isqrt(rows)
        coded = max(2, math.ceil(dimensions / CODED_BLOCKS))
        return cls(leaves=leaves, leaves_searched=math.ceil(LEAVES_SHARE * leaves), dimensions_a_code=coded)


class _Shard(NamedTuple):
    first_row: int
    rows: int
    searcher: Any  # ScaNN's


class ScannIndex:
    """The rows of (nearly) highest inner product; any thread may search.

    A query's result depends neither on the queries beside it nor on threads (but see `Settings.dtype`), and two
    builds from the same vectors are equal. Scores are the inner products, with a tree to the precision of that dtype.

    Args:
      vectors: float[N, D], held in memory as one shard. `build` and `load` are for those on disk.
      settings: `Settings.for_rows` if None.
    Raises: ValueError for no vectors or not finite ones (ScaNN would abort the process); ImportError without ScaNN.
    """

    def __init__(self, vectors: np.ndarray, *, settings: Settings | None = None):
        base.check_matrix(vectors)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        base.check_finite(vectors, "index")
        self.settings = settings or Settings.for_rows(*vectors.shape)
        _check(self.settings, len(vectors))
        self._shards = [_Shard(0, len(vectors), _searcher(vectors, self.settings))]
        self.dimensions, self._threads = vectors.shape[1], 1

    @classmethod
    def load(cls, directory: str | os.PathLike, *, threads: int | None = None, **searched: int) -> Self:
        """The index that `build` wrote, wherever the directory lies now; `searched` are arguments of `searching`.

        Args:
          threads: that share the queries of one call; as many as there are cores if None.
        Raises: ValueError when the directory holds no whole index; ImportError without ScaNN.
        """
        directory = pathlib.Path(directory)
        if not (directory / RECORD).exists():
            raise ValueError(f"{directory} holds no whole ScaNN index; build it, which goes on where it was stopped")
        record, scann, index = json.loads((directory / RECORD).read_text()), scann_package(), cls.__new__(cls)
        index.settings, index.dimensions = Settings(**record["settings"]), record["dimensions"]
        index._threads = threads or os.cpu_count() or 1
        index._shards = [
            _Shard(first, stop - first, scann.load_searcher(str(directory / _name(number))))
            for number, (first, stop) in enumerate(_bounds(record["rows"], record["shards"]))
        ]
        return index.searching(**searched)

    def searching(self, **changed: int) -> Self:
        """The same index with other `leaves_searched` or `rescored`: searched less or more thoroughly."""
        index = copy.copy(self)
        index.settings = dataclasses.replace(self.settings, **changed)
        _check(index.settings, min(shard.rows for shard in self._shards))
        return index

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows and inner products, see `base.VectorIndex`. Raises: ValueError for wrong vectors or k < 1."""
        vectors = base.checked_queries(vectors, self.dimensions)
        rows, scores = base.nothing_found(len(vectors), k)

        # One by one: in a batch the last bits of a score depend on the batch's size, hence near ties too, and
        # short results are filled with row 0 and NaN. A tree is no faster in batches.
        def search_one(query):
            found, products = self._nearest(vectors[query], k)
            rows[query, : len(found)] = found
            scores[query, : len(found)] = products

        if min(self._threads, len(vectors)) > 1:  # ScaNN lets other threads run while it searches
            with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(search_one, range(len(vectors))))
        else:
            for query in range(len(vectors)):
                search_one(query)
        return rows, scores

    def _nearest(self, vector_D: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """At most k rows and products of all shards, best first; among equals the lower row."""
        wanted = max(k, self.settings.rescored)
        leaves = self.settings.leaves_searched or -1  # without a tree the number goes unread
        found, products = [], []
        for shard in self._shards:
            near = shard.searcher.search(vector_D, min(k, shard.rows), min(wanted, shard.rows), leaves)
            found.append(near[0].astype(np.int64) + shard.first_row)
            products.append(near[1])
        found, products = np.concatenate(found), np.concatenate(products)
        best = np.lexsort((found, -products))[:k]
        return found[best], products[best]


def build(
    vectors: np.ndarray,
    directory: str | os.PathLike,
    *,
    settings: Settings | None = None,
    shard_rows: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Writes an index of the vectors, holding one shard of them in memory at a time.

        directory/shard-00000/ … each renamed into place when whole      index.json, last

    Stopped at any moment and started again it keeps the whole shards that were made from the same vectors and
    settings, and ends with the files of a build that was never stopped.

    Args:
      vectors: float32 or bfloat16[N, D], finite; a memmap is read twice, first to check it.
      settings: of every shard; `Settings.for_rows` of the largest if None.
      shard_rows: of a shard at most; the rows are spread evenly.
      progress: told how many rows are done.
    Raises: ValueError when the vectors are not finite or there are none, or settings do not fit a shard;
      OSError when the disk has no room; ImportError without ScaNN.
    """
    base.check_matrix(vectors)
    rows, dimensions = vectors.shape
    shards = -(-rows // shard_rows)
    bounds = _bounds(rows, shards)
    settings = settings or Settings.for_rows(-(-rows // shards), dimensions)
    _check(settings, rows // shards)
    scann_package()
    record = {"dimensions": dimensions, "settings": dataclasses.asdict(settings)}
    records = [
        record | {"rows": stop - first, "checksum": _checksum(vectors[first:stop], first)} for first, stop in bounds
    ]
    directory, whole = pathlib.Path(directory), record | {"rows": rows, "shards": shards}
    for number, (first, stop) in enumerate(bounds):
        path = directory / _name(number)
        if _read(path / RECORD) != records[number]:
            (directory / RECORD).unlink(missing_ok=True)
            with files.whole(path) as partial:
                partial.mkdir()
                shard = np.ascontiguousarray(vectors[first:stop], dtype=np.float32)
                searcher = _searcher(shard, settings)
                try:
                    searcher.serialize(str(partial), relative_path=True)
                except RuntimeError as error:  # of C++, which forgets the cause
                    raise OSError(f"ScaNN could not write {partial} ({error}); is the disk full?") from error
                (partial / RECORD).write_text(json.dumps(records[number]))
        progress(stop)
    if _read(directory / RECORD) != whole:
        for path in directory.glob("*shard-*"):  # of a build with more shards, whole or not
            if path.name not in {_name(number) for number in range(shards)}:
                shutil.rmtree(path)
        files.write(directory / RECORD, json.dumps(whole))


def available() -> bool:
    """Whether ScaNN can be imported on this machine."""
    try:
        scann_package()
    except ImportError:
        return False
    return True


def _searcher(vectors: np.ndarray, settings: Settings):
    """ScaNN's searcher of float32[N, D]."""
    scann = scann_package()
    builder = scann.builder(vectors, min(settings.rescored, len(vectors)), "dot_product")
    if not settings.leaves:
        builder.score_brute_force()
        return builder.build()
    builder.tree(
        settings.leaves,
        settings.leaves_searched,
        training_sample_size=settings.training_rows,
        random_init=False,  # not ScaNN's default, random centres: their seed differs from build to build
        soar_lambda=settings.soar,
    )
    builder.score_ah(
        settings.dimensions_a_code,
        anisotropic_quantization_threshold=settings.anisotropy,
        training_sample_size=settings.training_rows,
    )
    builder.reorder(settings.rescored, quantize=scann.scann_builder.ReorderType[settings.dtype.upper()])
    return builder.build()


def _check(settings: Settings, rows: int) -> None:
    """Raises ValueError unless a shard of so many rows can be built and searched so."""
    if settings.leaves > (rows := min(rows, settings.training_rows)):
        raise ValueError(
            f"{settings.leaves} leaves for {rows} rows to train on; set leaves to √rows, or to 0 for no tree"
        )
    if settings.leaves and not 1 <= settings.leaves_searched <= settings.leaves:
        raise ValueError(f"leaves_searched is {settings.leaves_searched}; there are {settings.leaves}, search some")
    if settings.rescored < 1:
        raise ValueError(f"rescored is {settings.rescored}; rescore at least 1 candidate")
    if settings.dtype not in exact_index.DTYPES:
        raise ValueError(f"dtype is {settings.dtype!r}; set it to one of {', '.join(map(repr, exact_index.DTYPES))}")


def _checksum(vectors: np.ndarray, first_row: int) -> int:
    """CRC-32 of the vectors as float32; raises ValueError where one is not finite."""
    checksum = 0
    for _, block in exact_index.checked_blocks(vectors, first_row=first_row):
        checksum = zlib.crc32(np.ascontiguousarray(block).data, checksum)
    return checksum


def _bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """First row of each shard and the row after its last; their lengths differ by one at most."""
    return [(rows * number // shards, rows * (number + 1) // shards) for number in range(shards)]


def _name(number: int) -> str:
    return f"shard-{number:05}"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def scann_package() -> Any:
    """ScaNN's own module. Raises: ImportError where it has no wheel for this machine, or is not installed."""
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise ImportError(
            'the package "scann" cannot be imported here; it has wheels for x86-64 Linux only.'
            " Install it there (pip install scann), or search exactly: build with --parts=exact, set retriever.index ="
            ' "exact"'
        ) from error
    return scann_ops_pybind
