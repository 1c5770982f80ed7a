"""What answers the policy's turns. Search is one environment; another tool is another file like this one.

    text of a turn, turns left ─▶ act ─▶ Outcome: a reply, a reason to stop, or a request
                                                  request ─▶ fetch (in worker threads, in batches) ─▶ Reply

`act` is immediate and runs in the host loop; whatever may take time is a request. An environment knows texts
only: the loop tokenises replies, cuts them to fit, and keeps the books.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

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

    protocol: text_protocol.Protocol
    retriever: base.Retriever
    passages_per_search: int

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
        """Raises `RetrievalError` where the retriever fails or gives another number of results than asked for."""
        try:
            results = self.retriever.search(requests, self.passages_per_search)
        except base.RetrievalError:
            raise
        except Exception as error:  # any engine may stand behind the protocol; its failure is named
            raise base.RetrievalError(requests[0], repr(error), attempts=1, batch=len(requests)) from error
        if len(results) != len(requests):
            cause = f"{len(results)} results for {len(requests)} queries"
            raise base.RetrievalError(requests[0], cause, attempts=1, batch=len(requests))
        return [transcript.information(self.protocol, found) for found in results]
