"""Search on other machines, over the wire protocol of the Search-R1 family.

    POST {url}/retrieve   {"queries": [str], "topk": int, "return_scores": true}
    answer                {"result": [[{"document": {"id": str, "contents": str}, "score": float}, …], …]}

A server that ignores `return_scores` answers with the documents themselves; some documents of live search
engines have no id. Both are taken as they are, with score 0 and id "". Anything else that is not the
protocol is an error: a failed search never looks like an empty one.

`send` is the HTTP below it, for everything here that asks over a network: time limits, second chances, and
the next server where one fails.

    round 1   a ✗  b ✗      pause      round 2   a ✗  b ✓      the next request starts at b
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import logging
import math
import threading
import time
from typing import Any, TypeVar
import urllib.parse

import requests
import urllib3.exceptions

from searchr1_jax.core import types
from searchr1_jax.retrieval import base

T = TypeVar("T")

_thread = threading.local()  # requests' sessions are not made for sharing
_secrets: set[str] = set()  # keys, as they are and as a url spells them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for an answer, and how often to ask."""

    timeout_s: float  # of one request, from the connection to the last byte of the answer
    attempts: int  # requests before a search has failed, over all its servers
    backoff_s: float  # pause when every server has been asked once; doubles with each round

    def pause_s(self, rounds: int, servers: int, retry_after_s: float) -> float:
        """Returns how long to wait after some rounds: a server may ask for as much as the last pause, not more."""
        shortest, last_round = self.backoff_s * 2 ** (rounds - 1), (self.attempts - 1) // servers
        return min(max(shortest, retry_after_s), self.backoff_s * 2 ** (last_round - 1))


Call = tuple[str, dict[str, Any]]  # a server's name, and the arguments of requests' `request`, which may hold keys


def send(
    calls: Sequence[Call], read: Callable[[bytes], T], queries: Sequence[str], *, patience: Patience, first: int = 0
) -> tuple[T, int]:
    """Asks one server after the other until one answers.

    Connections that fail, time-outs, status 5xx and 429 (too many requests) are given another chance: at the
    next server, and when all have had theirs, after a pause. Any other status but 200 is an answer, and so is
    one that `read` refuses: nobody else is asked. Redirections are not followed.

    Args:
      calls: the request, once for each server.
      read: makes the answer of the body, or raises ValueError in words of what is wrong with it.
      queries: what is searched for, to name in an error.
      first: the server to start with.
    Returns: the answer and which server gave it.
    Raises: RetrievalError naming the servers and what was wrong with each of them.
    """
    causes, retry_after_s, attempt = {}, [], 0
    while attempt < patience.attempts:
        rounds, turn = divmod(attempt, len(calls))
        if rounds and not turn:
            time.sleep(patience.pause_s(rounds, len(calls), min(retry_after_s, default=0.0)))
            retry_after_s.clear()
        which, attempt = (first + turn) % len(calls), attempt + 1
        name, arguments = calls[which]
        try:
            status, headers, body = _exchange(arguments, patience.timeout_s)
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            causes[name] = f"no answer within {patience.timeout_s} s"
            continue
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            causes[name] = str(error)
            continue
        causes[name] = f"status {status}: {shown(body)}"
        if status >= 500 or status == 429:
            if headers.get("Retry-After", "").isdecimal():
                retry_after_s.append(float(headers["Retry-After"]))
            continue
        try:
            if status == 200:
                return read(body), which
        except ValueError as error:
            causes[name] = str(error)
        causes = {name: causes[name]}
        break
    # Raised out here, where no other exception hangs on to it: those of requests hold urls with keys in them.
    cause = _redacted("; ".join(f"{name}: {cause}" for name, cause in causes.items()))
    raise base.RetrievalError(queries[0], cause, attempt, len(queries))


def hide(secret: str) -> None:
    """Takes a key out of every error of `send` and every line that the HTTP library logs, from now on."""
    _secrets.update((secret, urllib.parse.quote(secret), urllib.parse.quote_plus(secret)))
    logging.getLogger("urllib3.connectionpool").addFilter(_redact_record)  # adding it again changes nothing


def _redacted(text: str) -> str:
    for secret in _secrets:
        text = text.replace(secret, "***")
    return text


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = _redacted(record.getMessage()), ()
    return True


def parsed(body: bytes) -> Any:
    """Returns the JSON of an answer's body; raises ValueError when it is none."""
    try:  # not response.json(): where simplejson is installed it takes that, which reads NaN differently
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON ({error}): {shown(body)}") from error


def shown(body: bytes) -> str:
    """Returns the beginning of a body, for a message."""
    return body[:200].decode(errors="replace")


class RemoteRetriever:
    """A Retriever that asks servers; safe to call from several threads, each with its own connections.

    Args:
      url: of the server or servers, each with or without the final /retrieve; several as a sequence or with commas
        between. They must serve the same passages: a search starts at the one that answered last.
      timeout_s, attempts, backoff_s: see `Patience` and `send`. A server that names a longer pause (Retry-After) is
        given that, up to the longest of these pauses.
    Raises: ValueError for a url that is none, or fewer attempts than servers.
    """

    def __init__(self, url: str | Sequence[str], *, timeout_s: float, attempts: int, backoff_s: float):
        self._patience = Patience(timeout_s=timeout_s, attempts=attempts, backoff_s=backoff_s)
        self.endpoints = tuple(map(_endpoint, url.split(",") if isinstance(url, str) else url))
        if attempts < len(self.endpoints):
            raise ValueError(f"attempts is {attempts} for {len(self.endpoints)} retriever urls; give each at least one")
        self._first = 0  # the endpoint that answered last

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        """See `base.Retriever`; errors name the endpoint and what was wrong with it or its answer."""
        base.check_k(k)
        if not queries:
            return []
        request = {"queries": queries, "topk": k, "return_scores": True}
        calls = [(url, dict(method="POST", url=url, json=request)) for url in self.endpoints]
        passages, self._first = send(
            calls, lambda body: _passages(body, queries, k), queries, patience=self._patience, first=self._first
        )
        return passages


def _endpoint(url: str) -> str:
    url = url.strip()
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"retriever url is {url!r}; start it with http:// or https://")
    return url.rstrip("/").removesuffix("/retrieve").rstrip("/") + "/retrieve"


def _session() -> requests.Session:
    if not hasattr(_thread, "session"):
        _thread.session = requests.Session()
    return _thread.session


def _exchange(arguments: dict[str, Any], timeout_s: float) -> tuple[int, Mapping[str, str], bytes]:
    """Returns status, headers and body of the answer to one request.

    The body is read piece by piece against one deadline: a server that drips bytes would start requests' own
    clock anew with each. Once the headers are here, at most one piece, itself within timeout_s, comes late.
    """
    deadline = time.monotonic() + timeout_s
    with _session().request(**arguments, timeout=timeout_s, allow_redirects=False, stream=True) as response:
        pieces = []
        while piece := response.raw.read1(1 << 16, decode_content=True):
            pieces.append(piece)
            if time.monotonic() > deadline:
                raise requests.Timeout
        return response.status_code, response.headers, b"".join(pieces)


def _passages(body: bytes, queries: list[str], k: int) -> list[list[types.Passage]]:
    """Reads an answer; raises ValueError, in the words of the protocol, where it is not one."""
    answer = parsed(body)
    results = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise ValueError(f'the answer has no list "result": {shown(body)}')
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
