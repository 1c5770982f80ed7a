"""Files and directories that are there whole or not at all.

    write(path, text)                       a file; write_json and write_jsonl its content as JSON
    with whole(path) as temporary: …        a file or a directory, made at `temporary`; at `path` when the block ends

Both make the folders above. After an error nothing is left of them, and what stood at `path` stands there still. A
process that is killed leaves `.name.partial` behind, which the next attempt removes.
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any
import uuid


def write(path: str | os.PathLike, content: str | bytes, *, shared: bool = False) -> None:
    """Writes a file, text as UTF-8; see `whole`."""
    with whole(path, shared=shared) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    write(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any], *, shared: bool = False) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows), shared=shared)


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """Raises ValueError, with the remedy, where the file is broken; OSError where it cannot be read."""
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {remedy}") from error


@contextlib.contextmanager
def whole(path: str | os.PathLike, *, shared: bool = False) -> Iterator[pathlib.Path]:
    """Yields a path at which to make a file or a directory, which takes the place of `path` when the block ends.

    Args:
      shared: whether several processes may make it at the same time, all with the same content. Each then works under
        a name of its own, and a directory that is there already stays, for somebody may be reading in it.
    """
    path = pathlib.Path(path)
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.partial")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir() and not shared:
            shutil.rmtree(path)
        try:
            temporary.replace(path)
        except OSError:  # no directory takes the place of one that holds something
            if not (shared and temporary.is_dir() and path.is_dir()):
                raise
    finally:
        _remove(temporary)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
