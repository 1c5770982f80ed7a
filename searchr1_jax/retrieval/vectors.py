"""The vectors of a whole corpus: a job that may be killed at any moment, and the directory that it fills.

    vectors.json    what is in it: shape, dtype, corpus, encoder; written first, by whichever process is first
    vectors.bin     [N, D], row after row, little endian; bfloat16 as its 16 bits
    vectors.done    one byte a block of rows, 1 where its vectors are on disk

    process p of n:   block p, p + n, …  ─ encode ─▶ vectors.bin ─ flush ─▶ vectors.done ─ flush

A block is recorded only after its vectors have reached the disk, so a kill costs the blocks in progress and nothing
else. Which process did a block is not recorded: a job resumed with another number of them takes up what is missing,
and with the same encoder the files come out byte for byte as if nothing had happened. Bytes are written by position
rather than through a mapping, so that a full disk is an error and not a signal.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple, Protocol
import uuid

import ml_dtypes
import numpy as np

from searchr1_jax.retrieval import base, corpus as corpora

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_HEADER, _VECTORS, _DONE = "vectors.json", "vectors.bin", "vectors.done"


class KnownEncoder(base.Encoder, Protocol):
    """An encoder that can be told from others, as `text_encoder.TextEncoder` can."""

    dimensions: int  # D
    fingerprint: str  # of its weights
    settings: Any  # frozen dataclass of JSON values


class Header(NamedTuple):
    """What a directory of vectors holds."""

    rows: int  # N, of the corpus
    dimensions: int  # D
    dtype: str  # a key of DTYPES
    block_rows: int  # recorded together
    corpus: str  # the corpus' hash
    encoder: str  # the encoder's fingerprint
    settings: dict[str, Any]  # the encoder's

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def row_bytes(self) -> int:
        return self.dimensions * DTYPES[self.dtype].itemsize

    def span(self, block: int) -> range:
        """The corpus rows of a block."""
        return range(block * self.block_rows, min(self.rows, (block + 1) * self.block_rows))


def embed_corpus(
    encoder: KnownEncoder,
    corpus: corpora.Corpus,
    directory: str | os.PathLike,
    *,
    dtype: str = "float32",
    block_rows: int = 4096,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Writes the vectors of this process's share of a corpus, but for those that the directory already has.

    Args:
      directory: of this job alone; made where it is missing. Several processes share it.
      dtype: of the file; bfloat16 halves it and keeps 8 significant bits.
      block_rows: how many passages a kill may cost, for each process.
      process, processes: this is number `process` of `processes`; the number may be another after a restart.
      progress: called with the rows finished so far, by all processes, at the start and after each block.
    Raises: ValueError when the directory is of another job (with both jobs' values), the disk has no room, or a vector
      is not finite, by its corpus row; nothing is written of that block.
    """
    directory = pathlib.Path(directory)
    settings = dataclasses.asdict(encoder.settings)
    identity = corpus.sha256, encoder.fingerprint, settings
    header = Header(len(corpus), encoder.dimensions, dtype, block_rows, *identity)
    _claim(directory, header)
    size = header.rows * header.row_bytes
    with _grown(directory / _VECTORS, size) as vectors, _grown(directory / _DONE, header.blocks) as done:
        progress(_rows_done(directory, header))
        recorded = _recorded(directory, header)
        missing = [block for block in range(process, header.blocks, processes) if not recorded[block]]
        for block, texts in _read_ahead(corpus, header, missing):
            found = _checked(encoder.encode(texts, "passage"), header, block)
            _write(vectors, found.view(np.uint8).reshape(-1).data, block * block_rows * header.row_bytes)
            _write(done, b"\1", block)
            progress(_rows_done(directory, header))


def open_vectors(directory: str | os.PathLike) -> np.ndarray:
    """The finished vectors, [N, D] of float32 or bfloat16, mapped and read-only.

    Raises: ValueError when there are none, or when rows are missing, with their number.
    """
    directory = pathlib.Path(directory)
    header = read_header(directory)
    if missing := header.rows - _rows_done(directory, header):
        raise ValueError(
            f"{missing} of {header.rows} vectors are missing in {directory}; run the embedding job again to its end"
        )
    return np.memmap(directory / _VECTORS, DTYPES[header.dtype], "r", shape=(header.rows, header.dimensions))


