"""ScaNN's trees: shards on disk, stops and restarts, what a search may cost and what it may not change."""

import concurrent.futures
import dataclasses
import importlib.util
import resource
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import true_nearest

from searchr1_jax.retrieval import scann_index, scann_part, scann_plan

needs_scann = pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="no ScaNN on this machine")

ROWS, DIMENSIONS = 1_200, 16
SMALL = scann_index.Settings(
    leaves=20, leaves_searched=20, dimensions_a_code=2, anisotropy=0.2, soar=1.5, rescored=400, dtype="float32",
    training_rows=400,
)  # fmt: skip
TREE = dataclasses.replace(SMALL, leaves_searched=5, rescored=20, dtype="bfloat16")


@pytest.fixture(scope="module")
def vectors():
    return true_nearest.clustered(ROWS, DIMENSIONS, clusters=40)


@pytest.fixture(scope="module")
def queries():
    return true_nearest.clustered(60, DIMENSIONS, clusters=40, seed=1)


@pytest.fixture(scope="module")
def built(vectors, tmp_path_factory):
    """Three shards of 400 rows."""
    directory = tmp_path_factory.mktemp("built") / "scann"
    scann_index.build(vectors, directory, settings=TREE, shard_rows=500)
    return directory


def _files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def _same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@needs_scann
def test_all_leaves_and_candidates_of_all_shards_give_the_true_top_k(vectors, queries, tmp_path):
    scann_index.build(vectors, tmp_path / "scann", settings=SMALL, shard_rows=500)
    index = scann_index.ScannIndex.load(tmp_path / "scann")
    rows, scores = index.search(queries, 10)
    expected_rows, expected_scores = true_nearest.top_k(vectors, queries, 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=16 * 2**-22)  # D roundings of products below 3


@needs_scann
def test_one_shard_on_disk_is_searched_as_the_same_in_memory(vectors, queries, tmp_path):
    scann_index.build(vectors, tmp_path / "scann", settings=TREE, shard_rows=ROWS)
    index = scann_index.ScannIndex.load(tmp_path / "scann")
    _same(index.search(queries, 10), scann_index.ScannIndex(vectors, settings=TREE).search(queries, 10))


@needs_scann
@pytest.mark.parametrize("dtype, error", [("bfloat16", 2**-7), ("int8", 2**-5)])
def test_other_dtypes_change_the_scores_by_their_rounding(vectors, queries, dtype, error):
    index = scann_index.ScannIndex(vectors, settings=dataclasses.replace(SMALL, dtype=dtype))
    rows, scores = index.search(queries, 3)
    np.testing.assert_allclose(scores, np.einsum("QD,QkD->Qk", queries, vectors[rows]), atol=error)
    assert (rows[:, 0] == true_nearest.top_k(vectors, queries, 1)[0][:, 0]).mean() > 0.9


@needs_scann
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_memmap_is_built_as_the_array_it_holds(vectors, queries, tmp_path, dtype):
    held = vectors.astype(dtype)
    held.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", dtype, "r", shape=held.shape)
    scann_index.build(mapped, tmp_path / "scann", settings=SMALL, shard_rows=500)
    rows, _ = scann_index.ScannIndex.load(tmp_path / "scann").search(queries, 5)
    np.testing.assert_array_equal(rows, true_nearest.top_k(held.astype(np.float32), queries, 5)[0])


