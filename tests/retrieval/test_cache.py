"""The query cache: what it answers, whom it asks, and what several threads and processes make of one file."""

import concurrent.futures
import math
import os
import pathlib
import signal
import sqlite3
import struct
import subprocess
import sys
import threading

import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, cache

ROOT = pathlib.Path(__file__).parents[2]


class _Numbered:
    """Answers a query with k passages that name it, k and the number of the call; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        call = len(self.asked)
        return [[types.Passage(id=f"{q}/{k}/{i}", title=f'"{q}"', text=f"{call}", score=i / 3) for i in range(k)]
                for q in queries]  # fmt: skip


def _record(path, retriever, identity="index 1"):
    return cache.QueryCache(retriever, path, identity=identity)


def _replay(path, identity="index 1"):
    return cache.QueryCache(None, path, identity=identity)


def test_only_what_is_missing_is_asked_for_and_once(tmp_path):
    retriever = _Numbered()
    recording = _record(tmp_path / "q.sqlite", retriever)
    first = recording.search(["a", "b", "a"], 2)
    second = recording.search(["c", "b", "c", "a"], 2)
    assert retriever.asked == [(["a", "b"], 2), (["c"], 2)]
    assert [[p.id for p in found] for found in first] == [["a/2/0", "a/2/1"], ["b/2/0", "b/2/1"], ["a/2/0", "a/2/1"]]
    assert [found[0].text for found in second] == ["2", "1", "2", "1"]  # the number of the call that was stored
    assert recording.search([], 2) == [] and len(retriever.asked) == 2


def test_another_k_is_another_query(tmp_path):
    retriever = _Numbered()
    recording = _record(tmp_path / "q.sqlite", retriever)
    assert len(recording.search(["a"], 3)[0]) == 3
    assert len(recording.search(["a"], 1)[0]) == 1
    assert retriever.asked == [(["a"], 3), (["a"], 1)]
    with pytest.raises(ValueError, match="k is 0"):
        recording.search(["a"], 0)


ODD_TEXT = "tab\tnul\0 “quotes” \U0001f600 line\u2028 lone \ud800 end\n"


def test_a_replay_gives_every_passage_back_to_the_bit(tmp_path):
    scores = [0.1, -0.0, 1 / 3, 5e-324, 1.7976931348623157e308, -math.inf, math.nan, 3.0000000000000004]
    passages = [types.Passage(id=f"é{i}", title='"T\\"', text=ODD_TEXT, score=s) for i, s in enumerate(scores)]

    class Odd:
        def search(self, queries, k):
            return [passages if query == "Ünïcode \0 ?" else [] for query in queries]

    recording = _record(tmp_path / "q.sqlite", Odd())
    recorded = recording.search(["Ünïcode \0 ?", "nothing"], 8)
    recording._file.close()
    replayed = _replay(tmp_path / "q.sqlite").search(["nothing", "Ünïcode \0 ?"], 8)[::-1]
    for answers in (recorded, replayed):
        assert answers[1] == []
        assert [(p.id, p.title, p.text) for p in answers[0]] == [(p.id, p.title, p.text) for p in passages]
        assert [struct.pack("d", p.score) for p in answers[0]] == [struct.pack("d", s) for s in scores]


def test_a_replay_names_what_it_lacks(tmp_path):
    path = tmp_path / "q.sqlite"
    _record(path, _Numbered()).search(["a"], 2)
    replaying = _replay(path)
    assert replaying.search(["a"], 2)[0][1].score == 1 / 3
    for queries, k, cause in [(["a", "b"], 2, "search for 'b'.*k = 2"), (["a"], 3, "search for 'a'.*k = 3")]:
        with pytest.raises(base.RetrievalError, match=cause + '; record it with mode "record"') as error:
            replaying.search(queries, k)
        assert str(path) in str(error.value)


def test_a_cache_of_another_identity_is_refused_with_both(tmp_path):
    path = tmp_path / "q.sqlite"
    _record(path, _Numbered(), "index 1").search(["a"], 1)
    for make in (lambda: _record(path, _Numbered(), "index 2"), lambda: _replay(path, "index 2")):
        with pytest.raises(ValueError, match="of 'index 1' .*not of 'index 2'"):
            make()
    assert _replay(path).search(["a"], 1)[0][0].id == "a/1/0"


def test_wrong_files_and_settings_are_refused_by_value(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no database " * 100)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("create table cats (name text)")
    for make, message in [
        (lambda: _replay(tmp_path / "none.sqlite"), "no query cache .*none.sqlite to replay; record it first"),
        (lambda: _record(text, _Numbered()), "notes.txt is not a query cache"),
        (lambda: _replay(text), "notes.txt is not a query cache"),
        (lambda: _replay(other), "other.sqlite is not a query cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    assert not (tmp_path / "none.sqlite").exists()


def test_what_a_failing_retriever_was_asked_is_not_stored(tmp_path):
    class Failing:
        def search(self, queries, k):
            raise base.RetrievalError(queries[0], "out of order", 3)

    path = tmp_path / "sub" / "q.sqlite"
    with pytest.raises(base.RetrievalError, match="out of order"):
        _record(path, Failing()).search(["a"], 1)
    retriever = _Numbered()
    _record(path, retriever).search(["a"], 1)
    assert retriever.asked == [(["a"], 1)]


def test_a_disk_that_is_full_is_named_and_what_was_stored_stays(tmp_path):
    class Long:
        def search(self, queries, k):
            return [[types.Passage(id="0", title="", text="x" * 100_000)] for _ in queries]

    recording = _record(tmp_path / "q.sqlite", Long())
    expected = recording.search(["a"], 1)
    (pages,) = recording._file.execute("pragma page_count").fetchone()
    recording._file.execute(f"pragma max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="disk is full"):
            recording.search(["b"], 1)
    assert recording.search(["a"], 1) == expected


def test_threads_that_record_the_same_query_get_the_answer_that_was_stored_first(tmp_path):
    barrier = threading.Barrier(8)
    numbers = iter(range(100))

    class Racing:
        def search(self, queries, k):
            barrier.wait(5)  # all eight have missed it before any of them stores it
            return [[types.Passage(id=str(next(numbers)), title="", text="")] for _ in queries]

    recording = _record(tmp_path / "q.sqlite", Racing())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: recording.search(["a"], 1), range(8)))
    assert all(answer == answers[0] for answer in answers)
    recording._file.close()
    assert _replay(tmp_path / "q.sqlite").search(["a"], 1) == answers[0]


RECORDER = """
import sys
from searchr1_jax.core import types
from searchr1_jax.retrieval import cache

