"""The jsonl corpus and its sidecar of offsets."""

import concurrent.futures
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import corpus as corpora


def _write(path: pathlib.Path, rows: list[tuple[str, str]]) -> pathlib.Path:
    path.write_text("".join(json.dumps({"id": id, "contents": text}) + "\n" for id, text in rows))
    return path


def test_the_first_line_is_the_title_quotes_included_and_the_rest_the_text(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"id": "a", "contents": "\\"Mira Talon\\"\\nA poet.\\nBorn in Kelu.", "more": 1}\n'
        '{"contents": "only a title", "id": "b"}\n'
    )
    corpus = corpora.Corpus(path)
    assert len(corpus) == 2
    assert corpus[0] == types.Passage(id="a", title='"Mira Talon"', text="A poet.\nBorn in Kelu.", score=0.0)
    assert corpus[1] == types.Passage(id="b", title="only a title", text="")
    assert corpus.contents(0) == '"Mira Talon"\nA poet.\nBorn in Kelu.'


def test_blank_lines_are_skipped_and_the_last_newline_may_be_missing(tmp_path):
    path = tmp_path / "c.jsonl"
    row = '{{"id": "{0}", "contents": "Zoë {0}\\nè"}}'
    lines = ["", row.format(0), " ", "\r", row.format(1) + "\r", row.format(2)]
    path.write_bytes("\n".join(lines).encode())
    corpus = corpora.Corpus(path)
    assert [passage.id for passage in corpus] == ["0", "1", "2"]
    assert [passage.title for passage in corpus] == ["Zoë 0", "Zoë 1", "Zoë 2"]


def test_rows_outside_the_corpus_are_an_index_error(tmp_path):
    corpus = corpora.Corpus(_write(tmp_path / "c.jsonl", [("0", "a\nb")]))
    for row in (-1, 1):
        with pytest.raises(IndexError, match=f"row {row} of a corpus of 1"):
            corpus[row]


def test_all_broken_lines_are_reported_in_one_error(tmp_path):
    good = '{"id": "0", "contents": "a\\nb"}'
    broken = ["{oops", '{"contents": "x"}', '{"id": "1"}', '{"id": 7, "contents": "x"}', "[1]", '"s"']
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join([good, "", *broken, good, *["no"] * 6]))
    with pytest.raises(ValueError) as error:
        corpora.Corpus(path)
    message = str(error.value)
    assert str(path) in message and "12 of 14 lines" in message
    assert "line 3: not JSON" in message
    assert "line 4: no 'id'" in message and "line 5: no 'contents'" in message
    assert "line 6: 'id' is not a string but 7" in message and "line 7: not an object" in message
    assert "line 13:" in message and "line 14:" not in message and message.endswith("; and 2 more")


def test_bytes_that_are_not_utf8_are_a_broken_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "0", "contents": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        corpora.Corpus(path)


def test_halves_of_surrogate_pairs_and_nesting_without_end_are_broken_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    pair = '{"id": "0", "contents": "a \\ud83d\\ude00 smile"}'
    half = '{"id": "1", "contents": "a \\ud83d frown"}'
    path.write_text("\n".join([pair, half, "[" * 100_000, pair]))
    with pytest.raises(ValueError, match="2 of 4 lines") as error:
        corpora.Corpus(path)
    assert "line 2: 'contents' has half of a surrogate pair" in str(error.value)
    assert "line 3: not JSON" in str(error.value)
    path.write_text(pair)
    assert corpora.Corpus(path).contents(0) == "a \U0001f600 smile"


def test_a_corpus_without_rows_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no row"):
        corpora.Corpus(tmp_path / "c.jsonl")