@needs_scann
@pytest.mark.parametrize("whole", [0, 1, 2, 3])
def test_a_build_that_was_killed_goes_on_to_the_same_index(built, vectors, tmp_path, monkeypatch, whole):
    directory, real, made = tmp_path / "scann", scann_index._searcher, []

    def killed(*arguments):
        if len(made) == whole:
            raise KeyboardInterrupt
        made.append(real(*arguments))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(scann_index, "_searcher", killed)
        if whole < 3:
            with pytest.raises(KeyboardInterrupt):
                scann_index.build(vectors, directory, settings=TREE, shard_rows=500)
            with pytest.raises(ValueError, match="holds no whole ScaNN index; build it"):
                scann_index.ScannIndex.load(directory)
            torn = directory / f".shard-{whole:05}.partial"  # killed while the shard was being written
            torn.mkdir(exist_ok=True)
            (torn / "dataset.npy").write_bytes(b"half")
        else:  # killed before the last file was renamed
            scann_index.build(vectors, directory, settings=TREE, shard_rows=500)
            (directory / "index.json").rename(directory / ".index.json.partial")
    made.clear()
    monkeypatch.setattr(scann_index, "_searcher", lambda *arguments: made.append(1) or real(*arguments))
    reached = []
    scann_index.build(vectors, directory, settings=TREE, shard_rows=500, progress=reached.append)
    assert len(made) == 3 - whole and reached == [400, 800, 1_200]
    assert _files(directory) == _files(built)


@needs_scann
def test_a_disk_that_is_full_is_named_and_with_room_the_build_goes_on(vectors, queries, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(vectors), limits[1]))  # of a file, smaller than the codes
    try:
        with pytest.raises(OSError, match="ScaNN could not write .*shard-00000.partial .*is the disk full"):
            scann_index.build(vectors, tmp_path / "index", shard_rows=len(vectors))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    scann_index.build(vectors, tmp_path / "index", shard_rows=len(vectors))
    found, _ = scann_index.ScannIndex.load(tmp_path / "index").search(queries, 1)
    assert (found == true_nearest.top_k(vectors, queries, 1)[0]).all()


@needs_scann
def test_only_shards_of_other_vectors_or_settings_are_built_anew(built, vectors, tmp_path, monkeypatch):
    directory = shutil.copytree(built, tmp_path / "scann")
    real, made = scann_index._searcher, []
    monkeypatch.setattr(scann_index, "_searcher", lambda *arguments: made.append(1) or real(*arguments))
    scann_index.build(vectors, directory, settings=TREE, shard_rows=500)
    assert not made
    other = vectors.copy()
    other[700] += 1  # in the second shard
    scann_index.build(other, directory, settings=TREE, shard_rows=500)
    assert len(made) == 1
    scann_index.build(other, directory, settings=SMALL, shard_rows=700)  # two shards of 600
    assert len(made) == 3 and not (directory / "shard-00002").exists()
    rows, _ = scann_index.ScannIndex.load(directory).search(other[700:701], 1)
    assert rows.tolist() == [[700]]


@needs_scann
def test_an_index_may_be_moved(built, queries, tmp_path, monkeypatch):
    expected = scann_index.ScannIndex.load(built).search(queries, 3)
    shutil.move(shutil.copytree(built, tmp_path / "here"), tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    _same(scann_index.ScannIndex.load("there").search(queries, 3), expected)


@needs_scann
def test_threads_and_the_queries_beside_change_nothing(built, queries):
    expected = scann_index.ScannIndex.load(built, threads=1).search(queries, 3)
    index = scann_index.ScannIndex.load(built, threads=4)
    for size in (1, 7, 60):
        parts = [index.search(queries[start : start + size], 3) for start in range(0, 60, size)]
        _same([np.concatenate(part) for part in zip(*parts)], expected)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: index.search(queries, 3), range(16)):
            _same(found, expected)


@needs_scann
def test_copies_of_a_row_are_all_found_once_and_in_order():
    vectors = np.tile(true_nearest.unit(300, DIMENSIONS), (4, 1))  # row i equals rows i + 300, …
    settings = dataclasses.replace(SMALL, dtype="bfloat16")
    rows, scores = scann_index.ScannIndex(vectors, settings=settings).search(vectors[:40], 4)
    np.testing.assert_array_equal(rows, np.arange(40)[:, None] + 300 * np.arange(4))
    assert (scores == scores[:, :1]).all()


