"""Nothing that an episode holds depends on slots, shards, order or delays; and what happens when a search fails."""

import random
import signal
import socket
import threading
import time

import pytest
import scripted

from searchr1_jax.core import settings, types
from searchr1_jax.retrieval import remote
from searchr1_jax.rollout import environment, episodes, sampling
from searchr1_jax.rollout.tools import search

PROTOCOL = settings.Protocol(prompt="{question}\n", correction="Again!", information="<i>{docs}</i>", passage="{text} ")
LIMITS = dict(protocol=PROTOCOL, context=160, max_turns=3, max_turn_tokens=24, max_information_tokens=60)


def find(query):
    return [types.Passage(id=query, title="", text=f"About {query}: " + "word " * (len(query) * 5))]


def question(name, text="who?"):
    return types.QAExample(id=name, question=text, golden_answers=("b",))


def random_scripts(tokenizer, *, questions):
    """Questions of one to three samples that meet every row of the event table somewhere."""
    rng = random.Random(0)
    turns = (
        lambda: f"<search> q{rng.randrange(9) * '0'} </search>",
        lambda: f"<search>{rng.randrange(99)}</search>",
        lambda: "hm" * rng.randrange(4) + scripted.EOS_MARK,
        lambda: "1234567890" * 3,
        lambda: f"<answer>{rng.randrange(99)}</answer>",
    )
    return {
        question(f"q{n}", f"{'why ' * rng.randrange(12)}{n}"): [
            scripted.script(tokenizer, *(rng.choice(turns)() for _ in range(4))) for _ in range(rng.randint(1, 3))
        ]
        for n in range(questions)
    }


@pytest.fixture(scope="module")
def scripts(tagged_tokenizer):
    return random_scripts(tagged_tokenizer, questions=14)


@pytest.fixture(scope="module")
def alone(tagged_tokenizer, scripts):
    """Every episode as it goes when there is only one slot and one thread, and its engine."""
    settings = dict(slots=1, extend_rows=1, group=1, threads=1, decode_tokens=1)
    return scripted.play(tagged_tokenizer, scripts, scripted.Library(find), **LIMITS, **settings)


def test_the_scripts_meet_every_event_and_every_end(alone):
    trajectories = alone[0].values()
    assert {t.stop_reason for t in trajectories} == {"answered", "turn_limit", "no_action", "length"}
    assert {turn.event for t in trajectories for turn in t.turns} == {"search", "answer", "invalid", "truncated"}
    assert any(t.passages_cut for t in trajectories) and any(t.eos_dropped for t in trajectories)


@pytest.mark.parametrize(
    "settings",
    [
        dict(slots=1, extend_rows=1, group=3),
        dict(slots=2, extend_rows=1, group=1, decode_tokens=3),
        dict(slots=3, extend_rows=2, group=3, threads=1),
        dict(slots=8, extend_rows=4, group=2, decode_tokens=5),
        dict(slots=16, extend_rows=3, group=3, decode_tokens=100, threads=4),
        dict(slots=64, extend_rows=64, group=2),  # more than there are episodes
        dict(slots=4, extend_rows=2, group=2, shards=2),
        dict(slots=12, extend_rows=4, group=3, shards=2, decode_tokens=7, threads=3),
        dict(slots=16, extend_rows=4, group=3, shards=4),
    ],
    ids=str,
)
def test_trajectories_do_not_depend_on_scheduling(tagged_tokenizer, scripts, alone, settings):
    trajectories, engine = alone
    for seed in range(2):
        library = scripted.Library(find, longest_delay_s=0.004, seed=seed)
        order = random.Random(seed).sample(list(scripts), len(scripts))
        shuffled = {example: scripts[example] for example in order}
        again, busy = scripted.play(tagged_tokenizer, shuffled, library, **LIMITS, **settings)
        assert scripted.as_tuples(again) == scripted.as_tuples(trajectories)
        cuts = {identity: slot.cuts for identity, slot in busy.episodes.items()}
        assert cuts == {identity: slot.cuts for identity, slot in engine.episodes.items()}


