"""What answers the policy's turns. Search is one environment; another tool is another file like this one.

    text of a turn, turns left ─▶ act ─▶ Outcome: a reply, a reason to stop, or a request
                                                  request ─▶ fetch (in worker threads, in batches) ─▶ Reply

`act` is immediate and runs in the host loop; whatever may take time is a request. An environment knows texts
only: the loop tokenises replies, cuts them to fit, and keeps the books.
"""

from __future__ import annotations

from concurrent import futures
import dataclasses
import functools
import threading
from typing import Any, Callable, Protocol

from searchr1_jax.core import settings
from searchr1_jax.core import types
from searchr1_jax.retrieval import base
from searchr1_jax.text import protocol as text_protocol
from searchr1_jax.text import transcript


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a turn leads to: exactly one of `stop`, `reply` and `request` is set."""

    event: str  # "search", "answer", "invalid"
    content: str = ""  # query or answer
    stop: str | None = None  # stop reason of the trajectory
    reply: transcript.Reply | None = None
    request: str | None = None


class Environment(Protocol):
    """The seam between the host loop and whatever the policy talks to."""

    def act(self, turn_text: str, turns_left: int) -> Outcome:
        """Judges a turn. With no turns left the outcome is a stop."""

    def fetch(self, requests: list[str]) -> list[transcript.Reply]:
        """Replies to requests, in their order. Called from worker threads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchEnvironment:
    """Search-R1's environment: `<search>` is answered with passages, `<answer>` ends the episode."""

    protocol: settings.Protocol
    retriever: base.Retriever
    passages_per_search: int
    timeout_s: float | None = None  # of a search; None where the retriever keeps to one of its own

    def act(self, turn_text: str, turns_left: int) -> Outcome:
        action = text_protocol.parse_action(turn_text)
        outcome = {"event": action.kind, "content": action.content}
        if action.kind == "answer":
            return Outcome(**outcome, stop="answered")
        if turns_left == 0:
            return Outcome(**outcome, stop="search_limit" if action.kind == "search" else "no_action")
        if action.kind == "search":
            return Outcome(**outcome, request=action.content)
        return Outcome(**outcome, reply=transcript.correction(self.protocol))

    def fetch(self, requests: list[str]) -> list[transcript.Reply]:
        """Raises `RetrievalError` where a search fails, takes too long, or answers with anything but passages."""
        failure = functools.partial(base.RetrievalError, attempts=1, batch=len(requests))
        try:
            results = _within(self.timeout_s, self.retriever.search, requests, self.passages_per_search)
        except base.RetrievalError:
            raise
        except Exception as error:  # any engine may stand behind the protocol; its failure is named
            raise failure(requests[0], repr(error)) from error
        if not isinstance(results, list):
            raise failure(requests[0], f"the results are not a list: {results!r:.200}")
        if len(results) != len(requests):
            raise failure(requests[0], f"{len(results)} results for {len(requests)} queries")
        for request, found in zip(requests, results, strict=True):
            if not _are_passages(found):
                raise failure(request, f"the result is not a list of passages: {found!r:.200}")
        return [transcript.information(self.protocol, found) for found in results]


def _are_passages(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(p, types.Passage) and isinstance(p.title, str) and isinstance(p.text, str) for p in found
    )


def _within(timeout_s: float | None, call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns or raises.

    Raises:
      TimeoutError: when it took longer; its thread is left behind and keeps nobody from ending the process.
    """
    if timeout_s is None:
        return call(*args)
    answer: futures.Future = futures.Future()

    def answer_it():
        try:
            answer.set_result(call(*args))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=answer_it, name="search", daemon=True).start()
    if not futures.wait([answer], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s} s; retriever.timeout_s sets the limit")
    return answer.result()