class Squares:
    def search(self, queries, k):
        return [[types.Passage(id=q, title=q, text=str(int(q) ** 2), score=int(q) / 7)] for q in queries]

path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.stdin.readline()  # all processes open the new file at the same moment
recording = cache.QueryCache(Squares(), path, identity="squares")
for number in range(first, last):
    recording.search([str(number), str(number + 1)], 1)
    print(number, flush=True)
"""


def _recorder(path, first, last):
    command = [sys.executable, "-c", RECORDER, str(path), str(first), str(last)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def _squares(path, numbers):
    found = cache.QueryCache(None, path, identity="squares").search([str(n) for n in numbers], 1)
    return [(passages[0].text, passages[0].score) for passages in found]


def test_processes_share_one_new_file(tmp_path):
    path = tmp_path / "q.sqlite"
    processes = [_recorder(path, first, first + 40) for first in (0, 20, 40)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert _squares(path, range(81)) == [(str(n * n), n / 7) for n in range(81)]


def test_a_new_file_is_waited_for_while_another_process_begins_it(tmp_path):
    other = sqlite3.connect(tmp_path / "q.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")  # the moment in which SQLite does not wait by itself
    release = threading.Timer(0.3, other.execute, ("commit",))
    release.start()
    answers = _record(tmp_path / "q.sqlite", _Numbered()).search(["a"], 1)
    release.join()
    assert _replay(tmp_path / "q.sqlite").search(["a"], 1) == answers


def test_what_was_answered_survives_a_killed_process(tmp_path):
    path = tmp_path / "q.sqlite"
    process = _recorder(path, 0, 10**9)
    process.stdin.write("\n")
    process.stdin.flush()
    while int(process.stdout.readline()) < 20:
        pass
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].splitlines()
    answered = max([20, *map(int, rest[:-1])])
    assert _squares(path, range(answered + 2)) == [(str(n * n), n / 7) for n in range(answered + 2)]
