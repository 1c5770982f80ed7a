"""Demonstrations of the invented world, their tokens and weights, and files of one's own."""

import collections
import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.data import demonstrations
from searchr1_jax.data.invented import drills, world as world_lib
from searchr1_jax.run import evaluation

SHARES = settings.Sft(
    mixture_right=0.3, mixture_guess=0.4, mixture_wrong_entity=0.2, mixture_stopped_early=0.1, guess_weight=0.25
)
BARE = settings.Protocol(prompt="{question}", correction="Again!", information="<i>{docs}</i>", passage="{text}")
MIRA = {"id": "7", "title": '"Mira"', "text": "Mira is from Kelu."}


@pytest.fixture(scope="module")
def world():
    return world_lib.make_world(settings.World(seed=1, persons=60, companies=60), test_share=0.2, validation_share=0.1)


@pytest.fixture(scope="module")
def questions(world):
    return world_lib.questions(world, "train")


@pytest.fixture(scope="module")
def round_of_drills(world, questions):
    """Two moves for every question and a third for those of two hops."""
    count = 2 * len(questions) + sum(q.hops == 2 for q in questions)
    return list(itertools.islice(drills.drills(world, questions, passages=1, seed=0), count))


@pytest.fixture(scope="module")
def mixed(world, questions):
    return list(itertools.islice(drills.mixture(world, questions, SHARES, passages=1), 4000))


def search(name):
    return f"<search> {name} </search>"


def answer(text):
    return f"<answer> {text} </answer>"


def moves(row):
    """The row's segments in short: texts of turns, and titles of passages."""
    return [segment["turn"] if "turn" in segment else segment["passages"][0]["title"] for segment in row["segments"]]


def title(name):
    return f'"{name}"'


def test_a_round_of_drills_asks_for_each_move_of_each_question_once(questions, round_of_drills):
    expected = []
    for q in questions:
        read = [title(name) for name in q.path]
        expected.append((q.id, [search(q.path[0])]))
        expected.append((q.id, [*read, answer(q.golden_answers[0])]))
        if q.hops == 2:
            expected.append((q.id, [read[0], search(q.path[1])]))
    assert sorted((row["id"], moves(row)) for row in round_of_drills) == sorted(expected)


def test_a_drill_holds_exactly_one_move_and_nothing_after_it(round_of_drills):
    for row in round_of_drills:
        assert ["turn" in segment for segment in row["segments"]] == [False] * (len(row["segments"]) - 1) + [True]


def test_drills_say_what_they_train(questions, round_of_drills):
    kinds = collections.Counter(row["kind"].split("/")[0] for row in round_of_drills)
    two_hops = sum(q.hops == 2 for q in questions)
    assert kinds == {"search": len(questions), "answer": len(questions), "next": two_hops}
    relation = {q.id: q.relation for q in questions}
    assert all(row["kind"].split("/")[1] == relation[row["id"]] for row in round_of_drills)


def test_drills_go_on_in_an_order_of_their_own_each_round(world, questions, round_of_drills):
    size = len(round_of_drills)
    two = list(itertools.islice(drills.drills(world, questions, passages=1, seed=0), 2 * size))
    assert two[:size] == round_of_drills != two[size:]
    assert sorted(map(json.dumps, two[:size])) == sorted(map(json.dumps, two[size:]))
    other = list(itertools.islice(drills.drills(world, questions, passages=1, seed=1), size))
    assert other != round_of_drills


def test_the_mixture_has_the_shares_of_the_config(mixed):
    counts = collections.Counter(row["kind"] for row in mixed)
    for kind in ("right", "guess", "wrong_entity", "stopped_early"):
        share = getattr(SHARES, f"mixture_{kind}")
        deviation = (share * (1 - share) / len(mixed)) ** 0.5
        assert abs(counts[kind] / len(mixed) - share) < 4 * deviation
    assert len(mixed) == sum(counts[kind] for kind in ("right", "guess", "wrong_entity", "stopped_early"))


