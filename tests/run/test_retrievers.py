"""Which search engine a config names."""

import json
import sys

import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.retrieval import base, building, cache, corpus as corpora, exact_index
from searchr1_jax.run import retrievers


@pytest.fixture
def workdir(tmp_path):
    rows = [{"id": f"p{i}", "contents": f'"{name}"\n{name} is a poet.'} for i, name in enumerate(["Mira", "Doru"])]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def index(workdir):
    recipe = building.Recipe(
        parts=("bm25",), encoder="", settings={}, dimensions=8, dtype="float32", memory_bytes=10**9, target_recall=0.95
    )
    corpus = corpora.Corpus(workdir / "corpus.jsonl")
    building.build(recipe, corpus, None, workdir / "index", [], lambda *_: None)
    return workdir / "index"


def _config(**retriever):
    return settings.Settings(retriever=settings.Retriever(**retriever))


def _found(engine, query="Mira"):
    return [passage.id for passage in engine.search([query], 1)[0]]


def test_the_directory_of_an_index_is_opened(workdir, index):
    assert _found(retrievers.make(_config(index=str(index)), workdir)) == ["p0"]
    with pytest.raises(ValueError, match=r"search 'scann' is not possible: .* holds \['bm25'\]"):
        retrievers.make(_config(index=str(index), search="scann"), workdir)
    with pytest.raises(ValueError, match="/nowhere holds no index"):
        retrievers.make(_config(index="/nowhere"), workdir)


@pytest.mark.parametrize("built", [True, False], ids=["built index", "made at the start"])
def test_what_was_recorded_is_replayed_without_the_engine(workdir, index, built, monkeypatch):
    named = {"index": str(index)} if built else {"index": "exact", "dimensions": 16}
    recording = retrievers.make(_config(cache="record", **named), workdir)
    expected = recording.search(["Mira", "Doru"], 2)
    for module, name in ((retrievers.stored, "open_index"), (retrievers.local, "build")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the engine was made"))
    replaying = retrievers.make(_config(cache="replay", **named), workdir)
    assert isinstance(replaying, cache.QueryCache) and replaying.search(["Doru", "Mira"], 2) == expected[::-1]
    with pytest.raises(base.RetrievalError, match="Kesa"):
        replaying.search(["Kesa"], 2)


def test_answers_recorded_with_another_engine_are_refused_with_both(workdir, index):
    retrievers.make(_config(cache="record", index="exact", dimensions=16), workdir).search(["Mira"], 1)
    with pytest.raises(ValueError, match="exact 16.*not of.*index "):
        retrievers.make(_config(cache="replay", index=str(index)), workdir)


def test_one_cache_is_not_shared_by_several_processes(workdir, monkeypatch):
    monkeypatch.setattr(retrievers.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="retriever.cache is 'record' with 2 processes; .* set it to \"off\""):
        retrievers.make(_config(cache="record"), workdir)


def test_what_only_a_built_index_knows_is_refused_of_another(workdir, index):
    with pytest.raises(ValueError, match="retriever.search, retriever.reranker is of a built index, and .* is 'exact'"):
        retrievers.make(_config(index="exact", search="hybrid", reranker="x"), workdir)
    assert _found(retrievers.make(_config(index=str(index), search="bm25"), workdir)) == ["p0"]


class Own:
    """A retriever of a user's own."""

    def __init__(self, settings, workdir):
        self.found = types.Passage(id=str(workdir), title=settings.data.corpus, text="")

    def search(self, queries, k):
        return [[self.found]] * len(queries)


class Versioned(Own):
    version = "1"

    @classmethod
    def identity(cls, settings, workdir):
        return f"{cls.version} of {settings.data.corpus}"


def test_a_function_of_the_users_own_is_called_with_the_settings_and_the_workdir(workdir):
    [[found]] = retrievers.make(_config(index=f"{__name__}:Own"), workdir).search(["Mira"], 1)
    assert (found.id, found.title) == (str(workdir), "corpus.jsonl")


def test_a_users_own_is_known_to_a_cache_by_its_name_and_what_it_says(workdir, monkeypatch):
    kinds = {}
    for name in ("Own", "Versioned"):
        config = _config(index=f"{__name__}:{name}", cache="record", cache_file=name)
        retrievers.make(config, workdir).search(["Mira"], 1)
        kinds[name] = retrievers.kind_of(config).identity(config, workdir)
    assert kinds == {"Own": f"{__name__}:Own", "Versioned": f"{__name__}:Versioned 1 of corpus.jsonl"}
    assert retrievers.make(_config(index=f"{__name__}:Versioned", cache="replay", cache_file="Versioned"), workdir)
    monkeypatch.setattr(Versioned, "version", "2")
    with pytest.raises(ValueError, match="1 of corpus.jsonl.*not of.*2 of corpus.jsonl"):
        retrievers.make(_config(index=f"{__name__}:Versioned", cache="replay", cache_file="Versioned"), workdir)


@pytest.mark.parametrize(
    "name, said",
    [
        ("no_such_module:make", "retriever.index .*'no_such_module:make'.*No module named"),
        (f"{__name__}:nothing", "retriever.index .*has no attribute 'nothing'"),
        (f"{__name__}:dict_of", r"which returned {}; it has to return a Retriever, with a method search\(queries, k\)"),
    ],
)
def test_a_users_own_that_is_none_is_refused_by_name(workdir, name, said):
    with pytest.raises(ValueError, match=said):
        retrievers.make(_config(index=name), workdir)


def dict_of(settings, workdir):
    return {}


def test_an_engine_of_the_web_needs_its_key(workdir, monkeypatch):
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    with pytest.raises(ValueError, match="BRAVE_API_KEY"):
        retrievers.make(_config(url="brave"), workdir)


def test_a_broken_corpus_line_is_named(workdir):
    first, second = (workdir / "corpus.jsonl").read_text().splitlines()
    (workdir / "corpus.jsonl").write_text(f'{first}\n{{"id": "3", "contents\n{second}\n')
    with pytest.raises(ValueError, match="corpus.jsonl: 1 of 3 lines are not .*line 2: not JSON"):
        retrievers.make(_config(), workdir)


def test_where_scann_has_no_wheel_the_exact_index_stands_in_and_asking_for_it_says_what_to_do(workdir, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "scann"] + ["scann"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert isinstance(retrievers.make(_config(), workdir).ranker.index, exact_index.ExactIndex)
    with pytest.raises(ImportError, match='"scann" cannot be imported here; .* set retriever.index = "exact"'):
        retrievers.make(_config(index="scann"), workdir)


def test_a_server_out_of_reach_is_a_retrieval_error_that_names_it(tmp_path):
    server = _config(url="http://127.0.0.1:9", attempts=2, backoff_s=0.01)
    with pytest.raises(base.RetrievalError, match="failed after 2 attempts: http://127.0.0.1:9/retrieve"):
        retrievers.make(server, tmp_path)
