"""Cross-encoders: transformers' scores, and a ranker's candidates in their order."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from searchr1_jax.retrieval import corpus as corpora, rerank

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "bert_pairs"
TOLERANCE = 1e-5  # of float32 logits of about 2
CONTENTS = [f'"Title {i}"\n{" ".join(["kelu"] * (i % 7))} text {i}' for i in range(12)]


@pytest.fixture(scope="module")
def cross_encoder():
    return rerank.CrossEncoder(GOLDEN, devices=jax.devices()[:1], rows=4)


@pytest.fixture(scope="module")
def golden_pairs():
    expected = np.load(GOLDEN / "expected.npz")
    return [tuple(map(str, pair)) for pair in expected["pairs"]], expected["scores"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": c}) + "\n" for i, c in enumerate(CONTENTS)))
    return corpora.Corpus(path)


class Listed:
    """A ranker of fixed rows; the same for every query."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def rank(self, queries, k):
        self.asked.append(k)
        rows = np.array([(self.rows + [-1] * k)[:k]] * len(queries), np.int64).reshape(len(queries), k)
        return rows, np.where(rows == -1, -np.inf, 0).astype(np.float32)


class ByLength:
    """A cross-encoder to whom the better passage is the longer one; a query "same" likes all alike."""

    def score(self, pairs):
        return np.array([0 if query == "same" else len(passage) for query, passage in pairs], np.float32)


def test_scores_equal_those_of_transformers(cross_encoder, golden_pairs):
    pairs, expected = golden_pairs
    found = cross_encoder.score(pairs)
    assert found.dtype == np.float32 and np.abs(found - expected).max() <= TOLERANCE


def test_a_score_is_the_same_bits_alone_and_in_any_company(cross_encoder, golden_pairs):
    pairs, _ = golden_pairs
    together = cross_encoder.score(pairs * 3)
    np.testing.assert_array_equal(together, np.concatenate([cross_encoder.score([pair]) for pair in pairs * 3]))
    np.testing.assert_array_equal(cross_encoder.score(pairs[::-1]), together[: len(pairs)][::-1])
    several = rerank.CrossEncoder(GOLDEN, rows=4)  # on all devices
    np.testing.assert_array_equal(several.score(pairs[1:3] * 3), np.tile(together[1:3], 3))
    assert [len(each._model.programs) for each in (several, cross_encoder)] == [
        1,
        2,
    ]  # pairs of up to 16, and of up to 48 tokens
    assert cross_encoder.score([]).shape == (0,)


def test_candidates_come_in_the_order_of_their_new_scores(corpus, cross_encoder):
    ranker = Listed([3, 11, 0, 7, 5])
    queries = ["who wrote emma", "kelu"]
    rows, scores = rerank.Reranked(ranker, cross_encoder, corpus, candidates=4).rank(queries, 3)
    assert ranker.asked == [4] and rows.dtype == np.int64 and scores.dtype == np.float32
    for query, found, values in zip(queries, rows, scores, strict=True):
        slow = {row: cross_encoder.score([(query, CONTENTS[row])])[0] for row in (3, 11, 0, 7)}
        assert found.tolist() == sorted(slow, key=slow.get, reverse=True)[:3]
        assert values.tolist() == [slow[row] for row in found]


def test_a_passage_is_read_with_its_title(corpus):
    seen = []

    class Recording(ByLength):
        def score(self, pairs):
            seen.extend(pairs)
            return super().score(pairs)

    rerank.Reranked(Listed([3]), Recording(), corpus, candidates=1).rank(["q"], 1)
    assert seen == [("q", CONTENTS[3])]


def test_what_the_ranker_did_not_find_stays_minus_one_and_minus_infinity(corpus):
    rows, scores = rerank.Reranked(Listed([0, 1]), ByLength(), corpus, candidates=5).rank(["q", "same"], 4)
    assert rows.tolist() == [[1, 0, -1, -1], [0, 1, -1, -1]]
    lengths = [len(CONTENTS[1]), len(CONTENTS[0]), -np.inf, -np.inf]
    assert scores.tolist() == [lengths, [0, 0, -np.inf, -np.inf]]


def test_equal_scores_keep_the_rankers_order(corpus):
    order = [5, 2, 9, 0, 7, 1, 11, 3]
    rows, _ = rerank.Reranked(Listed(order), ByLength(), corpus, candidates=8).rank(["same"], 8)
    assert rows.tolist() == [order]


def test_as_many_candidates_are_read_as_passages_asked_for(corpus):
    ranker = Listed(list(range(12)))
    rows, _ = rerank.Reranked(ranker, ByLength(), corpus, candidates=2).rank(["q"], 6)
    assert ranker.asked == [6] and sorted(rows[0].tolist()) == list(range(6))


def test_no_queries_give_no_results(corpus):
    rows, scores = rerank.Reranked(Listed([1]), ByLength(), corpus, candidates=2).rank([], 3)
    assert rows.shape == scores.shape == (0, 3)


def test_wrong_arguments_are_refused_by_value(corpus, tmp_path):
    with pytest.raises(ValueError, match="k is 0"):
        rerank.Reranked(Listed([1]), ByLength(), corpus, candidates=2).rank(["q"], 0)
    directory = shutil.copytree(GOLDEN, tmp_path / "one_type")
    config = json.loads((GOLDEN / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"type_vocab_size": 1}))
    with pytest.raises(ValueError, match="knows 1 token type"):
        rerank.CrossEncoder(directory)
    with pytest.raises(ValueError, match="missing classifier.weight"):
        rerank.CrossEncoder(GOLDEN.parent / "bert_cls")


def test_a_score_that_is_not_finite_is_refused(corpus):
    class Broken:
        def score(self, pairs):
            return np.full(len(pairs), np.nan, np.float32)

    with pytest.raises(ValueError, match="not finite"):
        rerank.Reranked(Listed([1]), Broken(), corpus, candidates=2).rank(["q"], 1)