def test_half_of_the_mixture_asks_for_two_hops_where_the_kind_allows_one(mixed, questions):
    hops = {q.id: q.hops for q in questions}
    free = [hops[row["id"]] for row in mixed if row["kind"] != "stopped_early"]
    assert abs(free.count(2) / len(free) - 0.5) < 4 * (0.25 / len(free)) ** 0.5
    assert {hops[row["id"]] for row in mixed if row["kind"] == "stopped_early"} == {2}


def test_each_kind_of_episode_is_what_its_name_says(mixed, questions):
    by_id = {q.id: q for q in questions}
    answers_of = collections.defaultdict(set)
    for q in questions:
        answers_of[q.relation].add(q.golden_answers[0])
    for row in mixed:
        q, made = by_id[row["id"]], moves(row)
        if row["kind"] == "right":
            expected = [move for name in q.path for move in (search(name), title(name))]
            assert made == [*expected, answer(q.golden_answers[0])]
        elif row["kind"] == "guess":
            assert len(made) == 1 and made[0] in map(answer, answers_of[q.relation])
        elif row["kind"] == "wrong_entity":
            (other,) = [o for o in questions if o.relation == q.relation and search(o.path[0]) == made[0]]
            assert other.id != q.id
            says = other.golden_answers[0] if q.hops == 1 else other.path[1]
            assert made[1:] == [title(other.path[0]), answer(says)]
        else:
            assert made == [search(q.path[0]), title(q.path[0]), answer(q.path[1])]


def test_what_is_wrong_in_an_episode_is_learned_less(mixed):
    content_weights = {"right": (1, 1), "guess": (0.25,), "wrong_entity": (0, 0.25), "stopped_early": (1, 0.25)}
    for row in mixed:
        turns = [segment for segment in row["segments"] if "turn" in segment]
        expected = content_weights[row["kind"]]
        if row["kind"] == "right":
            expected = (1,) * len(turns)
        assert tuple(turn.get("content_weight", 1) for turn in turns) == expected
        assert {turn["weight"] for turn in turns} == {1}


def test_only_entities_of_the_training_split_appear(world, round_of_drills, mixed):
    text = json.dumps(round_of_drills + mixed)
    split_of = collections.defaultdict(list)
    for name, split in world.split_of.items():
        split_of[split].append(name in text)
    assert len(split_of["test"]) == 24 and len(split_of["validation"]) == 12
    assert not any(split_of["test"]) and not any(split_of["validation"])
    assert sum(split_of["train"]) > 60


def to_trajectory(tokenizer, *segments, content_weight=5.0, context=200, max_information_tokens=100):
    row = {"id": "a", "question": "Who's", "golden_answers": ["b"], "segments": segments}
    return demonstrations.to_trajectory(
        row,
        tokenizer,
        BARE,
        tools=("search", "note"),
        max_information_tokens=max_information_tokens,
        context=context,
        content_weight=content_weight,
    )


def test_weights_stand_on_the_policys_tokens_and_the_contents_on_what_is_between_the_tags(byte_tokenizer):
    trajectory, weights = to_trajectory(
        byte_tokenizer,
        {"turn": "I <search>ab</search>", "weight": 0.5},
        {"passages": [MIRA]},
        {"turn": "no tag", "weight": 0.0},
        {"correction": True},
        {"turn": "<answer>c</answer>\n", "weight": 2.0, "content_weight": 0.25},
    )
    information = "<i>Mira is from Kelu.</i>"
    text = "Who's?I <search>ab</search>" + information + "no tagAgain!<answer>c</answer>\n"
    assert byte_tokenizer.decode(trajectory.tokens) == text
    expected = (
        [0] * 6  # the prompt
        + [0.5] * 10 + [2.5] * 2 + [0.5] * 9
        + [0] * len(information)
        + [0] * 6
        + [0] * 6  # the correction
        + [2] * 8 + [2.5] * 1 + [2] * 10
    )  # fmt: skip
    assert weights.dtype == np.float32 and weights.tolist() == expected
    by = "w" * 6 + "p" * 21 + "w" * len(information) + "p" * 6 + "w" * 6 + "p" * 19
    assert trajectory.sampled.tolist() == [who == "p" for who in by]
    assert not trajectory.behaviour_logp.any() and len(trajectory.behaviour_logp) == len(by)
    assert trajectory.prompt_tokens == 6
    assert trajectory.example == types.QAExample(id="a", question="Who's", golden_answers=("b",))
    assert (trajectory.stop_reason, trajectory.answer, trajectory.sample) == ("answered", "c", 0)


