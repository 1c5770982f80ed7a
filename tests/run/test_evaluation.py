"""Figures of an evaluation, added up by hand, and trajectories as JSON."""

import dataclasses
import json
import random

import numpy as np
import pytest

from searchr1_jax.core import types
from searchr1_jax.rollout import environment, episodes, sampling
from searchr1_jax.run import evaluation


def search(query, reply="<i></i>"):
    return types.Turn(text=f"<search>{query}</search>", event="search", content=query, reply=reply)


def trajectory(name, answer, golden, *, hops, turns=(), stop="answered", prompt=2, length=5):
    sampled = np.arange(length) >= prompt
    return types.Trajectory(
        example=types.QAExample(id=name, question=f"{name}?", golden_answers=golden, hops=hops),
        sample=0,
        tokens=np.arange(length, dtype=np.int32) + 10,
        sampled=sampled,
        behaviour_logp=np.where(sampled, np.float32(-0.123456789), np.float32(0)),
        prompt_tokens=prompt,
        turns=turns,
        stop_reason=stop,
        answer=answer,
        tools=("search",),
    )


def _summarise(trajectories, **names):
    return evaluation.summarise({t.key: evaluation.score(t) for t in trajectories}, **names)


def test_rewards_of_turns_are_written_with_their_sum(tmp_path):
    of_turns = trajectory("a", "x", ("x",), hops=1, turns=(search("x"), search("y")))
    evaluation.write_trajectories(tmp_path / "two.jsonl", [of_turns, of_turns], [(0.5, 1.0), 0.25])
    first, second = map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines())
    assert (first["reward"], first["turn_rewards"]) == (1.5, [0.5, 1.0])
    assert second["reward"] == 0.25 and "turn_rewards" not in second


FOUR = (
    trajectory("a", "The Beatles", ("Beatles",), hops=1, turns=(search("x"),)),
    trajectory("b", "Joe Biden", ("Joe", "President"), hops=2, turns=(search("x"), search("y")), length=9),
    trajectory("c", None, ("Rome",), hops=2, turns=(search("x"), search("y", reply="")), stop="turn_limit", prompt=4),
    trajectory("d", "rome", ("Rome",), hops=2, length=12),
)


def test_figures_are_means_over_the_questions():
    assert _summarise(FOUR, split="test", decoding="greedy") == evaluation.Results(
        split="test",
        decoding="greedy",
        n=4,
        em=0.5,  # a and d
        em_over_sets=0.5,
        f1=(1 + 2 / 3 + 0 + 1) / 4,  # b: one of two words, the one golden word: 2 · ½ · 1 / 1½
        searches=(1 + 2 + 1 + 0) / 4,  # c's second search was not answered
        calls={"search": 1.0},
        response_tokens=(3 + 7 + 1 + 10) / 4,
        em_by_hops={"1": 1.0, "2": 1 / 3},
        em_by_source={"": 0.5},
        stop_reasons={"answered": 3, "turn_limit": 1},
    )


def test_figures_do_not_depend_on_the_order_of_arrival():
    """Sums of 2/4, 2/5, … 2/21 come out different in their last bits in another order."""
    many = [*FOUR, *(trajectory(f"q{n}", "x " * n + "b", ("b",), hops=n % 3) for n in range(2, 20))]
    results = _summarise(many, split="test", decoding="greedy")
    for seed in range(5):
        shuffled = _summarise(random.Random(seed).sample(many, len(many)), split="test", decoding="greedy")
        assert shuffled == results
        assert list(shuffled.em_by_hops) == ["0", "1", "2"]
        assert list(shuffled.stop_reasons) == ["answered", "turn_limit"]


def test_results_are_written_as_json_and_given_to_the_metrics(tmp_path):
    results = _summarise(FOUR, split="test", decoding="greedy")
    results.save(tmp_path / "results" / "test.json")
    written = json.loads((tmp_path / "results" / "test.json").read_text())
    assert evaluation.Results(**written) == results
    assert results.scalars() == {"em": 0.5, "f1": pytest.approx(2 / 3), "searches": 1.0, "response_tokens": 5.25}


class Rollout:
    """Finishes the tasks in another order than they came in."""

    counts = episodes.Counts()

    def __init__(self):
        self.asked = None

    def run(self, tasks, decoding, *, seed, step):
        self.asked = tasks, decoding, seed
        by_id = {t.example.id: t for t in FOUR}
        yield from (by_id[task.example.id] for task in tasks[::-1])


def _evaluate(rollout, tasks, path, **about):
    greedy = sampling.Decoding(temperature=0.0)
    return evaluation.evaluate(rollout, tasks, greedy, split="test", name="greedy", seed=5, path=path, about=about)


TASKS = [episodes.Task(example=t.example, prompt=(1,), samples=1) for t in FOUR]


