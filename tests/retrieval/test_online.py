"""Live engines, played by a small server that answers in the shapes their documentation shows."""

import logging
import traceback

import http_servers
import pytest

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, online

KEYS = {
    "SERPAPI_API_KEY": "serp secret/+key",
    "GOOGLE_API_KEY": "AIza-google-secret",
    "GOOGLE_CSE_ID": "017576:omuauf_lfve",
    "BRAVE_API_KEY": "BSA-brave-secret",
}

SERPAPI = {
    "search_metadata": {"id": "6540ac26", "status": "Success", "json_endpoint": "https://serpapi.com/searches/…"},
    "search_parameters": {"engine": "google", "q": "coffee", "google_domain": "google.com", "device": "desktop"},
    "search_information": {"query_displayed": "coffee", "organic_results_state": "Results for exact spelling"},
    "organic_results": [
        {
            "position": 1,
            "title": "Coffee - Wikipedia",
            "link": "https://en.wikipedia.org/wiki/Coffee",
            "displayed_link": "https://en.wikipedia.org › wiki › Coffee",
            "snippet": "Coffee is a beverage brewed from roasted coffee beans.",
            "sitelinks": {"inline": [{"title": "Coffee bean", "link": "https://en.wikipedia.org/wiki/Coffee_bean"}]},
        },
        {"position": 2, "title": "A video\n of coffee", "link": "https://video.example/1", "duration": "3:14"},
        {"position": 3, "title": "Third", "link": "https://third.example/", "snippet": "Three."},
    ],
}
GOOGLE = {
    "kind": "customsearch#search",
    "url": {"type": "application/json", "template": "https://www.googleapis.com/customsearch/v1?q={searchTerms}"},
    "searchInformation": {"searchTime": 0.3, "totalResults": "2"},
    "items": [
        {
            "kind": "customsearch#result",
            "title": "Coffee - Wikipedia",
            "htmlTitle": "<b>Coffee</b> - Wikipedia",
            "link": "https://en.wikipedia.org/wiki/Coffee",
            "displayLink": "en.wikipedia.org",
            "snippet": "Coffee is a beverage brewed from\nroasted coffee beans.",
            "htmlSnippet": "<b>Coffee</b> is a beverage brewed from<br>\nroasted coffee beans.",
        },
        {"kind": "customsearch#result", "title": "Second", "link": "https://second.example/", "snippet": "Two &amp;"},
    ],
}
BRAVE = {
    "type": "search",
    "query": {"original": "coffee", "more_results_available": True},
    "web": {
        "type": "search",
        "results": [
            {
                "type": "search_result",
                "title": "Coffee &amp; Tea",
                "url": "https://en.wikipedia.org/wiki/Coffee?a=1&amp=2",
                "description": "Coffee isn&#x27;t tea.",
                "meta_url": {"scheme": "https", "hostname": "en.wikipedia.org"},
            },
            {"type": "search_result", "title": "Second", "url": "https://second.example/", "description": "Two."},
        ],
    },
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable, key in KEYS.items():
        monkeypatch.setenv(variable, key)


def _retriever(engine, url, attempts=2):
    return online.OnlineRetriever(engine, timeout_s=5, attempts=attempts, backoff_s=0.01, url=url)


def _passage(url, title, text):
    return types.Passage(id=url, title=title, text=text, score=0.0)


COFFEE = "https://en.wikipedia.org/wiki/Coffee"
ENGINES = [
    (
        "serpapi",
        SERPAPI,
        {"q": "coffee beans", "engine": "google", "api_key": "serp secret/+key"},
        None,
        [
            _passage(COFFEE, '"Coffee - Wikipedia"', "Coffee is a beverage brewed from roasted coffee beans."),
            _passage("https://video.example/1", '"A video of coffee"', ""),
        ],
    ),
    (
        "google",
        GOOGLE,
        {"q": "coffee beans", "num": "2", "key": "AIza-google-secret", "cx": "017576:omuauf_lfve"},
        None,
        [
            _passage(COFFEE, '"Coffee - Wikipedia"', "Coffee is a beverage brewed from\nroasted coffee beans."),
            _passage("https://second.example/", '"Second"', "Two &amp;"),
        ],
    ),
    (
        "brave",
        BRAVE,
        {"q": "coffee beans", "count": "2", "result_filter": "web", "text_decorations": "false"},
        "BSA-brave-secret",
        [
            _passage(f"{COFFEE}?a=1&amp=2", '"Coffee & Tea"', "Coffee isn't tea."),
            _passage("https://second.example/", '"Second"', "Two."),
        ],
    ),
]


@pytest.mark.parametrize("engine, answer, parameters, token, passages", ENGINES, ids=[case[0] for case in ENGINES])
def test_an_engine_is_asked_and_read_as_documented(engine, answer, parameters, token, passages):
    with http_servers.scripted((200, answer)) as (url, seen):
        assert _retriever(engine, f"{url}/search.json").search(["coffee beans"], 2) == [passages]
    [request] = seen
    assert (request.path, request.body) == ("/search.json", parameters)
    assert request.headers["X-Subscription-Token"] == token and request.headers["Accept"] == "application/json"


def test_each_query_is_a_request_in_order():
    with http_servers.scripted((200, BRAVE)) as (url, seen):
        found = _retriever("brave", url).search(["é & ?", "b"], 1)
    assert [request.body["q"] for request in seen] == ["é & ?", "b"]
    assert [len(passages) for passages in found] == [1, 1]


NOTHING = {
    "serpapi": {
        "search_metadata": {"status": "Success"},
        "search_information": {"organic_results_state": "Fully empty"},
        "error": "Google hasn't returned any results for this query.",
    },
    "google": {"kind": "customsearch#search", "searchInformation": {"totalResults": "0"}},
    "brave": {"type": "search", "query": {"original": "qzx"}},
}


@pytest.mark.parametrize("engine", NOTHING)
def test_an_engine_that_found_nothing_gives_no_passages(engine):
    with http_servers.scripted((200, NOTHING[engine])) as (url, _):
        assert _retriever(engine, url).search(["qzx"], 3) == [[]]


@pytest.mark.parametrize(
    "engine, answer, cause",
    [
        ("serpapi", {"search_metadata": {"status": "Error"}, "error": "Try again."}, "'organic_results': .*Try again"),
        ("serpapi", {"error": "Your account has run out"}, "has no list 'organic_results'.*run out"),
        ("google", {"error": {"code": 400, "message": "Invalid"}}, "Google Custom Search: .*'items'.*Invalid"),
        ("google", {"kind": "customsearch#search", "items": {}}, "has no list 'items'"),
        ("google", {"kind": "customsearch#search", "items": [{"link": "u", "snippet": "s"}]}, "has no texts .'title'"),
        ("brave", {"type": "ErrorResponse"}, "has no list 'web.results'"),
        ("brave", {"type": "search", "web": {"results": ["x"]}}, "a result has no texts .*'x'"),
        ("brave", b"<html>", "not JSON.*<html>"),
        ("brave", [], "has no list 'web.results'"),
    ],
)
def test_an_answer_of_another_shape_is_an_error_and_not_asked_for_again(engine, answer, cause):
    with http_servers.scripted((200, answer)) as (url, seen):
        with pytest.raises(base.RetrievalError, match=cause):
            _retriever(engine, url).search(["coffee"], 3)
    assert len(seen) == 1


def test_a_busy_engine_is_asked_again_and_a_wrong_key_is_not():
    with http_servers.scripted((429, b"slow down"), (503, b"busy"), (200, BRAVE)) as (url, seen):
        assert len(_retriever("brave", url, attempts=3).search(["coffee"], 2)[0]) == 2
    assert len(seen) == 3
    with http_servers.scripted((401, {"error": "Invalid API key."})) as (url, seen):
        with pytest.raises(base.RetrievalError, match="after 1 attempt: SerpAPI: status 401: .*Invalid API key"):
            _retriever("serpapi", url).search(["coffee"], 1)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "engine, variable",
    [("serpapi", "SERPAPI_API_KEY"), ("google", "GOOGLE_API_KEY"), ("google", "GOOGLE_CSE_ID"),
     ("brave", "BRAVE_API_KEY")],
)  # fmt: skip
def test_a_missing_key_is_refused_by_the_name_of_its_variable(monkeypatch, engine, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(ValueError, match=f"needs a key; set the environment variable {variable}$"):
        _retriever(engine, None)
    monkeypatch.setenv(variable, " ")
    with pytest.raises(ValueError, match=f"needs a key; set the environment variable {variable}$"):
        _retriever(engine, None)
    monkeypatch.setenv(variable, "kéy")
    with pytest.raises(ValueError, match=f"{variable} has characters that no key has") as error:
        _retriever(engine, None)
    assert "kéy" not in str(error.value)


def _shows_a_key(text):
    return any(key in text or key.replace(" ", "+") in text for key in (*KEYS.values(), "serp+secret%2F%2Bkey"))


@pytest.mark.parametrize("engine", online.ENGINES)
def test_a_key_is_in_no_error_no_log_and_no_repr(engine, caplog):
    caplog.set_level(logging.DEBUG)
    # A connection refused: the error of requests holds the url, and the url the key.
    retriever = _retriever(engine, f"http://127.0.0.1:{http_servers.free_port()}/search")
    with pytest.raises(base.RetrievalError, match="2 attempts: .*refused") as refused:
        retriever.search(["coffee"], 3)
    # An answer that echoes the keys, with its status; and one that logs the request line.
    with http_servers.scripted((400, " ".join(KEYS.values()).encode()), (200, BRAVE)) as (url, _):
        with pytest.raises(base.RetrievalError, match="status 400: .*\\*\\*\\*") as echoed:
            for name in online.ENGINES:  # so that all four are known
                _retriever(name, url)
            _retriever(engine, url).search(["coffee"], 3)
    assert "GET /" in caplog.text  # the library does log its requests
    for error in (refused.value, echoed.value):
        assert error.__context__ is None and error.__cause__ is None
        assert not _shows_a_key("".join(traceback.format_exception(error)) + repr(error))
    assert not _shows_a_key(caplog.text)
    assert not _shows_a_key(repr(retriever) + repr(vars(retriever)["_patience"]))


def test_wrong_settings_are_refused_by_value():
    with pytest.raises(ValueError, match="k is 11; Google Custom Search gives at most 10 results"):
        _retriever("google", "http://127.0.0.1:1").search(["coffee"], 11)