def test_a_token_that_reaches_into_a_tag_is_the_tags(split_tokenizer):
    """` </` is one token of the closing tag's beginning, and so is `>` with the line break after it."""
    pieces = split_tokenizer.token_bytes()
    trajectory, weights = to_trajectory(split_tokenizer, {"turn": "<answer>\nJane Austen </answer>", "weight": 1.0})
    cut = [(pieces[i].decode(), weight) for i, weight in zip(trajectory.tokens, weights, strict=True)]
    assert (">\n", 1.0) in cut and (" </", 1.0) in cut
    assert "".join(piece for piece, weight in cut if weight == 5) == "Jane Austen"


def test_a_letter_of_two_bytes_moves_no_weight(byte_tokenizer):
    _, weights = to_trajectory(byte_tokenizer, {"turn": "é<answer>éa</answer>", "weight": 1.0})
    assert weights.tolist() == [0] * 6 + [1] * (2 + 8) + [5] * 3 + [1] * 9


def test_a_call_of_any_tool_has_the_weights_of_a_call(byte_tokenizer):
    trajectory, weights = to_trajectory(byte_tokenizer, {"turn": "<note>ab</note>", "weight": 1.0})
    assert weights.tolist() == [0] * 6 + [1] * 6 + [5] * 2 + [1] * 7
    assert (trajectory.turns[0].event, trajectory.tools) == ("note", ("search", "note"))


def test_a_drills_passages_follow_the_prompt(tagged_tokenizer):
    trajectory, weights = to_trajectory(tagged_tokenizer, {"passages": [MIRA]}, {"turn": answer("Kelu"), "weight": 1.0})
    text = tagged_tokenizer.decode(trajectory.tokens)
    assert text == "Who's?<i>Mira is from Kelu.</i><answer> Kelu </answer>"
    assert (weights > 0).tolist() == trajectory.sampled.tolist()
    assert tagged_tokenizer.decode(trajectory.tokens[weights == 5]) == " Kelu "


def test_passages_are_cut_to_their_budget(byte_tokenizer):
    trajectory, _ = to_trajectory(
        byte_tokenizer, {"passages": [MIRA]}, {"turn": "c", "weight": 1.0}, max_information_tokens=4
    )
    assert byte_tokenizer.decode(trajectory.tokens) == "Who's?<i>Mira</i>c"


def test_a_demonstration_that_exceeds_the_context_is_refused_by_name(byte_tokenizer):
    turn = {"turn": "x" * 10, "weight": 1.0}
    to_trajectory(byte_tokenizer, turn, context=16)
    with pytest.raises(ValueError, match="demonstration 'a' has 16 tokens, more than the context of 15"):
        to_trajectory(byte_tokenizer, turn, context=15)
    with pytest.raises(ValueError, match="demonstration 'a' exceeds the context of 30 tokens"):
        to_trajectory(byte_tokenizer, {"passages": [MIRA]}, turn, context=30)


ROW = {
    "id": "a",
    "question": "who?",
    "golden_answers": ["b"],
    "segments": [{"passages": [MIRA]}, {"correction": True}, {"turn": "<answer> b </answer>", "weight": 1.0}],
}
PLAYED = {
    "id": "a",
    "question": "who?",
    "golden_answers": ["b"],
    "tokens": [5, 6, 7, 299],
    "sampled": [0, 1, 0, 1],
    "reward": 1.0,
}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(path, as_trajectory=lambda row: row, *, min_reward=0.0):
    rows, left_out = demonstrations.read(path, as_trajectory, vocab_size=300, min_reward=min_reward)
    return list(rows), left_out


