"""Finished episodes, kept on disk as they come: an evaluation that ended early goes on after them.

eval/<name>.parts/about.json     whose episodes these are; those of another policy or of other settings are dropped
eval/<name>.parts/00003.jsonl    what process 3 finished: figures, a tab, the episode; appended, a line each
eval/<name>.jsonl                all of them, sorted by question and sample, once the last one is there
"""

from collections.abc import Iterator, Mapping
import json
import pathlib
import shutil
from typing import Any, BinaryIO, NamedTuple

import jax

from searchr1_jax.core import files, parallel

Key = tuple[str, int]  # id of the question, sample


class _Place(NamedTuple):
    key: Key
    path: pathlib.Path
    offset: int  # of the episode in the file
    length: int


class Kept:
    """The parts of one evaluation; all processes make it, and call `merge`, together.

    Args:
      path: of the file that the parts become.
      about: what the episodes depend on, as JSON.
    """

    def __init__(self, path: pathlib.Path, about: Mapping[str, Any]):
        self._path, self._parts = path, path.with_suffix(".parts")
        written, sign = json.loads(json.dumps(about)), self._parts / "about.json"
        if parallel.is_first() and not (sign.exists() and files.read_json(sign, f"remove {self._parts}") == written):
            shutil.rmtree(self._parts, ignore_errors=True)
            files.write_json(sign, written)
        parallel.gather(None)  # the directory is there
        mine = [list(_lines(part)) for part in parallel.mine(sorted(self._parts.glob("*.jsonl")))]
        shares = parallel.gather([(place.key, figures) for lines in mine for place, figures in lines])
        self.figures: dict[Key, dict[str, Any]] = dict(
            pair for share in shares for pair in share
        )  # of all that is kept
        self._file = self._open()

    def _open(self) -> BinaryIO:
        path = self._parts / f"{jax.process_index():05}.jsonl"
        file = open(path, "ab+")
        ends = [place.offset + place.length + 1 for place, _ in _lines(path)]
        file.truncate(max(ends, default=0))  # a last line that a kill cut short
        return file

    def add(self, key: Key, figures: Mapping[str, Any], episode: Mapping[str, Any]) -> None:
        """Keeps an episode; a killed process loses none that was added before."""
        line = f"{json.dumps([key, figures])}\t{json.dumps(episode)}\n"
        self._file.write(line.encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def merge(self, *, write: bool) -> None:
        """Makes the file, where it is wanted, once all processes have added everything; the parts are gone then."""
        self.close()
        parallel.gather(None)
        if parallel.is_first():
            places = sorted(place for part in self._parts.glob("*.jsonl") for place, _ in _lines(part))
            if write:
                with files.whole(self._path) as temporary, open(temporary, "wb") as whole:
                    for place in places:
                        with open(place.path, "rb") as part:
                            part.seek(place.offset)
                            whole.write(part.read(place.length) + b"\n")
            shutil.rmtree(self._parts)
        parallel.gather(None)


def _lines(path: pathlib.Path) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """Where each episode of a part is, and its figures; without a last line that was cut short."""
    begin = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                head, _, episode = line[:-1].partition(b"\t")
                (identity, sample), figures = json.loads(head)
                yield _Place((identity, sample), path, begin + len(head) + 1, len(episode)), figures
            begin += len(line)
