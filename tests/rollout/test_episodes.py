"""What becomes of each turn, told by episodes written out by hand; and whose tokens they are made of."""

import dataclasses

import pytest
import scripted

from searchr1_jax.core import settings, types
from searchr1_jax.data import demonstrations

QUESTION = types.QAExample(id="nq/1", question="who wrote Emma", golden_answers=("Jane Austen",))
PROTOCOL = settings.Protocol(prompt="Question: {question}\n")
PROMPT = "Question: who wrote Emma?\n"
CORRECTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. "
    "Let me try again.\n"
)
PASSAGES = {
    "Emma": [
        types.Passage(id="7", title='"Emma"', text="A novel of 1815.\nBy Jane Austen."),
        types.Passage(id="3", title='"Emma Thompson"', text="An actress. "),
        types.Passage(id="9", title='"Emmental"', text="A cheese."),
    ],
    "Jane Austen": [types.Passage(id="5", title='"Jane Austen"', text="A novelist.")],
}
EMMA = (
    '\n\n<information>Doc 1(Title: "Emma") A novel of 1815.\nBy Jane Austen.\n'
    'Doc 2(Title: "Emma Thompson") An actress.</information>\n\n'
)
AUSTEN = '\n\n<information>Doc 1(Title: "Jane Austen") A novelist.</information>\n\n'

LOOK = "<think>Who?</think>\n<search> Emma </search>"
ANSWER = "<answer> Jane Austen </answer>"


def policy(text):
    return "policy", text


def world(text):
    return "world", text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """What the policy writes, and what the whole episode must then be."""

    turns: tuple[str, ...]
    stretches: list[tuple[str, str]]
    stop: str
    answer: str | None = None
    queries: tuple[str, ...] = ()  # that reach the retriever
    events: tuple[str, ...]
    eos: int = 0
    limits: dict = dataclasses.field(default_factory=dict)


def corrected(turn, *, written=None, eos=0, **limits):
    """An episode whose first turn is invalid, and whose second answers."""
    return Episode(
        turns=(turn, ANSWER),
        stretches=[world(PROMPT), policy(turn if written is None else written), world(CORRECTION), policy(ANSWER)],
        stop="answered",
        answer="Jane Austen",
        events=("invalid", "answer"),
        eos=eos,
        limits=limits,
    )