@needs_scann
def test_more_than_there_is_leaves_places_empty(built, queries):
    rows, scores = scann_index.ScannIndex.load(built, leaves_searched=20).search(queries[:3], 1_500)
    assert (np.sort(rows)[:, 300:] == np.arange(ROWS)).all()
    assert (rows[:, ROWS:] == -1).all() and (scores[:, ROWS:] == -np.inf).all() and np.isfinite(scores[:, :ROWS]).all()
    # One leaf of each shard holds some of the rows, second copies included.
    rows, scores = scann_index.ScannIndex.load(built, leaves_searched=1).search(queries[:3], 1_500)
    for found, products in zip(rows, scores):
        held = (found != -1).sum()
        assert 3 <= held < 600 and len({*found[:held].tolist()}) == held
        assert (found[held:] == -1).all() and (products[held:] == -np.inf).all()
        assert (np.diff(products[:held]) <= 0).all()


@needs_scann
@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows_on_disk_are_found_exactly(tmp_path, rows):
    vectors = true_nearest.unit(rows, 8)
    scann_index.build(vectors, tmp_path / "scann", shard_rows=1_000_000)
    found, scores = scann_index.ScannIndex.load(tmp_path / "scann").search(vectors[:1], 5)
    assert found.tolist() == [true_nearest.top_k(vectors, vectors[:1], 5)[0][0].tolist() + [-1] * (5 - rows)]
    assert (scores[0, rows:] == -np.inf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_before_anything_is_built(vectors, tmp_path, bad):
    broken = vectors.copy()
    broken[[700, 900], 3] = bad
    with pytest.raises(ValueError, match="not finite, first row 700"):
        scann_index.build(broken, tmp_path / "scann", settings=TREE, shard_rows=500)
    assert not (tmp_path / "scann").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(leaves=500), "500 leaves for 400 rows to train on"),
        (dict(leaves_searched=21), "leaves_searched is 21; there are 20"),
        (dict(leaves_searched=0), "leaves_searched is 0; there are 20"),
        (dict(rescored=0), "rescored is 0"),
        (dict(dtype="float16"), "dtype is 'float16'; set it to one of 'float32', 'bfloat16', 'int8'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(vectors, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        settings = dataclasses.replace(TREE, **changed)
        scann_index.build(vectors, tmp_path / "scann", settings=settings, shard_rows=500)
    assert not (tmp_path / "scann").exists()


def test_an_empty_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 rows"):
        scann_index.build(np.zeros((0, 8), np.float32), tmp_path / "scann", shard_rows=10)


def test_a_machine_without_scann_is_told_what_to_do(vectors, built_or_none, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)  # the import fails, as without a wheel
    advice = '"scann" .* x86-64 Linux .* retriever.index = "exact"'
    assert not scann_index.available()
    with pytest.raises(ImportError, match=advice):
        scann_index.ScannIndex(vectors)
    with pytest.raises(ImportError, match=advice):
        scann_index.build(vectors, tmp_path / "scann", shard_rows=500)
    if built_or_none:
        with pytest.raises(ImportError, match=advice):
            scann_index.ScannIndex.load(built_or_none)


@pytest.fixture
def built_or_none(request):
    return request.getfixturevalue("built") if scann_index.available() else None


@needs_scann
def test_a_tree_of_default_settings_finds_nearly_all_and_two_builds_agree():
    vectors = true_nearest.clustered(20_000, 16, clusters=200)
    queries = true_nearest.clustered(50, 16, clusters=200, seed=1)
    index, again = scann_index.ScannIndex(vectors), scann_index.ScannIndex(vectors)
    rows, scores = index.search(queries, 10)
    expected, _ = true_nearest.top_k(vectors, queries, 10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), expected.tolist())]) > 0.97
    np.testing.assert_allclose(scores, np.einsum("QD,QkD->Qk", queries, vectors[rows]), rtol=2**-7)  # bfloat16's 8 bits
    # A quarter of the leaves holds some 5,000 rows and second copies of others: the leaves show in it.
    found = index.search(queries[:3], 12_000)
    assert all(1_000 < (held != -1).sum() < 12_000 for held in found[0])
    _same(again.search(queries[:3], 12_000), found)


