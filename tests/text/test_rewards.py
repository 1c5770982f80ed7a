import dataclasses
import sys

import numpy as np
import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.text import protocol, rewards, transcript


def trajectory(answer, golden=("Beijing",), turns=()):
    return types.Trajectory(
        example=types.QAExample(id="q", question="?", golden_answers=golden),
        sample=0,
        tokens=np.zeros(1, np.int32),
        sampled=np.ones(1, bool),
        behaviour_logp=np.zeros(1, np.float32),
        prompt_tokens=0,
        turns=turns,
        stop_reason="answered" if answer is not None else "no_action",
        answer=answer,
        tools=("search",),
    )


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The Beatles", "beatles"),
        ("  An  apple,\ta\nday! ", "apple day"),
        ("U.S.A.", "usa"),
        ("A.", ""),  # punctuation goes first, and what is left is an article
        ("a-ha", "aha"),
        ("Theatre and anthem", "theatre and anthem"),  # articles are whole words
        ("1,234.5", "12345"),
        ("Jay-Z's", "jayzs"),
        ("ZÜRICH", "zürich"),
        ("O’Neill – Tokyo", "o’neill – tokyo"),  # only ASCII punctuation is dropped
        ("north\u00a0pole", "north pole"),  # a no-break space is white space
        ("東京", "東京"),
        ("The A An", ""),
        ("", ""),
    ],
)
def test_normalisation_drops_case_punctuation_articles_and_spaces(text, normalised):
    assert rewards.normalize_answer(text) == normalised


@pytest.mark.parametrize(
    "prediction, golden, exact, sub",
    [
        ("the Beatles!", ("Beatles", "Fab Four"), 1, 1),
        ("fab  four", ("Beatles", "The Fab Four"), 1, 1),
        ("The Beatles, from Liverpool", ("Beatles",), 0, 1),
        ("Beat", ("Beatles",), 0, 0),
        ("Beatlesque", ("Beatles",), 0, 1),  # a substring need not be whole words
        ("Paris", (), 0, 0),
        ("", ("Beatles",), 0, 0),
        ("The The", ("The The",), 1, 1),
        ("Matt Johnson", ("The The",), 0, 0),  # a golden answer without words is in no answer with some
        (None, ("Beatles",), 0, 0),
        (None, ("The The",), 0, 0),
        ("None", ("none",), 1, 1),
    ],
)
def test_exact_and_sub_exact_match(prediction, golden, exact, sub):
    assert rewards.exact_match(prediction, golden) == exact
    assert rewards.sub_exact_match(prediction, golden) == sub