EPISODES = {
    "an answer ends the episode": Episode(
        turns=(ANSWER,),
        stretches=[world(PROMPT), policy(ANSWER)],
        stop="answered",
        answer="Jane Austen",
        events=("answer",),
    ),
    "an empty answer is an answer": Episode(
        turns=("<answer></answer>",),
        stretches=[world(PROMPT), policy("<answer></answer>")],
        stop="answered",
        answer="",
        events=("answer",),
    ),
    "a search is answered with the top passages": Episode(
        turns=(LOOK, "<search>Jane Austen</search>", ANSWER),
        stretches=[
            world(PROMPT),
            policy(LOOK),
            world(EMMA),
            policy("<search>Jane Austen</search>"),
            world(AUSTEN),
            policy(ANSWER),
        ],
        stop="answered",
        answer="Jane Austen",
        queries=("Emma", "Jane Austen"),
        events=("search", "search", "answer"),
    ),
    "a turn ends at its first closing tag": Episode(
        turns=("<search>Jane Austen</search> or <search>Emma</search>", ANSWER + " I hope."),
        stretches=[world(PROMPT), policy("<search>Jane Austen</search>"), world(AUSTEN), policy(ANSWER)],
        stop="answered",
        answer="Jane Austen",
        queries=("Jane Austen",),
        events=("search", "answer"),
    ),
    "the answer inside an open search is the answer": Episode(
        turns=("<search>a <answer>b</answer>",),
        stretches=[world(PROMPT), policy("<search>a <answer>b</answer>")],
        stop="answered",
        answer="b",
        events=("answer",),
    ),
    "words alone are invalid": corrected("I don't know.<eos>", written="I don't know.", eos=1),
    "a search that is not closed is invalid": corrected("<search>Emma<eos>", written="<search>Emma", eos=1),
    "a closing tag without its opener is invalid": corrected("Emma </search>"),
    "another tag's closing is invalid": corrected("<search>Emma</answer>"),
    "an empty query is invalid": corrected("<search> \n </search>"),
    "a turn of its whole token budget is invalid": corrected(
        "1234567890" * 3, written="1234567890" * 2, max_turn_tokens=20
    ),
    "matching starts afresh at each turn": Episode(
        turns=("<search>Emma</sea<eos>", "rch>, </search>", ANSWER),
        stretches=[
            world(PROMPT),
            policy("<search>Emma</sea"),
            world(CORRECTION),
            policy("rch>, </search>"),
            world(CORRECTION),
            policy(ANSWER),
        ],
        stop="answered",
        answer="Jane Austen",
        events=("invalid", "invalid", "answer"),
        eos=1,
    ),
    "a turn may end before its first token": Episode(
        turns=("<eos>", ANSWER),
        stretches=[world(PROMPT + CORRECTION), policy(ANSWER)],
        stop="answered",
        answer="Jane Austen",
        events=("invalid", "answer"),
        eos=1,
    ),
    "the last turn's search is not retrieved": Episode(
        turns=(LOOK, "<search>Jane Austen</search>"),
        stretches=[world(PROMPT), policy(LOOK), world(EMMA), policy("<search>Jane Austen</search>")],
        stop="turn_limit",
        queries=("Emma",),
        events=("search", "search"),
        limits={"max_turns": 1},
    ),
    "the last turn's invalid action is not corrected": Episode(
        turns=("Well.<eos>", "Well.<eos>"),
        stretches=[world(PROMPT), policy("Well."), world(CORRECTION), policy("Well.")],
        stop="no_action",
        events=("invalid", "invalid"),
        eos=2,
        limits={"max_turns": 1},
    ),
    "the last turn may answer": Episode(
        turns=(LOOK, ANSWER),
        stretches=[world(PROMPT), policy(LOOK), world(EMMA), policy(ANSWER)],
        stop="answered",
        answer="Jane Austen",
        queries=("Emma",),
        events=("search", "answer"),
        limits={"max_turns": 1},
    ),
    "without turns a search finds nothing": Episode(
        turns=(LOOK,),
        stretches=[world(PROMPT), policy(LOOK)],
        stop="turn_limit",
        events=("search",),
        limits={"max_turns": 0},
    ),
    "four turns are four searches and five generations": Episode(
        turns=("<search>Emma</search>",) * 9,
        stretches=[world(PROMPT), *[policy("<search>Emma</search>"), world(EMMA)] * 4, policy("<search>Emma</search>")],
        stop="turn_limit",
        queries=("Emma",) * 4,
        events=("search",) * 5,
    ),
    "a correction uses a turn up like a search": Episode(
        turns=("</answer>", "<search>Emma</search>") * 4,
        stretches=[
            world(PROMPT),
            *[policy("</answer>"), world(CORRECTION), policy("<search>Emma</search>"), world(EMMA)] * 2,
            policy("</answer>"),
        ],
        stop="no_action",
        queries=("Emma",) * 2,
        events=("invalid", "search") * 2 + ("invalid",),
    ),
}


def play(tokenizer, *turns, **settings):
    """One episode of these turns. Returns its trajectory and the queries that were asked."""
    return scripted.play_one(tokenizer, QUESTION, turns, PASSAGES.__getitem__, protocol=PROTOCOL, **settings)


@pytest.mark.parametrize("tags", ["split_tokenizer", "tagged_tokenizer"])
@pytest.mark.parametrize("claim", EPISODES)
def test_episodes_go_as_written(claim, tags, request):
    tokenizer, episode = request.getfixturevalue(tags), EPISODES[claim]
    trajectory, queries = play(tokenizer, *episode.turns, **episode.limits)
    assert scripted.stretches(trajectory, tokenizer) == episode.stretches
    assert (trajectory.stop_reason, trajectory.answer) == (episode.stop, episode.answer)
    assert tuple(turn.event for turn in trajectory.turns) == episode.events
    assert queries == episode.queries
    assert trajectory.searches == len(queries)
    assert (trajectory.eos_dropped, trajectory.passages_cut) == (episode.eos, 0)
    assert trajectory.prompt_tokens == len(tokenizer.encode(PROMPT))