def read_header(directory: str | os.PathLike) -> Header:
    """What a directory holds, finished or not. Raises: ValueError when it holds no vectors."""
    path = pathlib.Path(directory) / _HEADER
    if not path.is_file():
        raise ValueError(f"{directory} holds no vectors (no {_HEADER}); embed the corpus first")
    try:
        return Header(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}); remove {directory} and embed the corpus again") from error


def _claim(directory: pathlib.Path, header: Header) -> None:
    """Makes the directory this job's, or finds that it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _HEADER
    if not path.exists():
        strays = [name for name in (_VECTORS, _DONE) if (directory / name).exists()]
        if strays and not path.exists():  # looked at once more: another process may have begun in between
            raise ValueError(f"{directory} holds {strays} without {_HEADER}; remove them or use another directory")
        size, free = header.rows * header.row_bytes, shutil.disk_usage(directory).free
        if free < size:
            raise ValueError(
                f"vectors of [{header.rows}, {header.dimensions}] {header.dtype} take {size:,} bytes, and {directory}"
                f" has {free:,} left; make room or use dtype bfloat16"
            )
        part = directory / f"{_HEADER}.{uuid.uuid4().hex}"
        with open(part, "w") as file:
            file.write(json.dumps(header._asdict(), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(part, path)
        part.unlink()
        _sync_directory(directory)
    there, here = read_header(directory)._asdict(), header._asdict()
    differences = [f"{key} is {there[key]!r} there and {here[key]!r} here" for key in here if there[key] != here[key]]
    if differences:
        raise ValueError(f"{directory} is of another job: {'; '.join(differences)}; use another directory")


def _grown(path: pathlib.Path, size: int) -> io.FileIO:
    """The file, made and grown to its size (by holes, which read as zeros) where it is not yet."""
    file = io.FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    if os.fstat(file.fileno()).st_size < size:
        os.ftruncate(file.fileno(), size)
        os.fsync(file.fileno())
        _sync_directory(path.parent)
    return file


def _sync_directory(directory: pathlib.Path) -> None:
    """Makes new names in a directory survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_ahead(corpus: corpora.Corpus, header: Header, blocks: list[int]) -> Iterator[tuple[int, list[str]]]:
    """Each block's number and texts, the next one's being read while one is in use."""

    def read(block):
        return [corpus.contents(row) for row in header.span(block)]

    with futures.ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, block) for block in blocks[:1]]
        for number, block in enumerate(blocks):
            texts = coming.pop().result()
            coming = [reader.submit(read, following) for following in blocks[number + 1 : number + 2]]
            yield block, texts


def _checked(vectors: np.ndarray, header: Header, block: int) -> np.ndarray:
    """The block's vectors in the file's dtype, finite in it too."""
    span = header.span(block)
    if vectors.shape != (len(span), header.dimensions):
        raise ValueError(f"the encoder made {list(vectors.shape)} of {len(span)} texts, not [N, {header.dimensions}]")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, DTYPES[header.dtype])
    finite = base.finite_rows(vectors.astype(np.float32))
    if not finite.all():
        raise ValueError(
            f"the vector of corpus row {span[int(finite.argmin())]} is not finite, nor are"
            f" {(~finite).sum() - 1} more of rows {span[0]} to {span[-1]}; mend the encoder or that passage"
        )
    return vectors


def _write(file: io.FileIO, data: bytes | memoryview, offset: int) -> None:
    """Writes all of the data and waits until it is on the disk."""
    data = memoryview(data)
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
    os.fsync(file.fileno())


def _recorded(directory: pathlib.Path, header: Header) -> np.ndarray:
    """bool[blocks], which are finished; by any process, as of now."""
    path = directory / _DONE
    found = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
    return np.pad(found, (0, header.blocks - len(found))) == 1


def _rows_done(directory: pathlib.Path, header: Header) -> int:
    recorded = _recorded(directory, header)
    short = header.blocks * header.block_rows - header.rows  # what the last block lacks
    return int(recorded.sum()) * header.block_rows - (short if recorded[-1] else 0)
