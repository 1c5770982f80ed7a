"""Search on another machine, over the wire protocol of the Search-R1 family.

    POST {url}/retrieve   {"queries": [str], "topk": int, "return_scores": true}
    answer                {"result": [[{"document": {"id": str, "contents": str}, "score": float}, …], …]}

A server that ignores `return_scores` answers with the documents themselves; some documents of live search
engines have no id. Both are taken as they are, with score 0 and id "". Anything else that is not the
protocol is an error: a failed search never looks like an empty one.
"""

from __future__ import annotations

import json
import math
import threading
import time

import requests

from searchr1_jax import types
from searchr1_jax.retrieval import base


class RemoteRetriever:
    """A Retriever that asks a server; safe to call from several threads, each with its own connection.

    Args:
      url: of the server, with or without the final /retrieve.
      timeout_s: how long to wait for a connection, and then for each piece of the answer.
      attempts: how often a request is sent before it counts as failed. Connections that fail, time-outs and
        status 5xx are tried again; status 4xx and answers that are not the protocol are not.
      backoff_s: pause before the second attempt; doubles before each further one.
    """

    def __init__(self, url: str, *, timeout_s: float, attempts: int, backoff_s: float):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"retriever url is {url!r}; start it with http:// or https://")
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; a search needs at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a server more than 0 seconds to answer")
        self.endpoint = url.rstrip("/").removesuffix("/retrieve").rstrip("/") + "/retrieve"
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._thread = threading.local()  # requests' sessions are not made for sharing

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """Returns at most k passages for each query, in the server's order.

        Raises: RetrievalError naming the endpoint and what was wrong with it or its answer.
        """
        base.check_k(k)
        if not queries:
            return []
        request = {"queries": queries, "topk": k, "return_scores": True}
        cause = ""
        for attempt in range(1, self._attempts + 1):
            if attempt > 1:
                time.sleep(self._backoff_s * 2 ** (attempt - 2))
            try:
                response = self._session().post(self.endpoint, json=request, timeout=self._timeout_s)
            except requests.Timeout:
                cause = f"no answer within {self._timeout_s} s"
                continue
            except requests.RequestException as error:
                cause = str(error)
                continue
            if response.status_code >= 500:
                cause = f"status {response.status_code}: {response.text:.200}"
                continue
            try:
                return _passages(response, queries, k)
            except ValueError as error:
                raise self._failure(queries, str(error), attempt) from error
        raise self._failure(queries, cause, self._attempts)

    def check(self) -> None:
        """Makes one tiny search, so that a server out of reach is reported before any long work."""
        self.search(["test"], 1)

    def _session(self) -> requests.Session:
        if not hasattr(self._thread, "session"):
            self._thread.session = requests.Session()
        return self._thread.session

    def _failure(self, queries: list[str], cause: str, attempts: int) -> base.RetrievalError:
        return base.RetrievalError(queries[0], f"{self.endpoint}: {cause}", attempts, len(queries))


def _passages(response: requests.Response, queries: list[str], k: int) -> list[list[types.Passage]]:
    """Reads an answer; raises ValueError, in the words of the protocol, where it is not one."""
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}: {response.text:.200}")
    try:
        # Not response.json(): where simplejson is installed it takes that, which reads NaN differently.
        answer = json.loads(response.content)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON ({error}): {response.text:.200}") from error
    results = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise ValueError(f'the answer has no list "result": {response.text:.200}')
    if len(results) != len(queries):
        raise ValueError(f"{len(results)} results for {len(queries)} queries")
    passages = []
    for query, result in zip(queries, results, strict=True):
        if not isinstance(result, list):
            raise ValueError(f"the result for {query!r} is not a list: {result!r:.200}")
        try:
            passages.append([_passage(item) for item in result[:k]])
        except ValueError as error:
            raise ValueError(f"in the result for {query!r}, {error}") from error
    return passages


def _passage(item: object) -> types.Passage:
    """Reads {"document": {…}, "score": float}, or a document alone."""
    if not isinstance(item, dict):
        raise ValueError(f"an item is not an object: {item!r:.200}")
    document, score = item.get("document", item), item.get("score", 0.0)
    if not isinstance(document, dict) or not isinstance(document.get("contents"), str):
        raise ValueError(f'a document has no text "contents": {item!r:.200}')
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"a score is not a finite number: {score!r:.200}")
    title, _, text = document["contents"].partition("\n")
    return types.Passage(id=str(document.get("id", "")), title=title, text=text, score=float(score))
