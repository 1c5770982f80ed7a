"""Search-R1's environment by itself: what a turn leads to, and what becomes of a search that fails."""

import pickle
import threading

import pytest

from searchr1_jax.core import settings
from searchr1_jax.core import types
from searchr1_jax.retrieval import base
from searchr1_jax.rollout import environment
from searchr1_jax.text import transcript

PROTOCOL = settings.Protocol(correction="Again!", information="<i>{docs}</i>", passage="{i} {text} ")
CORRECTION = transcript.Reply(prefix="Again!")


class Retriever:
    """Finds passages that hold query and rank, or does as told."""

    def __init__(self, search=None):
        self.search = search or (lambda queries, k: [[passage(f"{q}{i}") for i in range(k)] for q in queries])


def passage(text):
    return types.Passage(id=text, title="T", text=text)


def search(retriever=None, passages=2, timeout_s=None):
    return environment.SearchEnvironment(
        protocol=PROTOCOL,
        retriever=retriever or Retriever(),
        passages_per_search=passages,
        timeout_s=timeout_s,
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


@pytest.mark.parametrize("timeout_s", [None, 10.0])
def test_any_failure_of_a_retriever_is_a_retrieval_error_that_names_query_and_cause(timeout_s):
    cause = OSError("the index is on fire")
    with pytest.raises(base.RetrievalError) as caught:
        search(failing(cause), timeout_s=timeout_s).fetch(["who?", "why?"])
    error = caught.value
    assert (error.query, error.attempts, error.batch) == ("who?", 1, 2)
    assert error.__cause__ is cause
    assert "'who?' (one of 2 sent together) failed after 1 attempt: OSError('the index is on fire')" in str(error)


@pytest.mark.parametrize("timeout_s", [None, 10.0])
def test_a_retrievers_own_error_passes_as_it_is(timeout_s):
    error = base.RetrievalError("who?", "no answer", attempts=4)
    with pytest.raises(base.RetrievalError) as caught:
        search(failing(error), timeout_s=timeout_s).fetch(["who?"])
    assert caught.value is error


def test_a_retrieval_error_is_the_same_on_another_process():
    error = base.RetrievalError("who?", "no answer", attempts=4, batch=2)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("results", [[], [[]], [[], [], []]])
def test_another_number_of_results_than_of_queries_is_an_error(results):
    with pytest.raises(base.RetrievalError, match=f"'a' .*: {len(results)} results for 2 queries"):
        search(Retriever(lambda queries, k: results)).fetch(["a", "b"])


P = passage("p")


@pytest.mark.parametrize(
    "results, query, cause",
    [
        (None, "a", "the results are not a list: None"),
        ("pp", "a", "the results are not a list: 'pp'"),  # as long as there are queries
        ({"a": [P], "b": [P]}, "a", "the results are not a list: {'a'"),
        ([[P], None], "b", "not a list of passages: None"),
        ([[P], "text"], "b", "not a list of passages: 'text'"),
        ([P, P], "a", "not a list of passages: Passage"),  # one nesting too few
        ([[[P]], [[P]]], "a", r"not a list of passages: \[\[Passage"),  # and one too many
        ([[], [P, None]], "b", r"not a list of passages: \[Passage\(.*None\]"),
        ([[P], ["text"]], "b", r"not a list of passages: \['text'\]"),
        ([[{"id": "1", "contents": "T\ntext"}], []], "a", r"not a list of passages: \[{'id'"),
        ([[P], [passage(None)]], "b", "not a list of passages: .*text=None"),
        ([[P], [passage(b"text")]], "b", "not a list of passages: .*text=b'text'"),
        ([[types.Passage(id="1", title=7, text="")], []], "a", "not a list of passages: .*title=7"),
    ],
    ids=str,
)
def test_an_answer_that_is_no_lists_of_passages_is_an_error_that_shows_it(results, query, cause):
    with pytest.raises(base.RetrievalError, match=f"'{query}' .one of 2 sent together.*: .*{cause}") as error:
        search(Retriever(lambda queries, k: results)).fetch(["a", "b"])
    assert (error.value.query, error.value.attempts, error.value.batch) == (query, 1, 2)


def test_what_is_shown_of_a_wrong_answer_is_short():
    with pytest.raises(base.RetrievalError) as error:
        search(Retriever(lambda queries, k: ["x" * 10_000])).fetch(["a"])
    assert len(str(error.value)) < 400


def test_a_search_that_hangs_is_an_error_after_its_time_out_and_keeps_no_process_alive():
    may_answer = threading.Event()

    def hang(queries, k):
        hanging.append(threading.current_thread())
        may_answer.wait(timeout=10)
        return [[]]

    hanging = []
    with pytest.raises(base.RetrievalError, match="'who' failed after 1 attempt: .*no answer within 0.05 s"):
        search(Retriever(hang), timeout_s=0.05).fetch(["who"])
    (thread,) = hanging
    assert thread.is_alive() and thread.daemon
    may_answer.set()


def test_a_search_within_its_time_out_is_answered():
    (reply,) = search(timeout_s=10.0).fetch(["a"])
    assert reply.body == "1 a0 2 a1"