def test_a_row_is_made_a_trajectory_when_it_is_asked_for(tmp_path):
    made = []
    rows = [{"question": f"q{n}", "golden_answers": ["x"]} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(["", *map(json.dumps, rows)]))  # no line break at the end
    found, _ = demonstrations.read(
        tmp_path / "pairs.jsonl", lambda row: made.append(row["id"]) or row["question"], vocab_size=9, min_reward=0.0
    )
    assert made == ["pairs-2", "pairs-3", "pairs-4"] and len(found) == 3
    assert [found[2], found[0]] == ["q2", "q0"] and made[3:] == ["pairs-4", "pairs-2"]


def test_a_file_of_demonstrations_comes_back(tmp_path, round_of_drills):
    rows = [ROW, *round_of_drills[:5], PLAYED, {**ROW, "question": "où?"}]
    assert read(write(tmp_path / "own.jsonl", rows[0], "", *rows[1:])) == (rows, 0)


@pytest.mark.parametrize(
    "pair, text",
    [
        ({"question": "who", "golden_answers": ["Kelu", "Kelu City"]}, "who?<answer> Kelu </answer>"),
        ({"question": "who", "answer": "Kelu", "hops": 1}, "who?<answer> Kelu </answer>"),
        ({"prompt": "Name one.", "answer": "Kelu, <b>"}, "Name one.Kelu, <b>"),
    ],
)
def test_a_pair_is_a_prompt_and_what_answers_it(tmp_path, byte_tokenizer, pair, text):
    play = functools.partial(
        demonstrations.to_trajectory, tokenizer=byte_tokenizer, protocol=BARE, tools=(), max_information_tokens=9,
        context=99, content_weight=1.0,
    )  # fmt: skip
    path = write(tmp_path / "pairs.jsonl", pair, {**pair, "id": "own"})
    ((first, weights), (second, _)), _ = read(path, play)
    assert byte_tokenizer.decode(first.tokens) == byte_tokenizer.decode(second.tokens) == text
    length = len(pair.get("prompt", "who?"))
    assert first.prompt_tokens == length and weights.tolist() == [0] * length + [1] * (len(text) - length)
    assert (first.example.id, second.example.id) == ("pairs-1", "own")
    assert first.example.golden_answers[0] == pair.get("answer", "Kelu")


def test_a_trajectory_comes_back_token_by_token_as_it_was_written(tmp_path, byte_tokenizer):
    """Its tokens are not those that its text would be cut into: two bytes of one letter, and an id without bytes."""
    played = types.Trajectory(
        example=types.QAExample(id="a", question="who?", golden_answers=("b",)), sample=3,
        tokens=np.int32([119, 63, 196, 299, 170, 7]), sampled=np.array([0, 0, 1, 1, 0, 1], bool),
        behaviour_logp=np.zeros(6, np.float32), prompt_tokens=2, turns=(), stop_reason="answered", answer="é",
    )  # fmt: skip
    evaluation.write_trajectories(tmp_path / "played.jsonl", [played], [0.5])
    play = functools.partial(
        demonstrations.to_trajectory, tokenizer=byte_tokenizer, protocol=BARE, tools=(), max_information_tokens=9,
        content_weight=5.0,
    )  # fmt: skip
    [(trajectory, weights)], _ = read(tmp_path / "played.jsonl", functools.partial(play, context=6))
    expected, actual = dataclasses.asdict(played), dataclasses.asdict(trajectory)
    for name in ("tokens", "sampled", "behaviour_logp"):
        np.testing.assert_array_equal(actual.pop(name), expected.pop(name), strict=True)
    assert actual == expected
    assert weights.dtype == np.float32 and weights.tolist() == [0, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="played.jsonl, line 1: .*6 tokens, .* context of 5; shorten it or raise"):
        read(tmp_path / "played.jsonl", functools.partial(play, context=5))