def test_an_evaluation_answers_every_task_and_writes_the_episodes_sorted(tmp_path):
    rollout = Rollout()
    results = _evaluate(rollout, TASKS, tmp_path / "final.jsonl")
    assert results == _summarise(FOUR, split="test", decoding="greedy")
    rows = list(map(json.loads, (tmp_path / "final.jsonl").read_text().splitlines()))
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"] and [row["reward"] for row in rows] == [1, 0, 0, 1]
    assert rollout.asked == (TASKS, sampling.Decoding(temperature=0.0), 5)
    assert [path.name for path in tmp_path.iterdir()] == ["final.jsonl"]


class RolloutThatLosesItsRetriever(Rollout):
    def run(self, tasks, decoding, *, seed, step):
        yield FOUR[1]
        raise environment.ToolError("search", "on 'who': status 500")


def test_an_evaluation_that_loses_its_retriever_goes_on_after_what_was_finished(tmp_path, capsys):
    with pytest.raises(environment.ToolError, match="the tool 'search' failed on 'who': status 500"):
        _evaluate(RolloutThatLosesItsRetriever(), TASKS, tmp_path / "final.jsonl", step=3)
    assert "1 episodes are finished and kept; start again with the same command" in capsys.readouterr().out
    rollout = Rollout()
    assert _evaluate(rollout, TASKS, tmp_path / "final.jsonl", step=3) == _summarise(
        FOUR, split="test", decoding="greedy"
    )
    assert [task.example.id for task in rollout.asked[0]] == ["a", "c", "d"]
    assert "going on after 1 episodes that were kept" in capsys.readouterr().out
    with pytest.raises(environment.ToolError):
        _evaluate(RolloutThatLosesItsRetriever(), TASKS, tmp_path / "final.jsonl", step=3)
    _evaluate(rollout, TASKS, tmp_path / "final.jsonl", step=4)  # another policy
    assert len(rollout.asked[0]) == 4


def test_what_was_kept_of_other_questions_is_not_counted(tmp_path):
    changed = dataclasses.replace(TASKS[1], example=dataclasses.replace(FOUR[1].example, golden_answers=("other",)))
    for asked in (TASKS[1:3], [TASKS[0], changed, *TASKS[2:]]):  # fewer, and other golden answers
        with pytest.raises(environment.ToolError):
            _evaluate(RolloutThatLosesItsRetriever(), TASKS, tmp_path / "final.jsonl")
        rollout = Rollout()
        assert _evaluate(rollout, asked, tmp_path / "final.jsonl").n == len(asked)
        assert rollout.asked[0] == list(asked)


def test_the_samples_that_are_left_of_a_question_are_tasks_of_neighbours():
    task = episodes.Task(example=FOUR[0].example, prompt=(1,), samples=6, first_sample=2)
    left = list(evaluation._left(task, {("a", 2): None, ("a", 5): None}))
    assert [(each.first_sample, each.samples) for each in left] == [(3, 2), (6, 2)]


def test_a_trajectory_is_one_line_of_json_with_texts_ids_and_mask(tmp_path):
    evaluation.write_trajectories(tmp_path / "log" / "step.jsonl", FOUR[:2], [1.0, 0.25])
    first, second = map(json.loads, (tmp_path / "log" / "step.jsonl").read_text().splitlines())
    assert first == {
        "id": "a",
        "sample": 0,
        "question": "a?",
        "golden_answers": ["Beatles"],
        "answer": "The Beatles",
        "reward": 1.0,
        "stop_reason": "answered",
        "turns": [{"text": "<search>x</search>", "event": "search", "content": "x", "reply": "<i></i>"}],
        "tokens": [10, 11, 12, 13, 14],
        "sampled": [0, 0, 1, 1, 1],
        "behaviour_logp": [0.0, 0.0, -0.123457, -0.123457, -0.123457],
    }
    assert (second["id"], second["reward"], second["answer"]) == ("b", 0.25, "Joe Biden")


def test_as_many_rewards_as_trajectories_are_written(tmp_path):
    with pytest.raises(ValueError):
        evaluation.write_trajectories(tmp_path / "step.jsonl", FOUR, [1.0])


def test_exact_match_is_told_apart_by_question_file():
    answers = {"nq/1": "x", "nq/2": "y", "b/7": "x"}
    found = [trajectory(name, answer, ("x",), hops=0) for name, answer in answers.items()]
    results = _summarise(found, split="test", decoding="greedy")
    assert results.em_by_source == {"b": 1.0, "nq": 0.5}
    assert (results.em, results.em_over_sets) == (2 / 3, 0.75)
    assert results.headline() == "exact match 0.750 over 2 sets (b 1.000  nq 0.500), 0.667 over questions"
    assert results.scalars()["em_over_sets"] == 0.75
