"""Indexes on disk: what they find, what they refuse, and that interrupting a build changes nothing."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

from searchr1_jax.retrieval import bm25, building, corpus as corpora, embed, rankers, stored, vectors as vector_files

SCANN = "scann" if importlib.util.find_spec("scann") else "exact"  # what there is here
ENCODER = pathlib.Path(__file__).parents[1] / "golden" / "bert_mean"
NAMES = [f"{given} {family}" for given in "Mira Doru Kesa Lobi Tanu".split() for family in "Talon Fesu Kobar".split()]
JOBS = "poet baker pilot judge".split()
CONTENTS = [f'"{name}"\n{name} is a {JOBS[i % 4]} born in Kelu.' for i, name in enumerate(NAMES)]
QUERIES = ["Mira Talon", "which baker is called Fesu", "Kobar the judge"]
RECIPE = building.Recipe(
    parts=(SCANN, "bm25"), encoder=stored.HASHED, settings={}, dimensions=64, dtype="float32",
    memory_bytes=10**9, target_recall=0.95,
)  # fmt: skip
quiet = lambda what, done, total: None


def _write(path: pathlib.Path, contents=CONTENTS) -> corpora.Corpus:
    path.write_text("".join(json.dumps({"id": f"p{i}", "contents": c}) + "\n" for i, c in enumerate(contents)))
    return corpora.Corpus(path)


def _build(directory: pathlib.Path, corpus: corpora.Corpus, recipe=RECIPE, progress=quiet):
    queries = building.sample_queries(corpus, count=8)
    building.build(recipe, corpus, building.make_encoder(recipe), directory, queries, progress)


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus and an index of it, not to be changed."""
    directory = tmp_path_factory.mktemp("made")
    corpus = _write(directory / "c.jsonl")
    _build(directory / "index", corpus)
    return corpus, directory / "index"


@pytest.fixture
def copied(made, tmp_path):
    """Both once more, to be changed."""
    shutil.copytree(made[1].parent, tmp_path / "copy")
    index = tmp_path / "copy" / "index"
    manifest = json.loads((index / stored.MANIFEST).read_text())
    manifest["corpus"]["path"] = str(index.parent / "c.jsonl")
    (index / stored.MANIFEST).write_text(json.dumps(manifest))
    return index


def _by_hand(corpus, k):
    """Rows and scores of the best k inner products of each query."""
    encoder = embed.HashedNgramEncoder.fit(corpus, dimensions=64)
    products = encoder.encode(QUERIES, "query") @ encoder.encode(CONTENTS, "passage").T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(products, order, axis=1)


@pytest.mark.parametrize("search", [SCANN, "exact"])
def test_by_vectors_the_rows_of_the_highest_inner_products_are_found(made, search):
    corpus, index = made
    found = stored.open_index(index, search=search).search(QUERIES, 4)
    rows, products = _by_hand(corpus, 4)
    assert [[p.id for p in passages] for passages in found] == [[f"p{row}" for row in query] for query in rows]
    np.testing.assert_allclose([[p.score for p in passages] for passages in found], products, atol=1e-2 / 2)
    assert found[0][0].title == '"Mira Talon"'


def test_by_words_it_is_bm25_and_hybrid_is_both_fused(made):
    corpus, index = made
    words = bm25.BM25Ranker(index / "bm25").rank(QUERIES, 100)[0]
    vectors = _by_hand(corpus, 100)[0]
    expected = [
        rankers.fuse([by_words[by_words >= 0].tolist(), by_vectors.tolist()])[:3]
        for by_words, by_vectors in zip(words, vectors, strict=True)
    ]
    for search in ("hybrid", ""):
        found = stored.open_index(index, search=search).search(QUERIES, 3)
        assert [[p.id for p in passages] for passages in found] == [[f"p{row}" for row, _ in q] for q in expected]
        assert found[0][0].score == pytest.approx(expected[0][0][1])
    [alone] = stored.open_index(index, search="bm25").search(["Mira Talon"], 1)
    assert alone[0].id == "p0"


def test_the_manifest_says_what_it_was_made_of_and_how_well_it_finds(made):
    corpus, index = made
    manifest = stored.read_manifest(index)
    assert manifest["corpus"] == {"path": corpus.path, "sha256": corpus.sha256, "rows": 15}
    assert manifest["vectors"] == {"dtype": "float32", "dimensions": 64}
    assert manifest["parts"]["bm25"] == {"k1": 0.9, "b": 0.4}
    if SCANN == "scann":
        assert manifest["parts"]["scann"]["recall_at_3"] == 1.0  # so few rows are all scored
    assert not (index / stored.PLANNED).exists()


class Stopped(Exception):
    pass


