"""The environment by itself: what a turn leads to, how tools are called, and what becomes of one that fails."""

import pickle

import pytest
import scripted

from searchr1_jax.core import settings, types
from searchr1_jax.rollout import environment
from searchr1_jax.text import transcript

PROTOCOL = settings.Protocol(correction="Again!", information="<i>{docs}</i>", passage="{i} {text} ")
CORRECTION = transcript.Reply(prefix="Again!")


class Tool:
    """Replies with what `answer` makes of the contents of its calls."""

    def __init__(self, name, answer):
        self.name, self._answer = name, answer

    def call(self, calls):
        return self._answer([call.content for call in calls])


class Counter:
    """Adds up the numbers of an episode."""

    name = "add"

    def __init__(self):
        self.batches = []

    def call(self, calls):
        self.batches.append([(call.example.id, call.sample, call.turn, call.seed, call.step) for call in calls])
        for call in calls:
            call.memory["sum"] = call.memory.get("sum", 0) + int(call.content)
        return [str(call.memory["sum"]) for call in calls]


def passage(text):
    return types.Passage(id=text, title="T", text=text)


def calls(*contents, tool="search"):
    return [
        environment.Call(
            tool=tool, content=content, example=types.QAExample(id="q", question="?", golden_answers=()), sample=0,
            turn=0, seed=0, step=0, memory={},
        )
        for content in contents
    ]  # fmt: skip


def fetch(answer, *contents):
    return environment.Environment(PROTOCOL, [Tool("search", answer)]).fetch(calls(*contents))


