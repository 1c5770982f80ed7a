"""What holds for both indexes of small worlds: slow numpy's results, whatever the batch and the thread."""

import concurrent.futures
import importlib.util

import numpy as np
import pytest
import true_nearest

from searchr1_jax.retrieval import exact_index, scann_index

needs_scann = pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="no ScaNN on this machine")
KINDS = [exact_index.ExactIndex, pytest.param(scann_index.ScannIndex, marks=needs_scann)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_results_are_the_true_top_k(kind, k):
    vectors, queries = true_nearest.unit(301, 48), true_nearest.unit(37, 48, seed=1)
    rows, scores = kind(vectors).search(queries, k)
    expected_rows, expected_scores = true_nearest.top_k(vectors, queries, k)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=48 * 2**-24)  # D roundings of products below 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_does_not_exist_is_minus_one_and_minus_infinity(kind, rows):
    vectors = true_nearest.unit(rows, 8)
    found, scores = kind(vectors).search(vectors[:1], 5)
    expected, _ = true_nearest.top_k(vectors, vectors[:1], 5)
    assert found.tolist() == [expected[0].tolist() + [-1] * (5 - rows)]
    assert np.isfinite(scores[0, :rows]).all() and (scores[0, rows:] == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_give_no_results(kind):
    rows, scores = kind(true_nearest.unit(20, 8)).search(np.zeros((0, 8), np.float32), 3)
    assert rows.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_query_finds_the_first_rows_with_score_zero(kind):
    rows, scores = kind(true_nearest.unit(20, 8)).search(np.zeros((2, 8), np.float32), 3)
    assert rows.tolist() == [[0, 1, 2]] * 2 and not scores.any()


@pytest.mark.parametrize("kind", KINDS)
def test_among_equal_rows_the_lower_comes_first(kind):
    vectors = np.tile(true_nearest.unit(43, 32), (7, 1))  # row i equals rows i + 43, i + 86, …
    rows, _ = kind(vectors).search(vectors[:43], 5)
    np.testing.assert_array_equal(rows, np.arange(43)[:, None] + 43 * np.arange(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_does_not_depend_on_the_queries_beside_it(kind):
    index, queries = kind(true_nearest.unit(301, 48)), true_nearest.unit(37, 48, seed=1)
    rows, scores = index.search(queries, 10)
    for size in (1, 5, 16):
        parts = [index.search(queries[start : start + size], 10) for start in range(0, 37, size)]
        np.testing.assert_array_equal(rows, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(scores, np.concatenate([part[1] for part in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_results_of_one_thread(kind):
    index, queries = kind(true_nearest.unit(301, 48)), true_nearest.unit(40, 48, seed=1)
    rows, scores = index.search(queries, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: index.search(queries[i : i + 1], 3), range(40)))
    np.testing.assert_array_equal(rows, np.concatenate([result[0] for result in results]))
    np.testing.assert_array_equal(scores, np.concatenate([result[1] for result in results]))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_vectors_are_refused_by_name(kind):
    vectors = true_nearest.unit(20, 8)
    for bad in (np.nan, np.inf, 3e38):  # the last is finite, its products are not
        broken = vectors.copy()
        broken[[7, 9], 3] = bad
        with pytest.raises(ValueError, match="2 of 20 index vectors are not finite, first row 7"):
            kind(broken)
        with pytest.raises(ValueError, match="2 of 20 query vectors are not finite, first row 7"):
            kind(vectors).search(broken, 3)
    with pytest.raises(ValueError, match="0 rows"):
        kind(vectors[:0])
    with pytest.raises(ValueError, match=r"index vectors have shape \[8\]"):
        kind(vectors[0])
    with pytest.raises(ValueError, match=r"query vectors have shape \[20, 7\]; make them \[N, 8\]"):
        kind(vectors).search(vectors[:, :7], 3)
    with pytest.raises(ValueError, match="k is 0"):
        kind(vectors).search(vectors, 0)
