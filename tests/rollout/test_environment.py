"""Search-R1's environment by itself: what a turn leads to, and what becomes of a search that fails."""

import pytest

from searchr1_jax import types
from searchr1_jax.retrieval import base
from searchr1_jax.rollout import environment
from searchr1_jax.text import protocol as text_protocol
from searchr1_jax.text import transcript

PROTOCOL = text_protocol.Protocol(correction="Again!", information="<i>{docs}</i>", passage="{i} {text} ")
CORRECTION = transcript.Reply(prefix="Again!")


class Retriever:
    """Finds passages that hold query and rank, or does as told."""

    def __init__(self, search=None):
        self.search = search or (lambda queries, k: [[passage(f"{q}{i}") for i in range(k)] for q in queries])


def passage(text):
    return types.Passage(id=text, title="T", text=text)


def search(retriever=None, passages=2):
    return environment.SearchEnvironment(
        protocol=PROTOCOL, retriever=retriever or Retriever(), passages_per_search=passages
    )


@pytest.mark.parametrize(
    "turn, turns_left, outcome",
    [
        ("<search> a </search>", 4, environment.Outcome(event="search", content="a", request="a")),
        ("<search> a </search>", 1, environment.Outcome(event="search", content="a", request="a")),
        ("<search> a </search>", 0, environment.Outcome(event="search", content="a", stop="search_limit")),
        ("<answer> b </answer>", 4, environment.Outcome(event="answer", content="b", stop="answered")),
        ("<answer> b </answer>", 0, environment.Outcome(event="answer", content="b", stop="answered")),
        ("hm", 4, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("hm", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("hm", 0, environment.Outcome(event="invalid", stop="no_action")),
        ("<search> </search>", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("<search> </search>", 0, environment.Outcome(event="invalid", stop="no_action")),
        (
            "<search>a <answer>b</answer>",
            1,
            environment.Outcome(event="answer", content="b", stop="answered"),
        ),
        ("a</search>", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
    ],
)
def test_a_turn_leads_to_a_request_a_reply_or_a_stop(turn, turns_left, outcome):
    assert search().act(turn, turns_left) == outcome


def test_each_request_gets_its_own_passages():
    first, second = search().fetch(["b", "a"])
    assert first == transcript.Reply(
        prefix="<i>", body="1 b0 2 b1", suffix="</i>", passages=(passage("b0"), passage("b1"))
    )
    assert second.body == "1 a0 2 a1"


def test_as_many_passages_are_asked_for_as_the_config_says():
    (reply,) = search(passages=3).fetch(["a"])
    assert reply.body == "1 a0 2 a1 3 a2"


def test_a_search_that_finds_nothing_has_an_empty_block():
    (reply,) = search(Retriever(lambda queries, k: [[]])).fetch(["a"])
    assert reply == transcript.Reply(prefix="<i>", body="", suffix="</i>")


def failing(error):
    def search(queries, k):
        raise error

    return Retriever(search)


def test_any_failure_of_a_retriever_is_a_retrieval_error_that_names_query_and_cause():
    cause = OSError("the index is on fire")
    with pytest.raises(base.RetrievalError) as caught:
        search(failing(cause)).fetch(["who?", "why?"])
    error = caught.value
    assert (error.query, error.attempts, error.batch) == ("who?", 1, 2)
    assert error.__cause__ is cause
    assert "'who?' (one of 2 sent together) failed after 1 attempt: OSError('the index is on fire')" in str(
        error
    )


def test_a_retrievers_own_error_passes_as_it_is():
    error = base.RetrievalError("who?", "no answer", attempts=4)
    with pytest.raises(base.RetrievalError) as caught:
        search(failing(error)).fetch(["who?"])
    assert caught.value is error


@pytest.mark.parametrize("results", [[], [[]], [[], [], []]])
def test_another_number_of_results_than_of_queries_is_an_error(results):
    with pytest.raises(base.RetrievalError, match=f"'a' .*: {len(results)} results for 2 queries"):
        search(Retriever(lambda queries, k: results)).fetch(["a", "b"])