@pytest.mark.parametrize("chunks", [(1,), (7,), (3, 50), (160,)])
def test_trajectories_do_not_depend_on_the_size_of_chunks(tagged_tokenizer, scripts, alone, chunks):
    again, _ = scripted.play(tagged_tokenizer, scripts, scripted.Library(find), **LIMITS, slots=4, extend_chunks=chunks)
    assert scripted.as_tuples(again) == scripted.as_tuples(alone[0])


def test_every_sample_of_every_question_is_there_once(tagged_tokenizer, scripts, alone):
    wanted = {(example.id, sample) for example, samples in scripts.items() for sample in range(len(samples))}
    running, engine = scripted.rollout(tagged_tokenizer, scripts, scripted.Library(find), **LIMITS, slots=4)
    keys = [t.key for t in running]
    assert len(keys) == len(wanted) > 20 and set(keys) == wanted
    assert engine.episodes.keys() == {scripted.identity(*key) for key in wanted}


def test_an_engine_serves_one_run_after_another(tagged_tokenizer, scripts, alone):
    engine = scripted.rollout(tagged_tokenizer, scripts, None, **LIMITS, slots=4)[1]
    around = environment.Environment(PROTOCOL, [search.Search(retriever=scripted.Library(find), passages=2)])
    limits = episodes.Limits(max_turns=3, max_information_tokens=60, tool_threads=2)
    loop = episodes.Rollout(engine, around, tagged_tokenizer, limits)
    seed, step = scripted.SEED_AND_STEP
    found = {}
    for examples in (list(scripts)[:5], list(scripts)[5:]):
        for example in examples:
            samples = len(scripts[example])
            tasks = episodes.make_tasks([example], tagged_tokenizer, PROTOCOL, samples=samples, room=150)
            found |= {t.key: t for t in loop.run(tasks, sampling.Decoding(), seed=seed, step=step)}
    assert scripted.as_tuples(found) == scripted.as_tuples(alone[0])


def test_no_tasks_are_no_trajectories(tagged_tokenizer):
    assert scripted.play(tagged_tokenizer, {}, None, **LIMITS)[0] == {}


def test_others_decode_on_while_a_search_waits(tagged_tokenizer):
    """The searching question comes first and its passages only once the other question is done."""
    other_is_done = threading.Event()

    def patient(query):
        assert other_is_done.wait(timeout=10)
        return find(query)

    scripts = {
        question("searches"): [scripted.script(tagged_tokenizer, "<search>a</search>", "<answer>b</answer>")],
        question("thinks"): [scripted.script(tagged_tokenizer, "hm<eos>", "hm<eos>", "<answer>c</answer>")],
    }
    running, _ = scripted.rollout(tagged_tokenizer, scripts, scripted.Library(patient), **LIMITS)
    assert next(running).answer == "c"
    other_is_done.set()
    assert [t.answer for t in running] == ["b"]


def test_searches_that_wait_together_are_sent_together(tagged_tokenizer):
    sent = []

    class Retriever:
        def search(self, queries, k):
            sent.append(sorted(queries))
            return [find(query) for query in queries]

    scripts = {
        question(name): [scripted.script(tagged_tokenizer, f"<search>{name}</search>", "<answer>b</answer>")]
        for name in "abc"
    }
    scripted.play(tagged_tokenizer, scripts, Retriever(), **LIMITS, slots=4, extend_rows=4)
    assert sent == [["a", "b", "c"]]


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tool")]


def end(threads):
    """Whether they do, once they have done what they are at; nobody waits for them."""
    for thread in threads:
        thread.join(timeout=5)
    return not any(thread.is_alive() for thread in threads)


def broken(query):
    if query == "bad":
        raise OSError("the index is on fire")
    return find(query)


