"""Text in, passages out, over one corpus in this process."""

import concurrent.futures
import importlib.util
import itertools
import json

import numpy as np
import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, local, rankers

needs_scann = pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="no ScaNN on this machine")
GIVEN = "Mira Doru Kesa Lobi Tanu Vero Zilo Pamu Gido Hera Nuvo Safi Beko Ruma Fito Dalu Osif Jemi".split()
FAMILY = "Talon Fesu Kobar Limen Vados Nuril Pegot Zamir Robin Sutak Dalev Gomus Birek Tovan Huli".split()
JOBS = "poet baker pilot judge monk".split()
PLACES = "Kelu Vano Tibor Samu".split()
NAMES = [f"{given} {family}" for given, family in itertools.product(GIVEN, FAMILY)]
ROWS = [(f"p{i}", f'"{name}"\n{name} is a {JOBS[i % 5]} born in {PLACES[i * 7 % 4]}.') for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"id": id, "contents": text}) + "\n" for id, text in ROWS))
    return path


@pytest.fixture(scope="module", params=["exact", pytest.param("scann", marks=needs_scann)])
def retriever(request, path):
    return local.build(path, index=request.param, dimensions=256)


def test_an_entitys_name_finds_its_passage(retriever):
    found = retriever.search(NAMES, 3)
    assert len(found) == len(NAMES) == len(GIVEN) * len(FAMILY)
    assert np.mean([passages[0].id == f"p{i}" for i, passages in enumerate(found)]) > 0.95


def test_a_passage_comes_with_its_title_text_and_score(retriever):
    [[first, second]] = retriever.search(["mira talon"], 2)
    assert first.title == '"Mira Talon"'
    assert first.text == "Mira Talon is a poet born in Kelu."
    query = retriever.ranker.encoder.encode(["mira talon"], "query")[0]
    passage = retriever.ranker.encoder.encode([ROWS[0][1]], "passage")[0]
    assert first.score == pytest.approx(float(query @ passage), abs=1e-5)
    assert 0 < second.score < first.score < 1


def test_more_than_the_corpus_holds_is_the_whole_corpus_best_first(retriever):
    [passages] = retriever.search(["Mira Talon"], 300)
    assert sorted(passage.id for passage in passages) == sorted(id for id, _ in ROWS)
    scores = [passage.score for passage in passages]
    assert scores == sorted(scores, reverse=True)


def test_no_queries_give_no_lists_and_no_passages_cannot_be_asked_for(retriever):
    assert retriever.search([], 3) == []
    with pytest.raises(ValueError, match="k is 0"):
        retriever.search(["Mira"], 0)


def test_threads_get_the_passages_of_one_batch(retriever):
    together = retriever.search(NAMES[:64], 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda name: retriever.search([name], 3)[0], NAMES[:64]))
    assert alone == together


def test_rows_the_index_does_not_have_are_left_out():
    class Encoder:
        def encode(self, texts, kind):
            assert kind == "query"
            return np.zeros((len(texts), 2), np.float32)

    class Index:
        def search(self, vectors, k):
            rows = np.array([[1, -1, -1], [-1, -1, -1]])
            return rows, np.where(rows == -1, -np.inf, 0.5).astype(np.float32)

    corpus = [types.Passage(id=str(i), title=f"t{i}", text="") for i in range(2)]
    found = local.LocalRetriever(corpus, rankers.ByVectors(Encoder(), Index())).search(["a", "b"], 3)
    assert found == [[types.Passage(id="1", title="t1", text="", score=0.5)], []]


def test_a_retrieval_error_says_query_cause_and_attempts():
    error = base.RetrievalError("who?", "no route", 3, 8)
    assert str(error) == "the search for 'who?' (one of 8 sent together) failed after 3 attempts: no route"
    assert (error.query, error.cause, error.attempts, error.batch) == ("who?", "no route", 3, 8)
    alone = base.RetrievalError("who?", "no route", 1)
    assert str(alone) == "the search for 'who?' failed after 1 attempt: no route"
