"""Search of the live web, through the engines that sell it: a key in the environment, titles and snippets back.

    query ─▶ GET engine's url ─▶ JSON ─▶ Passage(id=url, title='"Title"', text=snippet, score=0)

What differs between engines is data, one `Engine` each; how they are asked is `remote.send`. The request and
answer shapes are those of

    serpapi   https://serpapi.com/search-api and /search-errors
    google    https://developers.google.com/custom-search/v1/reference/rest
    brave     https://api-dashboard.search.brave.com/app/documentation/web-search

Engines rank and give no scores, so scores are 0 and the order is theirs.
"""

from collections.abc import Mapping
import dataclasses
import html
import os
from typing import Any

from searchr1_jax.core import types
from searchr1_jax.retrieval import base, remote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How one engine is asked, and where its answer holds what. A path is the names on the way down."""

    title: str  # of the engine, in messages
    url: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of every request
    count: str = ""  # the parameter for how many results are wanted, where there is one
    most: int = 10  # results of one request
    key_parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name: environment variable
    key_headers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name: environment variable
    results: tuple[str, ...]  # path of the list of results; an answer that found nothing may have none
    proof: tuple[tuple[str, ...], str]  # a path and its value that make an answer without results a right one
    names: tuple[str, str, str] = ("title", "link", "snippet")  # of a result's title, url and snippet
    entities: bool = False  # titles and snippets come escaped as for HTML


ENGINES = {
    "serpapi": Engine(
        title="SerpAPI",
        url="https://serpapi.com/search.json",
        parameters={"engine": "google"},
        key_parameters={"api_key": "SERPAPI_API_KEY"},
        results=("organic_results",),
        proof=(("search_metadata", "status"), "Success"),
    ),
    "google": Engine(
        title="Google Custom Search",
        url="https://www.googleapis.com/customsearch/v1",
        count="num",
        key_parameters={"key": "GOOGLE_API_KEY", "cx": "GOOGLE_CSE_ID"},
        results=("items",),
        proof=(("kind",), "customsearch#search"),
    ),
    "brave": Engine(
        title="Brave Search",
        url="https://api.search.brave.com/res/v1/web/search",
        parameters={"result_filter": "web", "text_decorations": "false"},
        count="count",
        most=20,
        key_headers={"X-Subscription-Token": "BRAVE_API_KEY"},
        results=("web", "results"),
        proof=(("type",), "search"),
        names=("title", "url", "description"),
        entities=True,
    ),
}


class OnlineRetriever:
    """A Retriever over one live engine; safe to call from several threads.

    Queries of one call are sent one after the other: engines limit the requests a second.

    Args:
      engine: a key of ENGINES. Its keys are taken from the environment, and never shown in an error or a log.
      timeout_s, attempts, backoff_s: see `remote.Patience` and `remote.send`.
      url: where to ask instead of the engine's own url.
    Raises: ValueError naming an environment variable that is not set.
    """

    def __init__(self, engine: str, *, timeout_s: float, attempts: int, backoff_s: float, url: str | None = None):
        self._engine, self._url = ENGINES[engine], url or ENGINES[engine].url
        self._patience = remote.Patience(timeout_s=timeout_s, attempts=attempts, backoff_s=backoff_s)
        self._parameters = {name: self._key(key) for name, key in self._engine.key_parameters.items()}
        self._headers = {name: self._key(key) for name, key in self._engine.key_headers.items()}

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """See `base.Retriever`; ids are urls. Raises: ValueError for more than the engine gives."""
        base.check_k(k)
        if k > self._engine.most:
            raise ValueError(f"k is {k}; {self._engine.title} gives at most {self._engine.most} results")
        return [self._search(query, k) for query in queries]

    def _key(self, variable: str) -> str:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ValueError(f"{self._engine.title} needs a key; set the environment variable {variable}")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {variable} has characters that no key has; set it again")
        remote.hide(key)
        return key

    def _search(self, query: str, k: int) -> list[types.Passage]:
        engine = self._engine
        wanted = {engine.count: str(k)} if engine.count else {}
        parameters = {"q": query, **engine.parameters, **wanted, **self._parameters}
        headers = {"Accept": "application/json", **self._headers}
        call = engine.title, dict(method="GET", url=self._url, params=parameters, headers=headers)
        read = lambda body: _passages(body, engine)[:k]
        return remote.send([call], read, [query], patience=self._patience)[0]


def _passages(body: bytes, engine: Engine) -> list[types.Passage]:
    """Reads an answer; raises ValueError where it is not the engine's."""
    answer = remote.parsed(body)
    results = _at(answer, engine.results)
    if results is None and _at(answer, engine.proof[0]) == engine.proof[1]:
        return []
    if not isinstance(results, list):
        raise ValueError(f"the answer has no list {'.'.join(engine.results)!r}: {remote.shown(body)}")
    return [_passage(result, engine) for result in results]


def _passage(result: Any, engine: Engine) -> types.Passage:
    title, url, snippet = (_at(result, (name,)) for name in engine.names)
    snippet = "" if snippet is None else snippet  # a result may have none
    if not (isinstance(title, str) and isinstance(url, str) and isinstance(snippet, str)):
        raise ValueError(f"a result has no texts {engine.names}: {result!r:.200}")
    if engine.entities:
        title, snippet = html.unescape(title), html.unescape(snippet)
    return types.Passage(id=url, title=f'"{" ".join(title.split())}"', text=snippet.strip())


def _at(answer: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path, None where the path ends early."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    return answer