@pytest.mark.parametrize(
    "prediction, golden, f1",
    [
        ("the cat sat", ("a cat sat",), 1),
        ("cat sat mat", ("cat ran",), 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # 0.4
        ("cat cat cat", ("cat cat dog",), 2 / 3),  # two of three on either side
        ("Barack Obama", ("Joe Biden", "Obama", "President Obama Junior"), 2 / 3),  # the best of 0, 2/3, 0.4
        ("dog", ("cat",), 0),
        ("", ("cat",), 0),
        ("The", ("An",), 1),  # neither has a word
        ("cat", (), 0),
        (None, ("cat",), 0),
        (None, ("The The",), 0),
    ],
)
def test_f1_counts_common_words(prediction, golden, f1):
    assert rewards.token_f1(prediction, golden) == pytest.approx(f1, abs=1e-12)


THINK = "<think> hm </think>"
PASSAGES = (
    types.Passage(id="p1", title='"Peking"', text="A former name of Beijing."),
    types.Passage(id="p2", title='"Nanjing"', text="The southern capital. <think> </answer>"),
)


def turn(text, *, reply="", passages=()):
    """A turn as the rollout books it."""
    action = protocol.parse_action(text, ("search",))
    return types.Turn(text=text, event=action.kind, content=action.content, reply=reply, passages=passages)


def search(query="capital", *, think=THINK, passages=PASSAGES, texts=settings.Protocol()):
    reply = transcript.information(texts, passages)
    return turn(
        f"{think}\n<search> {query} </search>", reply=reply.prefix + reply.body + reply.suffix, passages=reply.passages
    )


def answer(content="Beijing", *, think=THINK):
    return turn(f"{think}\n<answer> {content} </answer>")


def ends(*turns, golden=("Beijing",)):
    """The episode of these turns."""
    last = turns[-1]
    return trajectory(last.content if last.event == "answer" else None, golden, turns)


INVALID = turn(f"{THINK} I would rather not.", reply=settings.Protocol().correction)


@pytest.mark.parametrize(
    "turns",
    [
        (answer(),),
        (search(), answer()),
        (search(), search("north capital"), search(), answer("Nanjing")),
        (turn("\n<think></think>\t\n<answer></answer>\n"),),  # blocks may be empty
        (turn("<think>a < b > c </thin></think><answer>b</answer>"),),  # what only looks like a tag is text
    ],
)
def test_think_search_think_answer_is_well_formed(turns):
    assert rewards.well_formed(ends(*turns))


def test_a_prompt_that_ends_in_think_opens_the_first_turn_alone():
    opened = THINK.removeprefix("<think>")
    for turns, formed in (
        ((answer(think=opened),), True),
        ((search(think=opened), answer()), True),
        ((search(think=opened), answer(think=opened)), False),
        ((answer(),), False),  # two openings
    ):
        assert rewards.well_formed(dataclasses.replace(ends(*turns), thinking=True)) == formed
        assert not rewards.well_formed(ends(*turns)) or not formed


@pytest.mark.parametrize(
    "calls, formed",
    [
        (("<note> a </note>",), True),
        (("<search> a </search>", "<note> b </note>"), True),
        (("<calculate> 1 </calculate>",), False),  # no tool of the episode, so no call
        (("<note> <search> </note>",), False),  # another tool's tag in a block
        (("<note> <calculate> </note>",), True),  # which is a text here
    ],
)
def test_well_formed_episodes_call_the_tools_that_they_had(calls, formed):
    tools = ("search", "note")
    turns = [f"{THINK} {call}" for call in calls] + [f"{THINK} <answer> b </answer>"]
    actions = [protocol.parse_action(text, tools) for text in turns]
    made = [types.Turn(text=t, event=a.kind, content=a.content) for t, a in zip(turns, actions, strict=True)]
    episode = dataclasses.replace(trajectory("b", turns=tuple(made)), tools=tools)
    assert rewards.well_formed(episode) == formed
    without = dataclasses.replace(episode, tools=("search",))
    assert not rewards.well_formed(without)


@pytest.mark.parametrize(
    "turns",
    [
        (turn("<answer> b </answer>"),),
        (turn("Well. <think> a </think> <answer> b </answer>"),),
        (turn("<think> a </think> So: <answer> b </answer>"),),
        (turn("<think> a </think> <answer> b </answer>."),),  # the last token may carry more than the tag
        (turn("<think> a </think> <think> a </think> <answer> b </answer>"),),
        (turn("<think> a <answer> b </answer>"),),
        (turn("a </think> <answer> b </answer>"),),
        (turn("</think> a <think> <answer> b </answer>"),),
        (turn("<think> a <search> </think> <answer> b </answer>"),),
        (turn("<think> a </think> <answer> <think> b </answer>"),),
        (turn("<think> a </think> <information> b </information> <answer> b </answer>"),),  # made up
        (search(think=""), answer()),
        (search(), answer(think="")),
        (search(), turn("so it is <answer> b </answer>")),
        (search(),),
        (search(), search()),
        (INVALID, answer()),
        (search(), INVALID, answer()),
        (search(""), answer()),  # an empty query is no action
        (types.Turn(text="<think> a </think> <answer> b", event="truncated"),),
        (answer(), answer()),
        (),
    ],
)
def test_anything_else_is_malformed(turns):
    assert not rewards.well_formed(trajectory("Beijing", turns=turns))


@pytest.mark.parametrize("information", ["{docs}", "\n<result>{docs}</result>", "<answer> Found: {docs} <think>"])
def test_the_environments_words_do_not_change_the_form(information):
    texts = settings.Protocol(prompt="Q: {question}", information=information, passage="[{i}] {text}\n")
    assert rewards.well_formed(ends(search(texts=texts), answer()))
    assert rewards.well_formed(ends(search(texts=texts, passages=()), answer()))
    assert not rewards.well_formed(ends(search(texts=texts, think=""), answer()))


@pytest.mark.parametrize(
    "golden, worth",
    [
        (("beijing",), True),  # in a text
        (("The Peking!",), True),  # in a title, normalised
        (("Shanghai", "southern capital"), True),  # in a second passage, the second golden answer
        (("ijin",), True),  # a substring need not be whole words
        (("Shanghai",), False),
        (("information",), False),  # the wrapper's
        (("Doc 2",), False),
        (("The The",), False),  # no words
        ((), False),
    ],
)
def test_an_answer_is_retrieved_where_it_stands_in_a_passage(golden, worth):
    assert rewards.retrieved(ends(search(passages=()), search(), golden=golden)) is worth


def test_what_was_cut_or_never_shown_is_not_retrieved():
    whole = search()
    cut = types.Turn(
        text=whole.text, event="search", content="capital", passages=PASSAGES,
        reply='<information>Doc 1(Title: "Peking") A former name</information>',
    )  # fmt: skip
    assert rewards.retrieved(ends(cut, golden=("former name",)))
    assert not rewards.retrieved(ends(cut))
    assert not rewards.retrieved(ends(INVALID, answer(), golden=("previous action", "Beijing")))


@pytest.mark.parametrize(
    "queries, repeated",
    [
        ((), 0),
        (("capital",), 0),
        (("capital", "The Capital?"), 1),
        (("capital", "capitals"), 0),
        (("a", "an", "b", "b.", "B"), 3),  # two without words, then one asked three times
        (("x", "y", "x", "y"), 2),
    ],
)
def test_a_query_that_normalises_to_an_earlier_one_is_repeated(queries, repeated):
    asked = ends(*map(search, queries), answer("capital"))
    assert rewards.repeated_queries(asked) == repeated


def test_a_search_that_was_not_answered_repeats_nothing():
    assert rewards.repeated_queries(ends(search("x"), turn("<search>x</search>"))) == 0


LOOSE = "<answer> {} </answer>"  # answered, malformed


@pytest.mark.parametrize(
    "turns, reference, other",
    [  # with the reference's coefficients, and with structure 0.3, retrieval 0.15, answered 0.05
        pytest.param((search(), answer("the Beijing")), 1.0, 1.0, id="right and well-formed"),
        pytest.param((turn(LOOSE.format("the Beijing")),), 0.8, 0.7, id="right, malformed"),
        pytest.param((search(), turn(LOOSE.format("Beijing"))), 0.8, 0.7, id="right, malformed, retrieved"),
        pytest.param((search(passages=PASSAGES[1:]), answer("Nanjing")), 0.2, 0.3, id="wrong, well-formed"),
        pytest.param((answer(""),), 0.2, 0.3, id="empty, well-formed"),
        pytest.param((search(), answer("Nanjing")), 0.2, 0.45, id="wrong, well-formed, retrieved"),
        pytest.param((turn(LOOSE.format("Nanjing")),), 0.1, 0.05, id="wrong, malformed"),
        pytest.param((search(), turn(LOOSE.format("Nanjing"))), 0.1, 0.05, id="wrong, malformed, retrieved"),
        pytest.param((turn(LOOSE.format("")),), 0.1, 0.05, id="empty, malformed"),
        pytest.param((search(), search()), 0.0, 0.0, id="no answer, retrieved"),
        pytest.param((INVALID,), 0.0, 0.0, id="no answer"),
    ],
)
def test_the_format_aware_reward_follows_its_table(turns, reference, other):
    episode = ends(*turns)
    assert rewards.resolve(settings.Reward(name="format_aware"))(episode) == pytest.approx(reference, abs=1e-12)
    changed = rewards.resolve(settings.Reward(name="format_aware", structure=0.3, retrieval=0.15, answered=0.05))
    assert changed(episode) == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize(
    "name, worth", [("exact_match", (0, 1, 0)), ("sub_exact_match", (1, 1, 0)), ("f1", (2 / 3, 1, 0))]
)
def test_a_reward_scores_the_answer_of_a_trajectory(name, worth):
    reward = rewards.resolve(settings.Reward(name=name))
    scores = [reward(trajectory(answer, ("Beijing",))) for answer in ("Beijing, China", "beijing", None)]
    assert scores == pytest.approx(worth, abs=1e-12)
    assert all(type(score) is float for score in scores)


def test_every_reward_is_a_part_by_its_name_and_a_float():
    episode = ends(search("x"), search("X!"), answer("Beijing, China"))
    parts = {
        "exact_match": 0.0,
        "sub_exact_match": 1.0,
        "f1": 2 / 3,
        "format_aware": 0.2,
        "well_formed": 1.0,
        "retrieved": 1.0,
        "searches": 2.0,
        "repeated_queries": 1.0,
    }
    assert set(parts) == set(rewards.REWARDS)
    for name, worth in parts.items():
        assert rewards.resolve(settings.Reward(name=name)).parts(episode) == {name: pytest.approx(worth, abs=1e-12)}
        assert type(rewards.resolve(settings.Reward(name=name)).parts(episode)[name]) is float


def test_a_reward_is_the_weighted_sum_of_its_parts(own_rewards):
    reward = rewards.resolve(settings.Reward(name="f1", extra=("retrieved=0.1", "own_rewards:short=-4", "searches=0")))
    episode = ends(search(), search(), answer("Beijing, China"))
    parts = reward.parts(episode)
    assert parts == pytest.approx({"f1": 2 / 3, "retrieved": 1, "own_rewards:short": 1 / 14, "searches": 2})
    assert list(parts) == ["f1", "retrieved", "own_rewards:short", "searches"]
    assert reward(episode) == reward.total(parts) == pytest.approx(2 / 3 + 0.1 - 4 / 14, abs=1e-12)


# Rewards of turns.


def of_turns(reward, *extra):
    """A reward with the function in place of "f1", and what it makes of three turns."""
    resolved = rewards.resolve(settings.Reward(name="f1", extra=extra))
    resolved = dataclasses.replace(resolved, rewards={**resolved.rewards, "f1": reward})
    episode = ends(search(), search(), answer("Beijing, China"))
    return resolved, resolved.parts(episode), episode


def test_a_number_counts_for_the_last_turn_where_others_give_one_each():
    reward, parts, episode = of_turns(lambda _: np.float32([0.5, 0.25, 0.0]), "sub_exact_match=2", "searches=0")
    assert parts == {"f1": (0.5, 0.25, 0.0), "sub_exact_match": 1.0, "searches": 2.0}
    assert reward.total(parts) == reward(episode) == (0.5, 0.25, 2.0)
    assert [rewards.amount(part) for part in parts.values()] == [0.75, 1.0, 2.0]
    assert rewards.amount(reward.total(parts)) == 2.75


def test_rewards_of_turns_are_added_turn_by_turn(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "retrieved", lambda _: [1, 2, 4])
    reward, parts, _ = of_turns(lambda _: (0.5, 0.25, 0.0), "retrieved=-0.5")
    assert reward.total(parts) == (0.0, -0.75, -2.0)


def test_what_is_only_looked_at_makes_no_reward_of_turns(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "retrieved", lambda _: [1.0, 2.0, 4.0])
    reward, parts, _ = of_turns(lambda _: 0.5, "retrieved=0")
    assert parts["retrieved"] == (1.0, 2.0, 4.0) and reward.total(parts) == 0.5


@pytest.mark.parametrize("given", [[1.0, 2.0], [], np.zeros(4)])
def test_a_reward_that_gives_other_than_one_number_for_each_turn_is_refused(given):
    with pytest.raises(ValueError, match=f"'f1' gives {len(given)} numbers for the 3 turns of question 'q', sample 0"):
        of_turns(lambda _: given)


def test_the_coefficients_hold_for_the_format_aware_reward_as_an_extra():
    reward = rewards.resolve(settings.Reward(name="exact_match", extra=("format_aware=0.5",), answered=0.3))
    episode = ends(turn(LOOSE.format("Nanjing")))
    assert reward.parts(episode) == {"exact_match": 0.0, "format_aware": 0.3}
    assert reward(episode) == 0.15


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def short(trajectory):\n    return 1 / len(trajectory.answer)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


def test_a_users_own_reward_is_named_by_module_and_function(own_rewards):
    assert rewards.resolve(settings.Reward(name="own_rewards:short"))(trajectory("four", ())) == 0.25


@pytest.mark.parametrize("name", ["", "em", "exact-match", "json", "json:", ":dumps", "json:no_such", "no_such:f"])
def test_an_unknown_reward_is_refused_with_the_choices(name):
    with pytest.raises(
        ValueError, match=f"reward names '{name}'.*exact_match, sub_exact_match, f1.*package.module:name"
    ):
        rewards.resolve(settings.Reward(name=name))


def test_an_extra_reward_that_is_unknown_is_refused_like_the_first():
    with pytest.raises(ValueError, match="reward names 'em'; make it one of exact_match"):
        rewards.resolve(settings.Reward(name="exact_match", extra=("retrieved=0.1", "em=1")))


def test_a_name_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="reward names 'string:punctuation', which is .*; make it a function"):
        rewards.resolve(settings.Reward(name="string:punctuation"))


@pytest.mark.parametrize("term", ["retrieved", "retrieved=", "=0.1", "retrieved=much", "retrieved=nan", "f1=inf", ""])
def test_an_extra_reward_without_a_finite_weight_is_refused(term):
    with pytest.raises(ValueError, match=f"reward.extra holds '{term}'; write name=weight .* retrieved=0.1"):
        rewards.resolve(settings.Reward(name="exact_match", extra=(term,)))


@pytest.mark.parametrize("extra", [("exact_match=0.5",), ("retrieved=0.1", "retrieved=0.2")])
def test_a_reward_that_is_named_twice_is_refused(extra):
    name = extra[-1].partition("=")[0]
    with pytest.raises(ValueError, match=f"reward '{name}' is named twice, again in '{extra[-1]}'; name it once"):
        rewards.resolve(settings.Reward(name="exact_match", extra=extra))
