"""The corpus as the user has it: a jsonl file read in place, one passage a line.

    {"id": "7", "contents": "\"Mira Talon\"\nMira Talon is a poet born in Kelu."}

    corpus.jsonl ─ first opening: every line checked ─▶ corpus.jsonl.offsets.npy
    row number ─▶ offset ─▶ os.pread ─▶ Passage            nothing of the corpus stays in memory

The sidecar is one array, int64[rows + 7]: a mark of this layout, the corpus' modification time in nanoseconds,
its SHA-256 in four words, the byte at which each row's line starts, and the corpus' size in bytes, which is
also where the last row ends. It counts as long as time and size are still the file's own, and is otherwise
built again.
"""

import array
from collections.abc import Callable
import hashlib
import json
import os
import re
import zlib

import numpy as np

from searchr1_jax.core import files, types

LAYOUT = 0x5EA2C402  # first word of a sidecar
_START = 6  # words before the offsets
_PROGRESS_BYTES = 1 << 26  # read between two calls of `progress`
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell it, no encoder and no server can read it
REPORTED_LINES = 10  # broken lines that an error message spells out; the others are counted


class Corpus:
    """Passages by row number, safe to read from several threads.

    Args:
      path: a jsonl file with one {"id": str, "contents": str} a line; blank lines are skipped.
      cache_dir: where the sidecar goes if the corpus' own folder cannot be written to.
      progress: called now and then, while the sidecar is built, with the bytes read so far.
    Attributes: path, absolute, of the file; sha256, hexadecimal, of its bytes.
    Raises: ValueError for broken lines, all in one message; no row at all; a sidecar that can be written nowhere.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ):
        self.path = os.path.abspath(path)
        self._file = open(self.path, "rb", buffering=0)
        stat = os.fstat(self._file.fileno())
        sidecars = [self.path + ".offsets.npy"]
        if cache_dir is not None:
            # Corpora of one name in two folders share the cache directory.
            folder = f"{zlib.crc32(os.path.dirname(self.path).encode()):08x}"
            sidecars.append(os.path.join(cache_dir, f"{os.path.basename(path)}.{folder}.offsets.npy"))
        for sidecar in sidecars:
            if (bounds := _read_sidecar(sidecar, stat)) is not None:
                break
        else:
            starts, digest = _scan(self._file.fileno(), self.path, progress)
            head = [LAYOUT, stat.st_mtime_ns, *np.frombuffer(digest, np.int64)]
            bounds = np.concatenate([head, starts, [stat.st_size]], dtype=np.int64)
            _write_sidecar(sidecars, bounds)
        self.sha256 = bounds[2:_START].tobytes().hex()
        self._bounds = bounds[_START:]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> types.Passage:
        """The row as a passage: its first line, quotation marks included, is the title; score 0."""
        line = self._line(row)
        title, _, text = line["contents"].partition("\n")
        return types.Passage(id=line["id"], title=title, text=text)

    def contents(self, row: int) -> str:
        """The row's contents, title line included."""
        return self._line(row)["contents"]

    def _line(self, row: int) -> dict:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)}: {self.path}")
        start, end = int(self._bounds[row]), int(self._bounds[row + 1])
        return json.loads(os.pread(self._file.fileno(), end - start, start))


def _scan(descriptor: int, path: str, progress: Callable[[int], None]) -> tuple[array.array, bytes]:
    """Checks every line; returns the offsets of those that hold a row, and the SHA-256 of all bytes."""
    starts, broken, count, offset = array.array("q"), [], 0, 0
    digest, told = hashlib.sha256(), 0
    with open(descriptor, "rb", closefd=False) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                starts.append(offset)
                if fault := _fault(line):
                    count += 1
                    if count <= REPORTED_LINES:
                        broken.append(f"line {number}: {fault}")
            offset += len(line)
            digest.update(line)
            if offset - told >= _PROGRESS_BYTES:
                told = offset
                progress(offset)
    if count:
        more = f"; and {count - len(broken)} more" if count > len(broken) else ""
        raise ValueError(
            f"{path}: {count} of {len(starts)} lines are not"
            f' {{"id": string, "contents": string}}; mend or remove them: {"; ".join(broken)}{more}'
        )
    if not starts:
        raise ValueError(f'{path} holds no row; write one {{"id": string, "contents": string}} a line')
    return starts, digest.digest()


def _fault(line: bytes) -> str | None:
    """What keeps a line from being a row, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 included
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return "not an object"
    for key in ("id", "contents"):
        if key not in row:
            return f"no {key!r}"
        if not isinstance(row[key], str):
            return f"{key!r} is not a string but {row[key]!r:.40}"
        if not row[key].isascii() and _HALF_PAIR.search(row[key]):
            return f"{key!r} has half of a surrogate pair, which is no character"
    return None


def _read_sidecar(path: str, stat: os.stat_result) -> np.ndarray | None:
    """The sidecar's array, mapped rather than read, or None if it is missing or another corpus'."""
    try:
        bounds = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = bounds.dtype == np.int64 and bounds.ndim == 1 and len(bounds) >= _START + 2
    mine = whole and (bounds[0], bounds[1], bounds[-1]) == (LAYOUT, stat.st_mtime_ns, stat.st_size)
    return bounds if mine else None


def _write_sidecar(paths: list[str], bounds: np.ndarray) -> None:
    """Writes the array at the first path that can be written."""
    errors = []
    for path in paths:
        try:
            with files.whole(path, shared=True) as part, open(part, "wb") as file:
                np.save(file, bounds)
            return
        except OSError as error:
            errors.append(f"{path} ({error.strerror})")
    raise ValueError(f"cannot write the corpus' offsets to {' nor '.join(errors)}; give a writable cache_dir")
