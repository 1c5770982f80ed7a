"""The examples of a tool, a reward of turns, an advantage, a policy loss and a retriever in one run: the quickstart's
world in small, and what the run leaves behind compared with what its settings say."""

import json
import shutil
import types

import jax
import meshes
import miniature
import numpy as np
import pytest

from examples import command, retriever as example, turn_reward
from searchr1_jax import prepare, train
from searchr1_jax.run import retrievers, tools
from searchr1_jax.text import rewards

REWARD = "examples.turn_reward:found_then_answered"
CONFIG = {
    "tools": ("search", "calculate", "examples.notebook_tool:Notebook"),
    "retriever.index": "examples.retriever:ByTitle", "retriever.cache": "record",
    "reward.name": REWARD,
    "algorithm.advantage": "examples.advantage:batch_standardised",
    "algorithm.policy_loss": "examples.policy_loss:cispo", "algorithm.clip_high": 4.0,
    "learner.updates_per_rollout": 1, "learner.steps": 2, "checkpoint.every": 1, "evaluation.every": 0,
    "evaluation.first": False, "rollout.questions": 16, "rollout.samples": 4, "world.layers": 1,
    "world.vocab_size": 700,  # every name is a token
}  # fmt: skip
LEANING = {" Keva": 8.0, " Laru": 8.0, "<search>": 8.0, "</search>": 7.0}
LEANING |= {"<calculate>": 7.5, "</calculate>": 6.8, "<note>": 7.5, "</note>": 6.8}
SETTINGS = miniature.settings(**CONFIG)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that was never interrupted: one question, and a policy that often names who it is about."""
    workdir = tmp_path_factory.mktemp("run")
    with jax.set_mesh(meshes.make()):
        prepare.run(SETTINGS, workdir)
        asked = next(line for line in (workdir / "train.jsonl").read_text().splitlines() if "Keva Laru from" in line)
        (workdir / "few.jsonl").write_text(asked + "\n")
        miniature.babbler(workdir / "init", workdir / "base", tools.names(SETTINGS), LEANING)
        train.run(SETTINGS, workdir)
    return workdir


def episodes(workdir, step):
    return miniature.trajectories(workdir, f"step{step:06d}.jsonl")


def test_the_policy_calls_all_tools_and_each_call_is_counted(run):
    rows = miniature.rows(run)
    assert len(rows) == 2 and all(rows[1][f"calls/{tool}"] > 0 for tool in ("search", "calculate", "note"))
    turns = [turn for episode in episodes(run, 2) for turn in episode["turns"]]
    notes = [turn for turn in turns if turn["event"] == "note" and turn["reply"]]
    assert len(notes) == rows[1]["calls/note"] * len(episodes(run, 2))
    assert all("<information> 1. " in turn["reply"] for turn in notes)
    valid = [turn["event"] in ("search", "calculate", "note", "answer") for turn in turns]
    assert rows[1]["valid_actions"] == pytest.approx(sum(valid) / len(valid))


def test_a_command_of_ones_own_counts_the_turns_that_the_metrics_count(run):
    counts, row = command.run(run), miniature.rows(run)[1]
    valid = sum(counts.get(event, 0) for event in ("search", "calculate", "note", "answer"))
    assert valid / sum(counts.values()) == pytest.approx(row["valid_actions"])
    assert sum(counts.values()) == pytest.approx(row["turns"] * len(episodes(run, 2)))


def test_each_tag_is_a_token_and_exports_stop_at_the_tools_tags(run):
    generation = json.loads((run / "base" / "generation_config.json").read_text())
    assert generation["stop_strings"] == ["</search>", "</calculate>", "</note>", "</answer>"]
    added = json.loads((run / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    assert {"<calculate>", "</calculate>", "<note>", "</note>"} < {token["content"] for token in added}


def test_each_turn_has_its_own_reward_in_the_trajectories_and_their_sum_in_the_metrics(run):
    found = 0
    for step, row in enumerate(miniature.rows(run), start=1):
        sums = []
        for episode in episodes(run, step):
            shows = [t["event"] == "search" and "Mozuv" in t["reply"] for t in episode["turns"]]
            expected = [0.0] * len(shows)
            if any(shows):
                expected[shows.index(True)] = turn_reward.FOUND
            expected[-1] += rewards.exact_match(episode["answer"], ["Mozuv"])
            assert episode["golden_answers"] == ["Mozuv"] and episode["turn_rewards"] == expected
            sums.append(sum(expected))
            found += any(shows)
        assert row["reward"] == row[f"reward/{REWARD}"] == pytest.approx(np.mean(sums))
    assert found


def test_the_loss_is_that_of_the_own_policy_loss_with_the_own_advantages(run):
    """Worked out from the trajectories: in a rollout's only update π is π_old, the loss of a token −A log π."""
    for step, row in enumerate(miniature.rows(run), start=1):
        written = episodes(run, step)
        reward_QG = np.array([episode["reward"] for episode in written]).reshape(-1, SETTINGS.rollout.samples)
        difference_QG = reward_QG - reward_QG.mean(axis=1, keepdims=True)
        advantage_N = (difference_QG / (difference_QG.std() + 1e-6)).reshape(-1)
        losses = [-a * sum(episode["behaviour_logp"]) for a, episode in zip(advantage_N, written, strict=True)]
        tokens = sum(sum(episode["sampled"]) for episode in written)
        assert row["policy/loss"] == pytest.approx(sum(losses) / tokens, rel=1e-3, abs=1e-6)
        assert row["policy_tokens"] == tokens
    assert any(row["policy/loss"] for row in miniature.rows(run))


def test_the_answers_of_the_own_retriever_were_recorded_and_are_replayed_without_it(run, monkeypatch):
    turns = [turn for step in (1, 2) for episode in episodes(run, step) for turn in episode["turns"]]
    queries = [turn["content"] for turn in turns if turn["event"] == "search" and turn["reply"]]
    expected = example.ByTitle(SETTINGS, run).search(queries, SETTINGS.rollout.passages)
    assert any(passages and passages[0].title == '"Keva Laru"' for passages in expected)
    monkeypatch.setattr(example, "ByTitle", types.SimpleNamespace(identity=example.ByTitle.identity))  # not made again
    replaying = retrievers.make(SETTINGS.replace({"retriever.cache": "replay"}), run)
    assert replaying.search(queries, SETTINGS.rollout.passages) == expected


def test_a_run_with_a_stateful_tool_that_was_killed_goes_on_as_if_it_had_not_been(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    assert miniature.saved_steps(workdir) == [1, 2]
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.rmtree(workdir / "trajectories")
    with jax.set_mesh(meshes.make()):
        train.run(SETTINGS, workdir)
    assert miniature.rows(workdir) == miniature.rows(run)
    assert episodes(workdir, 2) == episodes(run, 2)
