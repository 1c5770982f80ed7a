"""A search engine: `<search> who wrote Emma </search>` is answered with passages."""

from concurrent import futures
import dataclasses
import threading
from typing import Any, Callable

from searchr1_jax.core import types
from searchr1_jax.retrieval import base
from searchr1_jax.rollout import environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """The queries of calls that come together go to the retriever together."""

    retriever: base.Retriever
    passages: int  # of a search
    timeout_s: float | None = None  # of a search; None where the retriever keeps to one of its own
    name = "search"

    def call(self, calls: list[environment.Call]) -> list[list[types.Passage]]:
        return _within(self.timeout_s, self.retriever.search, [call.content for call in calls], self.passages)


def _within(timeout_s: float | None, call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns or raises; TimeoutError when it takes longer.

    Its thread is then left behind and keeps nobody from ending the process.
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
