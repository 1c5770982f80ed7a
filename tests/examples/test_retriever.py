"""The example of a retriever: what it finds, and over the wire; a run with it is in test_together.py."""

import json

import http_servers
import pytest
import requests

from examples import retriever as example
from searchr1_jax import serve
from searchr1_jax.core import settings as settings_lib

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
