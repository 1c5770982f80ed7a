"""The search: what it asks the retriever, and how long it waits."""

import threading

import pytest

from searchr1_jax.core import types
from searchr1_jax.rollout import environment
from searchr1_jax.rollout.tools import search


class Retriever:
    """Finds passages that hold query and rank, or does as told."""

    def __init__(self, search=None):
        self.search = search or (lambda queries, k: [[passage(f"{q}{i}") for i in range(k)] for q in queries])


def passage(text):
    return types.Passage(id=text, title="T", text=text)


def call(*queries, retriever=None, passages=2, timeout_s=None):
    example = types.QAExample(id="q", question="?", golden_answers=())
    calls = [
        environment.Call(tool="search", content=q, example=example, sample=i, turn=0, seed=0, step=0, memory={})
        for i, q in enumerate(queries)
    ]
    return search.Search(retriever=retriever or Retriever(), passages=passages, timeout_s=timeout_s).call(calls)


def test_each_call_gets_its_own_passages():
    assert call("b", "a") == [[passage("b0"), passage("b1")], [passage("a0"), passage("a1")]]


def test_as_many_passages_are_asked_for_as_it_is_told():
    assert call("a", passages=3) == [[passage("a0"), passage("a1"), passage("a2")]]


@pytest.mark.parametrize("timeout_s", [None, 10.0])
def test_a_retrievers_error_passes_as_it_is(timeout_s):
    error = OSError("the index is on fire")

    def failing(queries, k):
        raise error

    with pytest.raises(OSError) as caught:
        call("a", retriever=Retriever(failing), timeout_s=timeout_s)
    assert caught.value is error


def test_a_search_that_hangs_is_an_error_after_its_time_out_and_keeps_no_process_alive():
    may_answer = threading.Event()

    def hang(queries, k):
        hanging.append(threading.current_thread())
        may_answer.wait(timeout=10)
        return [[]]

    hanging = []
    with pytest.raises(TimeoutError, match="no answer within 0.05 s; retriever.timeout_s sets the limit"):
        call("who", retriever=Retriever(hang), timeout_s=0.05)
    (thread,) = hanging
    assert thread.is_alive() and thread.daemon
    may_answer.set()


def test_a_search_within_its_time_out_is_answered():
    assert call("a", timeout_s=10.0) == [[passage("a0"), passage("a1")]]