class Answering:
    """A retriever that answers every batch with the same."""

    def __init__(self, results):
        self._results = results

    def search(self, queries, k):
        return self._results


class Hanging:
    """A retriever that answers nothing before it is let go."""

    def __init__(self):
        self.asked, self._may_answer = threading.Event(), threading.Event()

    def search(self, queries, k):
        self.asked.set()
        self._may_answer.wait(timeout=30)
        return [[] for _ in queries]

    def let_go(self):
        self._may_answer.set()


@pytest.fixture
def hanging():
    retriever = Hanging()
    yield retriever
    retriever.let_go()


@pytest.fixture
def silent_server(monkeypatch):
    """A client of a server that takes connections and says nothing."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield remote.RemoteRetriever(url, timeout_s=0.05, attempts=3, backoff_s=0.01)


FAULTS = {  # a retriever or the fixture that makes it, its time-out, and why its search failed
    "fails": (scripted.Library(broken), None, "OSError: the index is on fire"),
    "finds too few": (Answering([]), None, "0 replies to 1 calls"),
    "finds nothing at all": (Answering(None), None, "the replies are not a list: None"),
    "finds garbage": (Answering([["x"]]), None, r"the reply is neither a text nor a list of passages: \['x'\]"),
    "hangs": ("hanging", 0.05, "TimeoutError: no answer within 0.05 s"),
    "is a silent server": (
        "silent_server",
        None,
        "RetrievalError: the search for 'bad' failed after 3 attempts: http://127.0.0.1.*no answer within 0.05 s",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_search_that_fails_stops_the_run_with_its_query_and_cause(tagged_tokenizer, request, fault):
    """One slot: the first question is done when the second one's search fails."""
    retriever, timeout_s, words = FAULTS[fault]
    if isinstance(retriever, str):
        retriever = request.getfixturevalue(retriever)
    scripts = {
        question("good"): [scripted.script(tagged_tokenizer, "hm<eos>", "<answer>b</answer>")],
        question("worse"): [scripted.script(tagged_tokenizer, "<search> bad </search>")],
        question("later"): [scripted.script(tagged_tokenizer, "<answer>b</answer>")],
    }
    running, engine = scripted.rollout(tagged_tokenizer, scripts, retriever, **LIMITS, slots=1, timeout_s=timeout_s)
    yielded = []
    with pytest.raises(environment.ToolError, match=f"the tool 'search' failed on 'bad': {words}"):
        for trajectory in running:
            yielded.append(trajectory)
    assert [t.key for t in yielded] == [("good", 0)]
    scripted.assert_booked(yielded[0], engine)
    assert scripted.stretches(yielded[0], tagged_tokenizer) == [
        ("world", "who?\n"),
        ("policy", "hm"),
        ("world", "Again!"),
        ("policy", "<answer>b</answer>"),
    ]
    assert end(workers())


def test_ctrl_c_ends_a_run_whose_search_hangs(tagged_tokenizer, hanging):
    scripts = {question("hangs"): [scripted.script(tagged_tokenizer, "<search>bad</search>")]}
    running, _ = scripted.rollout(tagged_tokenizer, scripts, hanging, **LIMITS)

    def interrupt():
        assert hanging.asked.wait(timeout=600)
        time.sleep(0.1)  # a signal that comes between a lock's look at the signals and its wait is seen late
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert next(running, None) is None and workers()  # it has ended, though the search has not
    hanging.let_go()
    assert end(workers())


@pytest.mark.parametrize("leave", [list, lambda running: running.close()], ids=["ended", "abandoned"])
def test_worker_threads_end_with_the_run(tagged_tokenizer, scripts, leave):
    library = scripted.Library(find, longest_delay_s=0.02)
    running, _ = scripted.rollout(tagged_tokenizer, scripts, library, **LIMITS, slots=8)
    next(running)
    assert workers()
    leave(running)
    assert end(workers())