def test_a_second_opening_reads_the_sidecar_instead_of_the_lines(tmp_path, monkeypatch):
    path = _write(tmp_path / "c.jsonl", [("0", "a\nb"), ("1", "c\nd")])
    corpora.Corpus(path)
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "c.jsonl.offsets.npy"]
    monkeypatch.setattr(corpora, "_scan", lambda *_: pytest.fail("the lines were read again"))
    assert corpora.Corpus(path)[1].title == "c"


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_corpus_gets_a_new_sidecar(tmp_path, change):
    path = _write(tmp_path / "c.jsonl", [("0", "aa\nb"), ("1", "c\nd")])
    corpora.Corpus(path)
    stat = path.stat()
    if change == "size":
        _write(path, [("0", "longer\nb"), ("1", "c\nd")])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size != stat.st_size
    else:
        _write(path, [("0", "a\nb"), ("1", "cc\nd")])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))
        assert path.stat().st_size == stat.st_size
    assert corpora.Corpus(path)[1].text == "d"


def test_a_sidecar_of_the_earlier_layout_is_replaced(tmp_path):
    path = _write(tmp_path / "c.jsonl", [(str(i), "a\nb") for i in range(9)])
    starts = [0, *np.cumsum([len(line) for line in path.read_bytes().splitlines(keepends=True)])]
    np.save(tmp_path / "c.jsonl.offsets.npy", np.array([path.stat().st_mtime_ns, *starts]))
    assert [passage.id for passage in corpora.Corpus(path)] == [str(i) for i in range(9)]


def test_the_hash_is_that_of_the_bytes_whether_the_lines_or_the_sidecar_are_read(tmp_path):
    path = _write(tmp_path / "c.jsonl", [("0", "a\nb"), ("1", "Zoë\nd")])
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [corpora.Corpus(path).sha256 for _ in range(2)] == [expected] * 2


def test_building_the_sidecar_tells_how_far_it_is(tmp_path, monkeypatch):
    path = _write(tmp_path / "c.jsonl", [(str(i), "x" * 80) for i in range(10)])
    monkeypatch.setattr(corpora, "_PROGRESS_BYTES", 250)
    told = []
    corpora.Corpus(path, progress=told.append)
    assert len(told) == 3 and told == sorted(told) and told[-1] <= path.stat().st_size
    corpora.Corpus(path, progress=lambda done: pytest.fail("there was nothing to build"))


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_sidecar_that_is_no_sidecar_is_replaced(tmp_path, garbage):
    path = _write(tmp_path / "c.jsonl", [("0", "a\nb")])
    sidecar = tmp_path / "c.jsonl.offsets.npy"
    sidecar.write_bytes(garbage)
    assert corpora.Corpus(path)[0].title == "a"
    digest = np.frombuffer(hashlib.sha256(path.read_bytes()).digest(), np.int64)
    stat = path.stat()
    assert np.load(sidecar).tolist() == [corpora.LAYOUT, stat.st_mtime_ns, *digest, 0, stat.st_size]


def test_the_sidecar_goes_to_the_cache_directory_when_the_folder_refuses_it(tmp_path):
    paths = [_write(_folder(tmp_path / name) / "c.jsonl", [(name, "a\nb")]) for name in ("one", "two")]
    for path in paths:
        # A folder in the sidecar's place refuses it whoever runs the test, root included.
        _folder(path.with_name("c.jsonl.offsets.npy"))
    with pytest.raises(ValueError, match="cannot write .* give a writable cache_dir"):
        corpora.Corpus(paths[0])
    cache = tmp_path / "cache"
    for path in paths * 2:
        assert corpora.Corpus(path, cache)[0].id == path.parent.name
    assert len(list(cache.glob("c.jsonl.*.offsets.npy"))) == len(os.listdir(cache)) == 2
    assert all(sorted(os.listdir(path.parent)) == ["c.jsonl", "c.jsonl.offsets.npy"] for path in paths)


def test_threads_read_the_same_rows(tmp_path):
    rows = [(str(i), f"title {i}\n{'x' * (i % 37)}") for i in range(300)]
    corpus = corpora.Corpus(_write(tmp_path / "c.jsonl", rows))
    order = np.random.default_rng(0).permutation(np.tile(np.arange(300), 5)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(corpus.contents, order))
    assert contents == [rows[i][1] for i in order]


def _folder(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    return path