def test_a_build_stopped_anywhere_goes_on_and_ends_with_the_same_files(made, tmp_path):
    corpus, index = made
    expected, stages = _files(index), []
    _build(tmp_path / "undisturbed", corpus, progress=lambda what, done, total: stages.append((what, done)))
    assert {what for what, _ in stages} >= {"embedding", "BM25"}
    for stop_at in range(len(stages)):
        directory, calls = tmp_path / f"stopped-{stop_at}", iter(range(len(stages)))

        def progress(what, done, total, calls=calls, stop_at=stop_at):
            if next(calls) == stop_at:
                raise Stopped

        with pytest.raises(Stopped):
            _build(directory, corpus, progress=progress)
        begun = "the beginning of an index; finish it" if stages[stop_at][0] != "counting n-grams" else "no index; make"
        with pytest.raises(ValueError, match=f"holds {begun}"):
            stored.open_index(directory)
        _build(directory, corpus)
        actual = _files(directory)
        assert actual.keys() == expected.keys()
        for name in expected.keys() - {stored.MANIFEST}:  # its queries/s differ
            assert actual[name] == expected[name], name
        for name in ("corpus", "encoder", "vectors"):
            assert stored.read_manifest(directory)[name] == stored.read_manifest(index)[name]


@pytest.mark.parametrize(
    "changes, said", [({"dimensions": 32}, "whose encoder is"), ({"parts": ("bm25", "exact")}, "whose parts is")]
)
def test_another_recipe_is_refused_where_an_index_lives(copied, changes, said):
    if changes.get("parts") and SCANN == "exact":
        changes = {"parts": ("bm25",), "encoder": ""}
    before = _files(copied)
    with pytest.raises(ValueError, match=rf"holds an index {said} .*, not .*; name another --index, or remove that"):
        _build(copied, corpora.Corpus(copied.parent / "c.jsonl"), dataclasses.replace(RECIPE, **changes))
    assert _files(copied) == before


def test_another_corpus_is_refused_with_both_hashes(copied):
    held = corpora.Corpus(copied.parent / "c.jsonl").sha256
    other = _write(copied.parent / "other.jsonl", CONTENTS[::-1])
    with pytest.raises(ValueError, match=rf"SHA-256 {held}, but .*other.jsonl has 15 rows and {other.sha256}"):
        stored.open_index(copied, corpus=other.path)
    (copied.parent / "c.jsonl").rename(copied.parent / "moved.jsonl")
    with pytest.raises(ValueError, match=r"was .*c.jsonl, which does not exist; say where it is \(--corpus\)"):
        stored.open_index(copied)
    assert stored.open_index(copied, corpus=str(copied.parent / "moved.jsonl")).search(["Mira Talon"], 1)


def test_another_encoder_is_refused_with_both_fingerprints(copied):
    held = stored.read_manifest(copied)["encoder"]["fingerprint"]
    idf = np.load(copied / "encoder" / "idf.npy")
    np.save(copied / "encoder" / "idf.npy", idf * 2)
    found = embed.HashedNgramEncoder(dimensions=64, idf=idf * 2).fingerprint
    assert found != held
    with pytest.raises(ValueError, match=rf"made with the encoder {held} \(hashed\), but hashed is {found}"):
        stored.open_index(copied, search="exact")
    assert stored.open_index(copied, search="bm25").search(["Mira Talon"], 1)  # which needs none


def test_frequencies_counted_on_another_corpus_are_counted_again(made, tmp_path):
    expected = stored.read_manifest(made[1])["encoder"]["fingerprint"]
    for corpus, same in [(_write(tmp_path / "other.jsonl", CONTENTS[:3]), False), (made[0], True)]:
        encoder = building.fitted(building.make_encoder(RECIPE), corpus, tmp_path, quiet)
        assert (encoder.fingerprint == expected) == same
        building.keep(encoder, corpus, tmp_path)
        kept = building.fitted(building.make_encoder(RECIPE), corpus, tmp_path, lambda *_: pytest.fail("counted again"))
        assert kept.fingerprint == encoder.fingerprint


def test_another_corpus_leaves_an_index_as_it_is(copied):
    before = _files(copied)
    with pytest.raises(ValueError, match="holds an index whose corpus is .*, not .*; name another --index"):
        _build(copied, _write(copied.parent / "other.jsonl", CONTENTS[:3]))
    assert _files(copied) == before


def test_a_build_goes_on_though_the_corpus_has_moved(made, tmp_path):
    corpus = _write(tmp_path / "c.jsonl")
    directory = tmp_path / "index"

    def stop(what, done, total):
        if what == "embedding":
            raise Stopped

    with pytest.raises(Stopped):
        _build(directory, corpus, progress=stop)
    assert (directory / stored.PLANNED).exists()
    moved = corpora.Corpus((tmp_path / "c.jsonl").rename(tmp_path / "moved.jsonl"))
    _build(directory, moved)
    assert not (directory / stored.PLANNED).exists() and stored.read_manifest(directory)["corpus"]["path"] == moved.path


