"""Answers that were given once, kept in a file: what was searched with can be searched again, to the bit.

    record   queries ─▶ file ─ what it lacks ─▶ Retriever ─▶ file      every answer comes out of the file
    replay   queries ─▶ file                                           a query it lacks is an error

One SQLite file: a table of answers by (k, query), and the identity of what gave them. Answers are durable when
`search` returns. Any number of threads and processes of one machine may share the file (its write-ahead log
does not work over network file systems).
"""

from collections.abc import Sequence
import json
import os
import pathlib
import sqlite3
import threading
import time

from searchr1_jax.core import types
from searchr1_jax.retrieval import base

_FORMAT = "1"
_FIELDS = ("id", "title", "text", "score")  # of a passage, as they are stored
_LOCKED_S = 60.0  # how long to wait for another process that is writing
_TABLES = """
create table if not exists about (name text primary key, value text not null);
create table if not exists answers (k integer, query text, passages text not null, primary key (k, query));
"""


class QueryCache:
    """A Retriever that remembers; safe to call from several threads.

    Args:
      retriever: whom to ask for what is missing; None: nobody, this is a replay.
      path: of the file. A recording makes it, a replay does not.
      identity: of what gives the answers: a hash of the index, the url of a server.
    Raises: ValueError when the file holds answers of another identity, is no such file, or is not there to be
      replayed.
    """

    def __init__(self, retriever: base.Retriever | None, path: str | os.PathLike, *, identity: str):
        self._retriever, self.path = retriever, pathlib.Path(path)
        if retriever is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_file():
            raise ValueError(f"there is no query cache {self.path} to replay; record it first, with mode 'record'")
        self._lock = threading.Lock()  # for the connection; nobody holds it while the retriever is asked
        uri = f"{self.path.absolute().as_uri()}?mode={'ro' if retriever is None else 'rwc'}"
        self._file = sqlite3.connect(uri, _LOCKED_S, isolation_level=None, check_same_thread=False, uri=True)
        try:
            about = self._about(identity)
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(f"{self.path} is not a query cache ({error}); give another path") from error
        if about != {"format": _FORMAT, "identity": identity}:
            self._file.close()
            raise ValueError(
                f"the query cache {self.path} is of {about.get('identity')!r} (format {about.get('format')}), not of"
                f" {identity!r} (format {_FORMAT}); give another path, or search with what it was recorded with"
            )

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """Returns what the file holds for each query, once the retriever was asked for what it lacked.

        Two that record a query at the same time both get the answer that was stored first. A query that a replayed file
        lacks is a RetrievalError.
        """
        base.check_k(k)
        found = self._read(queries, k)
        if missing := [query for query in dict.fromkeys(queries) if query not in found]:
            if self._retriever is None:
                cause = f'the query cache {self.path} has no answer for it with k = {k}; record it with mode "record"'
                raise base.RetrievalError(missing[0], cause, 0, len(missing))
            self._write(missing, k, self._retriever.search(missing, k))
            found |= self._read(missing, k)
        return [list(found[query]) for query in queries]

    def _about(self, identity: str) -> dict[str, str]:
        """Returns what the file says of itself, after it was told if it is new and to be recorded."""
        if self._retriever is not None:
            self._use_write_ahead_log()
            self._file.execute("pragma synchronous = full")
            self._file.execute("begin immediate")
            for statement in _TABLES.strip().splitlines():
                self._file.execute(statement)
            rows = [("format", _FORMAT), ("identity", identity)]
            self._file.executemany("insert or ignore into about values (?, ?)", rows)
            self._file.execute("commit")
        return dict(self._file.execute("select name, value from about"))

    def _use_write_ahead_log(self) -> None:
        """Waits for others that open or close the file: where a log begins or ends, SQLite gives up at once instead."""
        end = time.monotonic() + _LOCKED_S
        while True:
            try:
                self._file.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def _read(self, queries: Sequence[str], k: int) -> dict[str, list[types.Passage]]:
        found = {}
        with self._lock:
            for query in queries:
                row = self._file.execute("select passages from answers where k = ? and query = ?", (k, query))
                if (answer := row.fetchone()) is not None:
                    found[query] = _passages(answer[0])
        return found

    def _write(self, queries: Sequence[str], k: int, answers: Sequence[Sequence[types.Passage]]) -> None:
        rows = [(k, query, _text(answer)) for query, answer in zip(queries, answers, strict=True)]
        with self._lock:
            self._file.execute("begin immediate")
            try:
                self._file.executemany("insert or ignore into answers values (?, ?, ?)", rows)
                self._file.execute("commit")
            except BaseException:
                if self._file.in_transaction:  # a full disk has rolled it back already
                    self._file.execute("rollback")
                raise


def _text(passages: Sequence[types.Passage]) -> str:
    """As JSON, in which Python writes every float, infinities and NaN too, so that it reads back to the bit."""
    return json.dumps([[getattr(passage, field) for field in _FIELDS] for passage in passages])


def _passages(text: str) -> list[types.Passage]:
    return [types.Passage(**dict(zip(_FIELDS, values, strict=True))) for values in json.loads(text)]
