"""The example of a retriever: what it finds, in a run, and over the wire."""

import json
import types

import http_servers
import miniature
import pytest
import requests

from examples import retriever as example
from searchr1_jax import evaluate
from searchr1_jax import serve
from searchr1_jax.core import settings as settings_lib
from searchr1_jax.run import retrievers

NAME = "examples.retriever:ByTitle"
TITLES = ['"Mira Talon"', '"Mira Talon Works"', '"Kelu"', '"Kelu"']


@pytest.fixture
def workdir(tmp_path):
    rows = [{"id": f"p{i}", "contents": f"{title}\nText {i}."} for i, title in enumerate(TITLES)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_longest_titles_in_the_query_come_first(workdir):
    retriever = example.ByTitle(settings_lib.Settings(), workdir)
    found = retriever.search(["who founded mira talon works in Kelu", "Mira", ""], 3)
    assert [[(passage.id, passage.score) for passage in each] for each in found] == [
        [("p1", 3.0), ("p0", 2.0), ("p2", 1.0)],
        [],
        [],
    ]
    assert found[0][0].title == TITLES[1] and found[0][0].text == "Text 1."


def test_a_server_answers_by_it(workdir, monkeypatch):
    answers = []

    def serving(retriever, *, host, port, settings, info):
        with http_servers.serving(retriever, settings, info=info) as url:
            asked = requests.post(f"{url}/retrieve", json={"queries": ["Mira Talon"]}, timeout=300)
            answers.append((asked.json()["result"], info["identity"]))

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(serve.server, "serve", serving)
    serve.run(index=NAME, corpus=str(workdir / "corpus.jsonl"))
    [([[document]], identity)] = answers
    assert document == {"id": "p0", "contents": f"{TITLES[0]}\nText 0."}
    assert identity.startswith(f"{NAME} ")


def test_a_policy_is_judged_with_it_and_its_answers_are_recorded(laptop, tmp_path, monkeypatch):
    config = miniature.settings(**{"retriever.index": NAME, "retriever.cache": "record"})
    miniature.world(tmp_path, config)
    evaluate.run(config, tmp_path, model=str(tmp_path / "base"), decodings=["sampled"], questions=4)
    episodes = map(json.loads, (tmp_path / "eval" / "final-sampled.jsonl").read_text().splitlines())
    queries = [
        turn["content"]
        for episode in episodes
        for turn in episode["turns"]
        if turn["event"] == "search" and turn["reply"]
    ]
    found = example.ByTitle(settings_lib.Settings(), tmp_path).search(queries, config.rollout.passages)
    monkeypatch.setattr(example, "ByTitle", types.SimpleNamespace(identity=example.ByTitle.identity))  # not made again
    config = config.replace({"retriever.cache": "replay"})
    assert queries and retrievers.make(config, tmp_path).search(queries, config.rollout.passages) == found