def test_an_encoder_that_has_moved_is_asked_for(made, tmp_path):
    corpus, _ = made
    shutil.copytree(ENCODER, tmp_path / "encoder")
    recipe = dataclasses.replace(RECIPE, parts=("exact",), encoder=str(tmp_path / "encoder"))
    _build(tmp_path / "index", corpus, recipe)
    expected = stored.open_index(tmp_path / "index").search(QUERIES, 2)
    moved = (tmp_path / "encoder").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"was .*/encoder, which does not exist; say where it is \(--encoder\)"):
        stored.open_index(tmp_path / "index")
    assert stored.open_index(tmp_path / "index", encoder=str(moved)).search(QUERIES, 2) == expected
    _build(tmp_path / "index", corpus, dataclasses.replace(recipe, encoder=str(moved)))  # and is still the same


def test_an_index_of_one_passage_finds_it(tmp_path):
    _build(tmp_path / "index", _write(tmp_path / "c.jsonl", CONTENTS[:1]))
    for search in (SCANN, "exact", "bm25", "hybrid"):
        found = stored.open_index(tmp_path / "index", search=search).search(["Mira Talon"], 3)
        assert [passage.id for passage in found[0]] == ["p0"]


def test_a_broken_manifest_is_named(copied):
    (copied / stored.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is no JSON \(.*; remove the index and build it again"):
        stored.open_index(copied)


def test_what_is_not_there_is_refused_by_name(made, tmp_path):
    corpus, index = made
    with pytest.raises(ValueError, match=f"{tmp_path} holds no index; make it with python -m searchr1_jax.index build"):
        stored.open_index(tmp_path)
    with pytest.raises(ValueError, match="search 'faiss' is unknown; choose from"):
        stored.open_index(index, search="faiss")
    words = dataclasses.replace(RECIPE, parts=("bm25",), encoder="")
    _build(tmp_path / "words", corpus, words)
    assert not (tmp_path / "words" / "vectors").exists()
    assert stored.open_index(tmp_path / "words").search(["Mira Talon"], 1)[0][0].id == "p0"
    for search in ("exact", "hybrid", "scann"):
        with pytest.raises(ValueError, match=rf"search '{search}' is not possible: .* holds \['bm25'\]"):
            stored.open_index(tmp_path / "words", search=search)
    (tmp_path / "words" / stored.MANIFEST).write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has format 0, and this version reads 1; build it again"):
        stored.read_manifest(tmp_path / "words")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"parts": ()}, r"--parts is \[\]; name some of"),
        ({"parts": ("bm25", "bm25")}, "each once"),
        ({"parts": ("faiss",)}, r"--parts is \['faiss'\]"),
        ({"parts": ("bm25",)}, "an encoder belongs to scann and exact, and to them alone"),
        ({"target_recall": 1.1}, "--target_recall is 1.1"),
        ({"settings": {"max_tokens": 9}}, "--max_tokens without --encoder"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(RECIPE, **changes)


def test_vectors_of_half_the_size_find_the_same_first_rows(made, tmp_path):
    corpus, _ = made
    _build(tmp_path / "index", corpus, dataclasses.replace(RECIPE, dtype="bfloat16"))
    assert vector_files.open_vectors(tmp_path / "index" / "vectors").nbytes == 15 * 64 * 2
    found = stored.open_index(tmp_path / "index", search="exact").search(NAMES, 1)
    assert [passages[0].id for passages in found] == [f"p{i}" for i in range(15)]
    found = stored.open_index(tmp_path / "index", search="exact", rows_dtype="int8").search(NAMES, 1)
    assert [passages[0].id for passages in found] == [f"p{i}" for i in range(15)]


def test_queries_to_measure_by_are_stretches_of_passages_and_always_the_same(made):
    corpus, _ = made
    queries = building.sample_queries(corpus, count=6, words=3)
    assert queries == building.sample_queries(corpus, count=6, words=3) and len(set(queries)) > 3
    assert all(len(query.split()) == 3 and any(query in text for text in CONTENTS) for query in queries)


def test_an_indexs_identity_changes_with_what_is_found_and_not_with_the_versions_that_made_it(made, copied):
    _, index = made
    same = stored.read_manifest(index) | {"made_with": {"jax": "0"}}
    (copied / stored.MANIFEST).write_text(json.dumps(same))
    assert stored.identity(copied) == stored.identity(index) == stored.identity(index, search="hybrid")
    others = {stored.identity(index, search="bm25"), stored.identity(index, rows_dtype="int8")}
    others |= {stored.identity(index, reranker="r", candidates=n) for n in (10, 20)}
    (copied / stored.MANIFEST).write_text(json.dumps(same | {"corpus": {}}))
    assert len(others | {stored.identity(index), stored.identity(copied)}) == 6
    if SCANN == "scann":
        for changes, alike in [({"queries_per_s": 1.0, "recall_at_3": 0.9}, True), ({"leaves_searched": 9}, False)]:
            parts = same["parts"] | {"scann": same["parts"]["scann"] | changes}
            (copied / stored.MANIFEST).write_text(json.dumps(same | {"parts": parts}))
            assert (stored.identity(copied) == stored.identity(index)) == alike