@pytest.mark.parametrize(
    "turn, turns_left, outcome",
    [
        ("<search> a </search>", 4, environment.Outcome(event="search", content="a")),
        ("<search> a </search>", 1, environment.Outcome(event="search", content="a")),
        ("<search> a </search>", 0, environment.Outcome(event="search", content="a", stop="turn_limit")),
        ("<add>1</add>", 1, environment.Outcome(event="add", content="1")),
        ("<add>1</add>", 0, environment.Outcome(event="add", content="1", stop="turn_limit")),
        ("<answer> b </answer>", 4, environment.Outcome(event="answer", content="b", stop="answered")),
        ("<answer> b </answer>", 0, environment.Outcome(event="answer", content="b", stop="answered")),
        ("hm", 4, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("hm", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("hm", 0, environment.Outcome(event="invalid", stop="no_action")),
        ("<search> </search>", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("<search> </search>", 0, environment.Outcome(event="invalid", stop="no_action")),
        ("<note> a </note>", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
        ("<search>a <answer>b</answer>", 1, environment.Outcome(event="answer", content="b", stop="answered")),
        ("a</search>", 1, environment.Outcome(event="invalid", reply=CORRECTION)),
    ],
)
def test_a_turn_leads_to_a_call_a_reply_or_a_stop(turn, turns_left, outcome):
    around = environment.Environment(PROTOCOL, [Tool("search", None), Counter()])
    assert around.act(turn, turns_left) == outcome


def test_passages_and_texts_are_replies_in_the_information_block():
    found, text, nothing = fetch(lambda queries: [[passage("x"), passage("y")], "{docs}", []], "a", "b", "c")
    assert found == transcript.Reply(prefix="<i>", body="1 x 2 y", suffix="</i>", passages=(passage("x"), passage("y")))
    assert text == transcript.Reply(prefix="<i>", body="{docs}", suffix="</i>")
    assert nothing == transcript.Reply(prefix="<i>", body="", suffix="</i>")


def test_a_name_that_two_tools_have_is_refused():
    with pytest.raises(ValueError, match="two tools are named 'add'"):
        environment.Environment(PROTOCOL, [Counter(), Counter()])


def test_any_failure_of_a_tool_is_a_tool_error_that_names_tool_call_and_cause():
    cause = OSError("the index is on fire")

    def failing(queries):
        raise cause

    with pytest.raises(environment.ToolError) as caught:
        fetch(failing, "who?", "why?")
    assert caught.value.args[0] == "search" and caught.value.__cause__ is cause
    words = "the tool 'search' failed on 'who?' (one of 2 called together): OSError: the index is on fire"
    assert str(caught.value) == words


def test_a_tool_error_is_the_same_on_another_process():
    error = environment.ToolError("search", "on 'who?': OSError: gone")
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


P = passage("p")


@pytest.mark.parametrize(
    "replies, query, cause",
    [
        (None, "a", "the replies are not a list: None"),
        ("pp", "a", "the replies are not a list: 'pp'"),  # as long as there are calls
        ({"a": [P], "b": [P]}, "a", "the replies are not a list: {'a'"),
        ([], "a", "0 replies to 2 calls"),
        ([[P]], "a", "1 replies to 2 calls"),
        ([[P], [P], [P]], "a", "3 replies to 2 calls"),
        ([[P], None], "b", "neither a text nor a list of passages: None"),
        (["text", 7], "b", "neither a text nor a list of passages: 7"),
        ([P, P], "a", "neither a text nor a list of passages: Passage"),  # one nesting too few
        ([[P], {"result": []}], "b", "neither a text nor a list of passages: {'result'"),
        ([[P], [P, "p"]], "b", "neither a text nor a list of passages"),
        ([[types.Passage(id="p", title="T", text=None)], [P]], "a", "neither a text nor a list of passages"),
    ],
)
def test_replies_that_are_no_texts_or_passages_are_an_error_that_shows_them(replies, query, cause):
    with pytest.raises(environment.ToolError, match=f"'search' failed on '{query}'.*: .*{cause}"):
        fetch(lambda queries: replies, "a", "b")


def test_what_is_shown_of_a_wrong_reply_is_short():
    with pytest.raises(environment.ToolError) as error:
        fetch(lambda queries: [["x" * 10_000]], "a" * 10_000)
    assert len(str(error.value)) < 600


# In episodes.


def question(name):
    return types.QAExample(id=name, question="who", golden_answers=())


def test_a_tool_keeps_the_memory_of_each_episode_by_itself(tagged_tokenizer):
    """Two samples of a question, and another question, whose calls come together and apart."""
    scripts = {
        question("q"): [
            scripted.script(tagged_tokenizer, "<add>1</add>", "<add>2</add>", "<answer>3</answer>"),
            scripted.script(tagged_tokenizer, "<add>10</add>", "hm<eos>", "<add>20</add>", "<answer>30</answer>"),
        ],
        question("r"): [scripted.script(tagged_tokenizer, "<add>100</add>", "<answer>100</answer>")],
    }
    for slots in (1, 4):
        counter = Counter()
        found, _ = scripted.play(
            tagged_tokenizer, scripts, None, protocol=PROTOCOL, tools=[counter], slots=slots, extend_rows=slots
        )
        replies = {key: [turn.reply for turn in t.turns] for key, t in found.items()}
        assert replies == {
            ("q", 0): ["<i>1</i>", "<i>3</i>", ""],
            ("q", 1): ["<i>10</i>", "Again!", "<i>30</i>", ""],
            ("r", 0): ["<i>100</i>", ""],
        }
        seed, step = scripted.SEED_AND_STEP
        asked = [("q", 0, 0), ("q", 0, 1), ("q", 1, 0), ("q", 1, 2), ("r", 0, 0)]
        assert sorted(sum(counter.batches, [])) == [(*each, seed, step) for each in asked]


def test_calls_of_a_tool_go_together_and_those_of_two_tools_apart(tagged_tokenizer):
    library, counter = scripted.Library(lambda query: [passage(query)]), Counter()
    turns = {"a": "<search>a</search>", "b": "<add>1</add>", "c": "<search>c</search>", "d": "<add>2</add>"}
    scripts = {
        question(name): [
            scripted.script(tagged_tokenizer, turn + "<eos>" * turn.startswith("<add"), "<answer>x</answer>")
        ]
        for name, turn in turns.items()
    }
    found, _ = scripted.play(
        tagged_tokenizer, scripts, library, protocol=PROTOCOL, tools=[counter], slots=4, extend_rows=4
    )
    assert [sorted(batch) for batch in counter.batches] == [
        [("b", 0, 0, *scripted.SEED_AND_STEP), ("d", 0, 0, *scripted.SEED_AND_STEP)]
    ]
    trajectory = found["b", 0]
    assert trajectory.tools == ("search", "add")
    assert (trajectory.searches, trajectory.calls("add"), trajectory.calls("search")) == (0, 1, 0)
    assert (found["a", 0].searches, found["a", 0].calls("add")) == (1, 0)


def test_a_tool_that_fails_stops_the_run_by_its_name(tagged_tokenizer):
    scripts = {question("q"): [scripted.script(tagged_tokenizer, "<add>one</add><eos>", "<answer>x</answer>")]}
    running, _ = scripted.rollout(tagged_tokenizer, scripts, None, protocol=PROTOCOL, tools=[Counter()])
    with pytest.raises(environment.ToolError, match="the tool 'add' failed on 'one': ValueError: invalid literal"):
        list(running)


def test_calls_without_turns_left_are_not_made(tagged_tokenizer):
    counter = Counter()
    scripts = {question("q"): [scripted.script(tagged_tokenizer, "<add>1</add>", "<add>2</add>")]}
    found, _ = scripted.play(tagged_tokenizer, scripts, None, protocol=PROTOCOL, tools=[counter], max_turns=1)
    assert found["q", 0].stop_reason == "turn_limit" and found["q", 0].calls("add") == 1
    assert len(counter.batches) == 1
