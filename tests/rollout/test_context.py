"""Where the context ends: what is cut, what stops, what is refused.

Every byte is a token, so lengths can be counted. A prompt of 6, a turn of 19 and the 7 around the passages leave
C - 32 of a context of C; one place is kept for a token after the block, C - 33 are for passages.
"""

import pytest
import scripted

from searchr1_jax.core import settings, types
from searchr1_jax.rollout import episodes

QUESTION = types.QAExample(id="nq/1", question="Who's", golden_answers=())
PROTOCOL = settings.Protocol(prompt="{question}", correction="Again!", information="<i>{docs}</i>", passage="{text}")
PROMPT, TURN = ("world", "Who's?"), "<search>ab</search>"


def play(tokenizer, *turns, passage_tokens=0, **limits):
    """One episode: who wrote what, its trajectory, and the queries that were asked."""
    find = lambda query: [types.Passage(id="0", title="", text="x" * passage_tokens)]
    trajectory, queries = scripted.play_one(tokenizer, QUESTION, turns, find, protocol=PROTOCOL, **limits)
    return scripted.stretches(trajectory, tokenizer), trajectory, queries


@pytest.mark.parametrize(
    "context, passage_tokens, left, after",
    [
        (133, 100, 100, 1),  # whole, and one token fits after it
        (134, 100, 100, 2),
        (132, 100, 99, 1),  # cut by one
        (65, 100, 32, 1),  # as little as is worth showing
        (53, 20, 20, 1),  # fewer, but whole
    ],
)
def test_passages_are_cut_to_fit_the_context(byte_tokenizer, context, passage_tokens, left, after):
    stretches, trajectory, _ = play(byte_tokenizer, TURN, "y" * 99, passage_tokens=passage_tokens, context=context)
    assert stretches == [PROMPT, ("policy", TURN), ("world", "<i>" + "x" * left + "</i>"), ("policy", "y" * after)]
    assert (trajectory.stop_reason, trajectory.answer) == ("length", None)
    assert trajectory.turns[-1] == types.Turn(text="y" * after, event="truncated", tokens=after)
    assert trajectory.passages_cut == (left < passage_tokens)
    assert len(trajectory.tokens) == context
    assert trajectory.searches == 1


@pytest.mark.parametrize("context, passage_tokens", [(64, 100), (52, 20), (33, 1), (26, 100), (25, 100)])
def test_an_episode_ends_where_too_little_of_the_passages_would_remain(byte_tokenizer, context, passage_tokens):
    stretches, trajectory, queries = play(byte_tokenizer, TURN, passage_tokens=passage_tokens, context=context)
    assert stretches == [PROMPT, ("policy", TURN)] and queries == ("ab",)
    assert (trajectory.stop_reason, trajectory.answer) == ("length", None)
    assert trajectory.turns[-1].event == "search"
    assert (trajectory.searches, trajectory.passages_cut) == (0, 0)


def test_passages_are_cut_to_their_budget_and_the_closing_tag_stays(byte_tokenizer):
    limits = dict(max_information_tokens=50, max_turn_tokens=30, max_turns=1)
    stretches, trajectory, _ = play(byte_tokenizer, TURN, "y" * 99, passage_tokens=100, context=200, **limits)
    assert stretches == [PROMPT, ("policy", TURN), ("world", "<i>" + "x" * 50 + "</i>"), ("policy", "y" * 30)]
    assert (trajectory.stop_reason, trajectory.passages_cut) == ("no_action", 1)


@pytest.mark.parametrize("context, fits", [(15, True), (14, False)])
def test_a_correction_that_does_not_fit_ends_the_episode(byte_tokenizer, context, fits):
    """Prompt 6, turn 2, correction 6: with one token after them, 15."""
    stretches, trajectory, _ = play(byte_tokenizer, "hm<eos>", "zz", context=context)
    assert stretches == [PROMPT, ("policy", "hm")] + [("world", "Again!"), ("policy", "z")] * fits
    assert (trajectory.stop_reason, trajectory.answer) == ("length", None)


def test_decoding_stops_where_the_context_is_full(byte_tokenizer):
    stretches, trajectory, queries = play(byte_tokenizer, TURN, context=6 + 18)
    assert stretches == [PROMPT, ("policy", "<search>ab</search")]
    assert (trajectory.stop_reason, trajectory.answer, queries) == ("length", None, ())
    assert trajectory.turns == (types.Turn(text="<search>ab</search", event="truncated", tokens=18),)


def test_an_answer_in_the_last_place_of_the_context_counts(byte_tokenizer):
    _, trajectory, _ = play(byte_tokenizer, "<answer>a</answer>", context=6 + 18)
    assert (trajectory.stop_reason, trajectory.answer, len(trajectory.tokens)) == ("answered", "a", 24)


def test_a_prompt_without_room_for_a_turn_is_refused_with_its_id(byte_tokenizer):
    make = lambda room: episodes.make_tasks([QUESTION], byte_tokenizer, PROTOCOL, samples=3, room=room)
    prompt = tuple(byte_tokenizer.encode("Who's?"))
    assert make(6) == [episodes.Task(example=QUESTION, prompt=prompt, samples=3)]
    refusal = "question 'nq/1' has 6 tokens, but only 5 leave room.*context_tokens"
    with pytest.raises(ValueError, match=refusal):
        make(5)
