"""BM25 against its formula, a term and a passage at a time."""

import collections
import concurrent.futures
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from searchr1_jax.retrieval import bm25, corpus as corpora

CONTENTS = [
    '"Mira Talon"\nMira Talon is a poet born in Kelu. The poet lives.',
    '"Doru Talon"\nDoru Talon is a baker born in Kelu.',
    '"Mira Fesu"\nMira Fesu is a poet born in Vano, and Vano loves poets and poetry and songs of the sea.',
    "a\nI",
    '"Mira Fesu"\nMira Fesu is a poet born in Vano, and Vano loves poets and poetry and songs of the sea.',
]
# Stemmed by hand, with Snowball's rules in mind; stop words and single letters left out.
STEMS = {"lives": "live", "loves": "love", "poets": "poet", "poetry": "poetri", "songs": "song"}
STOP_WORDS = {"is", "in", "the", "and", "of"}


def _terms(text):
    words = [word for word in re.findall(r"\w+", text.lower()) if len(word) > 1 and word not in STOP_WORDS]
    return [STEMS.get(word, word) for word in words]


def _slow_scores(query, contents=CONTENTS):
    """float[N]; idf = ln(1 + (N - n + ½) / (n + ½)), a term's score idf · f / (f + k1 (1 - b + b · l / mean l))."""
    documents = [collections.Counter(_terms(text)) for text in contents]
    lengths = [document.total() for document in documents]
    scores = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for term in _terms(query):
            holders = sum(term in other for other in documents)
            idf = math.log(1 + (len(contents) - holders + 0.5) / (holders + 0.5))
            frequency = document[term]
            if frequency:
                damped = frequency + 0.9 * (1 - 0.4 + 0.4 * length * len(lengths) / sum(lengths))
                score += idf * frequency / damped
        scores.append(score)
    return np.array(scores)


def _write(path, contents):
    path.write_text("".join(json.dumps({"id": str(i), "contents": c}) + "\n" for i, c in enumerate(contents)))
    return corpora.Corpus(path)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bm25")
    bm25.build(_write(directory / "c.jsonl", CONTENTS), directory / "index")
    return bm25.BM25Ranker(directory / "index")


@pytest.mark.parametrize("query", ["poets born in Vano", "Mira", "poet poet baker", "sea of songs", "TALON!"])
def test_scores_are_those_of_the_formula_best_first_and_the_lower_row_among_equals(ranker, query):
    expected = _slow_scores(query)
    order = [row for row in sorted(range(len(CONTENTS)), key=lambda row: (-expected[row], row)) if expected[row] > 0]
    rows, scores = ranker.rank([query], 5)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    assert rows[0].tolist() == order + [-1] * (5 - len(order))
    np.testing.assert_allclose(scores[0, : len(order)], expected[order], rtol=1e-6)
    assert np.all(np.isneginf(scores[0, len(order) :]))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_fewer_are_the_first_of_more(ranker, k):
    queries = ["poet born in Vano", "Kelu", "Mira Fesu"]
    every_row, every_score = ranker.rank(queries, 5)
    rows, scores = ranker.rank(queries, k)
    np.testing.assert_array_equal(rows, every_row[:, :k])
    np.testing.assert_array_equal(scores, every_score[:, :k])


@pytest.mark.parametrize("query", ["", "the of and", "xyzzy", "?!"])
def test_a_query_without_a_known_term_finds_nothing(ranker, query):
    rows, scores = ranker.rank([query, "Mira"], 2)
    assert rows[0].tolist() == [-1, -1] and np.all(np.isneginf(scores[0])) and rows[1].tolist() == [0, 2]


def test_threads_find_what_one_does(ranker):
    queries = [" ".join(_terms(text)[i : i + 3]) for text in CONTENTS for i in range(6)] * 4
    rows, scores = ranker.rank(queries, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda query: ranker.rank([query], 3), queries))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in alone]), rows)
    np.testing.assert_array_equal(np.concatenate([scores for _, scores in alone]), scores)


def test_two_processes_write_the_same_bytes_and_a_moved_directory_is_the_same_index(tmp_path, ranker):
    corpus = _write(tmp_path / "c.jsonl", CONTENTS)
    program = (
        "import sys; from searchr1_jax.retrieval import bm25, corpus;"
        "bm25.build(corpus.Corpus(sys.argv[1]), sys.argv[2])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = [sys.executable, "-c", program, corpus.path, str(tmp_path / "first")]
    subprocess.run(done, check=True, env=environment)
    bm25.build(corpus, tmp_path / "second")
    read = lambda name: {p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())}
    assert read("first") == read("second") and len(read("first")) > 3
    (tmp_path / "first").rename(tmp_path / "moved")
    np.testing.assert_array_equal(bm25.BM25Ranker(tmp_path / "moved").rank(["poet"], 3)[1], ranker.rank(["poet"], 3)[1])


def test_a_corpus_without_a_word_is_refused_and_leaves_nothing(tmp_path):
    corpus = _write(tmp_path / "c.jsonl", ["a\nI", "?"])
    with pytest.raises(ValueError, match="no passage of .*c.jsonl holds an English word; search it by vectors"):
        bm25.build(corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()