@needs_scann
def test_tuning_finds_the_cheapest_search_and_judges_it_on_other_queries(built, vectors):
    index = scann_index.ScannIndex.load(built, threads=1)
    queries = true_nearest.clustered(200, DIMENSIONS, clusters=40, seed=2)
    little, much = (scann_part.tune(index, vectors, queries, target_recall=target) for target in (0.5, 0.995))
    assert (little.leaves_searched, little.rescored) < (much.leaves_searched, much.rescored)
    assert 0.45 < little.recall_at_3 < much.recall_at_3 and much.recall_at_3 > 0.97
    truth, _ = true_nearest.top_k(vectors, queries[1::2], 10)
    for measured in (little, much):
        assert measured.queries == 100 and measured.queries_per_s > 0
        told = dict(leaves_searched=measured.leaves_searched, rescored=measured.rescored)
        for k, recall in ((3, measured.recall_at_3), (10, measured.recall_at_10)):
            found, _ = scann_index.ScannIndex.load(built, **told).search(queries[1::2], k)
            hits = [len({*a} & {*b}) for a, b in zip(found.tolist(), truth[:, :k].tolist())]
            assert recall == pytest.approx(sum(hits) / (k * 100))
    with pytest.raises(ValueError, match="1 queries to tune on"):
        scann_part.tune(index, vectors, queries[:1], target_recall=0.9)


@needs_scann
def test_tuning_without_a_tree_has_nothing_to_choose_and_finds_all():
    vectors = true_nearest.unit(50, 8)
    index = scann_index.ScannIndex(vectors)
    measured = scann_part.tune(index, vectors, true_nearest.unit(20, 8, seed=1), target_recall=0.95)
    assert measured.recall_at_3 == measured.recall_at_10 == 1.0 and measured.leaves_searched == 0


def test_the_plan_agrees_with_what_half_a_million_rows_took():
    # Measured at 500,000 x 768 on ScaNN 1.4.2, synthetic clusters: anonymous memory and the sizes of files.
    settings = scann_index.Settings.for_rows(500_000, 768)
    assert (settings.leaves, settings.dimensions_a_code, settings.dtype) == (707, 3, "bfloat16")
    plan = scann_plan.plan(500_000, 768, shard_rows=500_000)
    assert plan.serving_bytes == pytest.approx(853.3e6, rel=0.1)
    assert plan.disk_bytes == pytest.approx(1_032.4e6, rel=0.02)
    assert plan.building_bytes == pytest.approx(3_801e6, rel=0.05)


@needs_scann
@pytest.mark.parametrize("soar", [None, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_plan_agrees_with_the_files_of_a_build(vectors, tmp_path, soar, dtype):
    wide = np.tile(vectors[:600], (1, 8))
    settings = dataclasses.replace(SMALL, soar=soar, dtype=dtype, training_rows=300)
    scann_index.build(wide, tmp_path / "scann", settings=settings, shard_rows=300)
    plan = scann_plan.plan(600, 128, settings=settings, shard_rows=300)
    sizes = {path: path.stat().st_size for path in (tmp_path / "scann").rglob("*.*")}
    counted = [size for path, size in sizes.items() if path.name != "ah_codebook.pb"]  # of a constant size, here most
    assert plan.part == "ScaNN, 2 shards"
    assert plan.disk_bytes == pytest.approx(sum(counted), rel=0.1)


def test_shards_are_as_large_as_memory_allows():
    rows = scann_plan.shard_rows(21_015_324, memory_bytes=int(24e9), dimensions=768)
    assert 1_000_000 < rows < 21_015_324

    def needed(shard):
        return scann_plan.plan(shard, 768, shard_rows=shard, dtype="bfloat16").building_bytes

    assert needed(rows) <= 24e9 < needed(rows + 1)
    assert scann_plan.shard_rows(5_000, memory_bytes=int(24e9), dimensions=768) == 5_000
    with pytest.raises(ValueError, match=r"0.1 GB of memory do not hold a shard of 20,000 rows .* takes 0.\d GB"):
        scann_plan.shard_rows(100_000, memory_bytes=int(0.1e9), dimensions=768)
