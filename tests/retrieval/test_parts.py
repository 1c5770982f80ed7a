"""A part of an index is a row of one table: planned, built, opened and known by it."""

import hashlib
import json

import numpy as np
import pytest

from searchr1_jax import index
from searchr1_jax.retrieval import building, part, parts, stored


class ByLength:
    """The rows whose contents are about as long as the query."""

    def __init__(self, opening):
        self.lengths = np.load(opening.directory / "lengths.npy")
        assert opening.parts["length"]["rows"] == len(self.lengths)

    def rank(self, queries, k):
        distances = np.abs(self.lengths[None] - np.array([[len(query)] for query in queries]))
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return order, -np.take_along_axis(distances, order, axis=1).astype(np.float32)


def _build(making):
    lengths = [len(making.corpus.contents(row)) for row in range(len(making.corpus))]
    np.save(making.directory / "lengths.npy", lengths)
    return {"rows": len(lengths), "seconds": 0.5}


LENGTH = part.Part(
    needs_vectors=False,
    plan=lambda wanted: part.Estimate("lengths", 8 * wanted.rows, 0, 0, None),
    build=_build,
    open=ByLength,
    identity=lambda record: {"rows": record["rows"]},
)


def test_one_row_is_all_that_a_new_part_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parts.PARTS, "length", LENGTH)
    contents = ["Mira", "Doru Kesa", "Kesa Talon, a poet"]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"p{i}", "contents": c}) + "\n" for i, c in enumerate(contents)))
    index.build(tmp_path / "i", corpus, building.Recipe(parts=("exact", "length"), dimensions=16))
    assert "lengths" in capsys.readouterr().out
    alone = index.query(tmp_path / "i", ["nine char", "four"], k=2, search="length")
    assert [[passage.id for passage in found] for found in alone] == [["p1", "p0"], ["p0", "p1"]]
    manifest = stored.read_manifest(tmp_path / "i")
    assert stored.default_search(manifest) == "hybrid" and manifest["parts"]["length"]["seconds"] == 0.5
    [[first, *_]] = index.query(tmp_path / "i", ["Mira"], k=3)
    assert first.id == "p0" and first.score == pytest.approx(2 / 61)  # the first by words and by vectors


def test_an_index_is_known_by_what_its_parts_say_of_their_records(tmp_path, monkeypatch):
    measured = {"recall_at_3": 0.9, "queries_per_s": 7.0, "leaves_searched": 9, "rescored": 40}
    manifest = {
        "format": 1,
        "corpus": {"path": "/c.jsonl", "sha256": "ab", "rows": 3},
        "encoder": {"path": "hashed", "fingerprint": "cd", "settings": {"dimensions": 16}},
        "parts": {"scann": measured, "exact": {}, "bm25": {"k1": 0.9, "b": 0.4}},
        "made_with": {"jax": "0.10"},
    }
    (tmp_path / stored.MANIFEST).write_text(json.dumps(manifest))
    known = {
        "format": 1,
        "corpus": {"sha256": "ab", "rows": 3},
        "encoder": {"fingerprint": "cd", "settings": {"dimensions": 16}},
        "parts": {"scann": {"leaves_searched": 9, "rescored": 40}, "exact": {}, "bm25": {"k1": 0.9, "b": 0.4}},
        "made_with": None,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    assert stored.identity(tmp_path) == f"index {digest} hybrid"


def test_a_part_that_is_the_vectors_alone_is_there_wherever_they_are():
    needs_nothing_else = [name for name, row in parts.PARTS.items() if row.needs_vectors and row.build is None]
    assert needs_nothing_else == ["exact"]
    assert stored.asked("exact", {"scann": {}, "bm25": {}}) == ["exact"]
    assert stored.asked("exact", {"bm25": {}}) == stored.asked("hybrid", {"bm25": {}}) == []
    assert stored.asked("hybrid", {"bm25": {}, "exact": {}, "scann": {}}) == ["bm25", "scann"]