def test_turns_tell_what_was_written_asked_found_and_replied(split_tokenizer):
    trajectory, _ = play(split_tokenizer, LOOK, "Hm.<eos>", ANSWER)
    look, hm, answer = (len(split_tokenizer.encode(text)) for text in (LOOK, "Hm.", ANSWER))
    found = tuple(PASSAGES["Emma"][:2])
    assert trajectory.turns == (
        types.Turn(text=LOOK, event="search", content="Emma", passages=found, reply=EMMA, tokens=look),
        types.Turn(text="Hm.", event="invalid", reply=CORRECTION, tokens=hm),
        types.Turn(text=ANSWER, event="answer", content="Jane Austen", tokens=answer),
    )
    assert trajectory.turn[trajectory.sampled].tolist() == [0] * look + [1] * hm + [2] * answer
    assert set(trajectory.turn[~trajectory.sampled]) == {-1}


def test_the_token_that_completes_a_tag_stays_whole_and_only_the_query_is_cut(split_tokenizer):
    line_break = split_tokenizer.encode(">\n")
    assert len(line_break) == 1
    trajectory, queries = play(split_tokenizer, "<search> Emma </search>\n", "<answer>b</answer>\n")
    assert queries == ("Emma",)
    assert scripted.stretches(trajectory, split_tokenizer) == [
        world(PROMPT),
        policy("<search> Emma </search>\n"),
        world(EMMA),
        policy("<answer>b</answer>\n"),
    ]
    assert trajectory.tokens[-1:].tolist() == line_break and trajectory.answer == "b"


@pytest.mark.parametrize("tags", ["split_tokenizer", "tagged_tokenizer"])
def test_sampled_ids_are_never_encoded_again(tags, request):
    tokenizer = request.getfixturevalue(tags)
    byte_ids = {piece: i for i, piece in reversed(list(enumerate(tokenizer.token_bytes())))}
    spelt = [[byte_ids[bytes([byte])] for byte in text.encode()] for text in (LOOK, ANSWER)]
    assert all(ids != tokenizer.encode(tokenizer.decode(ids)) for ids in spelt)
    trajectory, _ = play(tokenizer, *spelt)
    assert scripted.stretches(trajectory, tokenizer) == [world(PROMPT), policy(LOOK), world(EMMA), policy(ANSWER)]
    assert trajectory.tokens[trajectory.sampled].tolist() == spelt[0] + spelt[1]


def test_half_a_character_is_kept_as_it_was_sampled(byte_tokenizer):
    whole = byte_tokenizer.encode("é")
    (eos,) = byte_tokenizer.eos_ids
    trajectory, _ = play(byte_tokenizer, [whole[0], eos], byte_tokenizer.encode("<answer>a</answer>"))
    assert trajectory.turns[0].text == "\ufffd"
    assert trajectory.tokens[trajectory.sampled].tolist() == whole[:1] + byte_tokenizer.encode("<answer>a</answer>")


@pytest.mark.parametrize("tags", ["split_tokenizer", "tagged_tokenizer"])
@pytest.mark.parametrize("max_information_tokens", [500, 40])
def test_a_demonstration_is_the_episode_that_the_loop_makes_of_its_texts(tags, max_information_tokens, request):
    tokenizer = request.getfixturevalue(tags)
    found = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES["Emma"][:2]]
    segments = [
        {"turn": LOOK, "weight": 1.0},
        {"passages": found},
        {"turn": "Hm </search>", "weight": 1.0},
        {"correction": True},
        {"turn": ANSWER, "weight": 1.0},
    ]
    row = {
        "id": QUESTION.id,
        "question": QUESTION.question,
        "golden_answers": list(QUESTION.golden_answers),
        "segments": segments,
    }
    limits = dict(max_information_tokens=max_information_tokens)
    shown, _ = demonstrations.to_trajectory(
        row, tokenizer, PROTOCOL, tools=("search",), context=2048, content_weight=5.0, **limits
    )
    played, _ = play(tokenizer, LOOK, "Hm </search>", ANSWER, **limits)
    assert played.passages_cut == (max_information_tokens == 40)
    assert shown.tokens.tolist() == played.tokens.tolist()
    assert shown.sampled.tolist() == played.sampled.tolist()
    assert shown.prompt_tokens == played.prompt_tokens
    assert (shown.key, shown.stop_reason, shown.answer) == (played.key, played.stop_reason, played.answer)
