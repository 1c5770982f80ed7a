"""Both indexes against slow numpy, and the ways in which callers differ: batches, threads, meshes."""

import concurrent.futures
import importlib.util
import sys
import threading

import jax
import numpy as np
import pytest

from searchr1_jax.retrieval import exact_index
from searchr1_jax.retrieval import scann_index

needs_scann = pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="no ScaNN on this machine")
KINDS = [exact_index.ExactIndex, pytest.param(scann_index.ScannIndex, marks=needs_scann)]


def _vectors(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _slow_top_k(vectors, queries, k):
    """Rows and float64 scores; among equal scores the lower row."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_results_are_the_true_top_k(kind, k):
    vectors, queries = _vectors(301, 48), _vectors(37, 48, seed=1)
    rows, scores = kind(vectors).search(queries, k)
    expected_rows, expected_scores = _slow_top_k(vectors, queries, k)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=48 * 2**-24)  # D roundings of products below 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_does_not_exist_is_minus_one_and_minus_infinity(kind, rows):
    vectors = _vectors(rows, 8)
    found, scores = kind(vectors).search(vectors[:1], 5)
    expected, _ = _slow_top_k(vectors, vectors[:1], 5)
    assert found.tolist() == [expected[0].tolist() + [-1] * (5 - rows)]
    assert np.isfinite(scores[0, :rows]).all() and (scores[0, rows:] == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_give_no_results(kind):
    rows, scores = kind(_vectors(20, 8)).search(np.zeros((0, 8), np.float32), 3)
    assert rows.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_query_finds_the_first_rows_with_score_zero(kind):
    rows, scores = kind(_vectors(20, 8)).search(np.zeros((2, 8), np.float32), 3)
    assert rows.tolist() == [[0, 1, 2]] * 2 and not scores.any()


@pytest.mark.parametrize("kind", KINDS)
def test_among_equal_rows_the_lower_comes_first(kind):
    vectors = np.tile(_vectors(43, 32), (7, 1))  # row i equals rows i + 43, i + 86, …
    rows, _ = kind(vectors).search(vectors[:43], 5)
    np.testing.assert_array_equal(rows, np.arange(43)[:, None] + 43 * np.arange(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_does_not_depend_on_the_queries_beside_it(kind):
    index, queries = kind(_vectors(301, 48)), _vectors(37, 48, seed=1)
    rows, scores = index.search(queries, 10)
    for size in (1, 5, 16):
        parts = [index.search(queries[start : start + size], 10) for start in range(0, 37, size)]
        np.testing.assert_array_equal(rows, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(scores, np.concatenate([part[1] for part in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_results_of_one_thread(kind):
    index, queries = kind(_vectors(301, 48)), _vectors(40, 48, seed=1)
    rows, scores = index.search(queries, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: index.search(queries[i : i + 1], 3), range(40)))
    np.testing.assert_array_equal(rows, np.concatenate([result[0] for result in results]))
    np.testing.assert_array_equal(scores, np.concatenate([result[1] for result in results]))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_vectors_are_refused_by_name(kind):
    vectors = _vectors(20, 8)
    for bad in (np.nan, np.inf):
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


@needs_scann
def test_a_tree_finds_nearly_all_and_two_builds_agree():
    # 200 clusters: random directions have no neighbours worth finding.
    centres, noise = _vectors(200, 16), _vectors(20_000, 16, seed=1)
    vectors = np.repeat(centres, 100, axis=0) + 0.5 * noise
    queries = vectors[::401] + 0.05 * _vectors(50, 16, seed=2)
    index, again = scann_index.ScannIndex(vectors), scann_index.ScannIndex(vectors)
    rows, scores = index.search(queries, 10)
    expected, _ = _slow_top_k(vectors, queries, 10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), expected.tolist())]) > 0.97
    np.testing.assert_allclose(scores, np.einsum("QD,QkD->Qk", queries, vectors[rows]), atol=1e-5)
    np.testing.assert_array_equal(rows[7:8], index.search(queries[7:8], 10)[0])
    # A quarter of the leaves holds some 5,000 rows: all of them are found, and beyond them nothing.
    rows, scores = index.search(queries[:3], 12_000)
    np.testing.assert_array_equal(rows, again.search(queries[:3], 12_000)[0])  # the leaves show in it
    for found, products in zip(rows, scores):
        held = (found != -1).sum()
        assert 1_000 < held < 12_000
        assert (found[held:] == -1).all() and (products[held:] == -np.inf).all()
        assert len({*found[:held].tolist()}) == held and np.isfinite(products[:held]).all()


def test_a_machine_without_scann_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)  # the import fails, as without a wheel
    with pytest.raises(ImportError, match='"scann" .* x86-64 Linux .* retriever.index = "exact"'):
        scann_index.ScannIndex(_vectors(5, 8))


def _other_mesh():
    """Explicit, as the training's; of another device than the index's where there is one."""
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[-1:])


def test_the_exact_index_works_under_a_mesh_and_in_threads_without_one():
    vectors = _vectors(301, 48)
    index = exact_index.ExactIndex(vectors)
    expected = vectors[:20], index.search(vectors[:20], 3)[0]
    results = {}

    def search(name, mesh):
        if mesh is None:
            results[name] = index.search(expected[0], 3)[0]
        else:
            with jax.set_mesh(mesh):
                results[name] = index.search(expected[0], 3)[0]

    mesh = _other_mesh()
    with jax.set_mesh(mesh):
        results["made under a mesh"] = exact_index.ExactIndex(vectors).search(expected[0], 3)[0]
        for name, own in [("thread beside a mesh", None), ("thread with a mesh", mesh)]:
            thread = threading.Thread(target=search, args=(name, own))
            thread.start()
            thread.join()
        search("under a mesh", None)
        assert jax.sharding.get_abstract_mesh().axis_names == ("data", "fsdp", "tensor")  # restored
    assert len(results) == 4
    for name, rows in results.items():
        np.testing.assert_array_equal(rows, expected[1], err_msg=name)


def test_the_exact_index_compiles_once_whatever_the_batch_the_thread_and_the_mesh():
    index, queries = exact_index.ExactIndex(_vectors(77, 12)), _vectors(50, 12, seed=1)
    index.search(queries[:1], 3)
    programs = exact_index._top_k._cache_size()
    for size in (1, 2, 16, 17, 50):
        index.search(queries[:size], 4)
    with jax.set_mesh(_other_mesh()):
        index.search(queries, 3)
    thread = threading.Thread(target=index.search, args=(queries, 3))
    thread.start()
    thread.join()
    assert exact_index._top_k._cache_size() == programs
    index.search(queries, 5)
    assert exact_index._top_k._cache_size() == programs + 1  # the count does see a new program