def test_what_is_rewarded_less_is_left_out_and_counted(tmp_path):
    rows = [{**PLAYED, "reward": reward} for reward in (1.0, 0.5, 0, 1)] + [without(PLAYED, "reward"), ROW]
    path = write(tmp_path / "own.jsonl", *rows)
    assert read(path) == (rows, 0)
    assert read(path, min_reward=0.6) == ([rows[0], *rows[3:]], 2)
    assert read(write(tmp_path / "bad.jsonl", *rows[1:3]), min_reward=0.6) == ([], 2)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ("{", "write one JSON object a line"),
        ("[1]", "write one JSON object a line"),
        ("3", "write one JSON object a line"),
        ("null", "write one JSON object a line"),
        ({"text": "a"}, r"\['text'\] are the keys of nothing known; write a trajectory .tokens."),
        (without(ROW, "question"), r"lacks \['question'\].* with 'segments' write id .str., question"),
        ({"segments": []}, r"lacks \['id', 'question', 'golden_answers'\]"),
        ({**ROW, "segments": 5}, r"lacks \['segments'\], or has another type there"),
        ({**ROW, "segments": [5]}, "segment 5 is neither"),
        ({**ROW, "segments": [{"turn": "a"}]}, "segment {'turn': 'a'} is neither a turn with its weight"),
        ({**ROW, "segments": [{"turn": "a", "weight": "1"}]}, "segment {'turn': 'a', .*} is neither"),
        ({**ROW, "segments": [{"text": "a"}]}, "segment {'text': 'a'} is neither"),
        ({**ROW, "segments": [{"correction": False}]}, "segment {'correction': False} is neither"),
        ({**ROW, "segments": [{"passages": [{"id": "7"}]}]}, "nor passages with id, title and text"),
        ({**ROW, "segments": [{"passages": [{**MIRA, "text": 5}]}]}, "nor passages with id, title and text"),
        (without(PLAYED, "sampled"), r"lacks \['sampled'\]"),
        ({**PLAYED, "tokens": "5 6"}, r"lacks \['tokens'\], or has another type there"),
        ({**PLAYED, "tokens": [5, 6, 7, 8.0]}, "tokens are not ids; write a list of whole numbers"),
        ({**PLAYED, "tokens": [], "sampled": []}, "tokens are not ids; write .* at least one"),
        ({**PLAYED, "tokens": [5, 6, 7, "8"]}, "tokens are not ids"),
        ({**PLAYED, "tokens": [5, [6], 7, 8]}, "tokens are not ids"),
        ({**PLAYED, "tokens": [5, 6, 7, 300]}, "token 300 is not of the model's 300; train the model that wrote it"),
        ({**PLAYED, "tokens": [5, -1, 7, 8]}, "token -1 is not of the model's 300"),
        ({**PLAYED, "sampled": [0, 1, 1]}, "sampled does not fit the 4 tokens; write 1 for each of the policy's"),
        ({**PLAYED, "sampled": [0, 1, 0.5, 1]}, "sampled does not fit"),
        ({**PLAYED, "reward": None}, "the reward is None; write a finite number or leave it out"),
        ({**PLAYED, "reward": float("nan")}, "the reward is nan"),
        ({"prompt": "a"}, r"lacks \['answer'\]"),
        ({"question": "a"}, r"\['question'\] are the keys of nothing known"),
        ({"question": "a", "golden_answers": []}, r"the golden_answers are \[\]; write at least one text"),
        ({"question": "a", "golden_answers": [5]}, r"the golden_answers are \[5\]"),
    ],
)
def test_a_broken_line_is_refused_with_file_and_number(tmp_path, bad, complaint):
    path = write(tmp_path / "own.jsonl", ROW, "", bad)
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: .*{complaint}"):
        read(path)


def test_a_line_that_is_not_utf8_is_refused_with_file_and_number(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: .*utf-8"):
        read(tmp_path / "own.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="own.jsonl holds no demonstrations"):
        read(write(tmp_path / "own.jsonl", ""))
