"""The retrieval benchmark at tiny sizes: what is drawn, how a curve is read, and every figure is there."""

import importlib.util
import json
import math
import os

import numpy as np
import pytest

from searchr1_jax.bench import retrieval
from searchr1_jax.retrieval import scann_index

KEYS = {
    "rows", "dimensions", "vectors", "at_recall_at_3", "recall_at_3", "recall_at_10", "build_s", "memory_bytes",
    "disk_bytes", "methods", "planned", "exact_qps",
}  # fmt: skip


def test_draws_share_their_clusters_and_have_unit_length(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 300)
    monkeypatch.setattr(retrieval, "CLUSTERS", 5)
    for seed in (0, 1):
        retrieval.draw(tmp_path / f"{seed}.npy", 1_000, 256, seed=seed)
    first, second = (np.load(tmp_path / f"{seed}.npy") for seed in (0, 1))
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    # Of one cluster: cos = 1 / (1 + 0.7²) = 0.671; of two, about 0. Each spreads by some 1/√256.
    cosines = second @ first.T
    same = cosines > 0.4
    assert cosines[same].mean() == pytest.approx(0.671, abs=0.01) and abs(cosines[~same].mean()) < 0.06
    assert same.mean() == pytest.approx(1 / 5, abs=0.02) and same.any(axis=1).all()


def test_queries_per_s_are_read_off_the_curve_at_the_recall():
    assert retrieval.at_recall([0.9, 1.0], [400.0, 100.0], 0.95) == pytest.approx(200)  # half way, logarithmic
    assert retrieval.at_recall([0.8, 0.9, 1.0], [800.0, 400.0, 100.0], 0.9) == pytest.approx(400)
    assert retrieval.at_recall([0.96, 0.99], [300.0, 100.0], 0.95) == 300  # not extrapolated
    assert math.isnan(retrieval.at_recall([0.5, 0.94], [300.0, 100.0], 0.95))


def test_the_points_around_the_fastest_that_finds_enough_are_chosen(monkeypatch):
    # A point: rows found of 3, a name.
    truth, queries = np.arange(30).reshape(3, 10), np.zeros((3, 2), np.float32)

    def use(point):
        found = truth.copy()
        found[:, point[0] :] = -1
        return lambda vectors, k: (found[: len(vectors), :k], truth)

    monkeypatch.setattr(retrieval, "_rate", lambda search, queries, step: rates.pop(0))
    slow, fast = [(1, "a"), (2, "a"), (3, "a"), (3, "A")], [(2, "b"), (3, "b"), (3, "B")]
    rates = [10.0, 9.0, 8.0, 7.0, 20.0, 9.0]  # three of each ladder's first point that finds all; the best counts
    assert retrieval.choose([slow, fast], use, queries, truth) == fast
    rates = [7.0, 8.0, 20.0, 9.0, 9.0, 10.0]
    assert retrieval.choose([slow, fast], use, queries, truth) == slow[1:]
    assert retrieval.choose([slow[:2], fast[:1]], use, queries, truth) == [(2, "b")]  # none: the most thorough


@pytest.mark.skipif(not scann_index.available(), reason="no ScaNN on this machine")
def test_every_figure_is_measured(tmp_path, monkeypatch):
    names = ["scann", "scann_without_soar", "exact"]
    names += ["hnsw"] if importlib.util.find_spec("faiss") else []
    monkeypatch.setattr(retrieval.measuring, "apart", lambda function, *arguments: function(*arguments))
    cores = os.sched_getaffinity(0)
    figures = retrieval.measure(names, 400, 16, queries=40, rounds=1, directory=tmp_path)
    assert os.sched_getaffinity(0) == cores
    record = json.loads(json.dumps(retrieval.summary(figures, 400, 16)))
    assert KEYS <= record.keys() and {f"{name}_qps" for name in names} <= record.keys()
    assert set(record["planned"]) == {"scann", "scann_without_soar"}
    for name in names:
        figure = record["methods"][name]
        assert figure["qps"] > 0 and figure["batched_qps"] > 0 and figure["build_s"] > 0
        assert figure["recall_at_3"] > (0.9 if name == "hnsw" else 0.999)
    if "hnsw" in names:
        assert record["scann_over_hnsw"] == pytest.approx(record["scann_qps"] / record["hnsw_qps"])
    assert record["methods"]["scann"]["disk_bytes"] > 400 * 16 * 4
