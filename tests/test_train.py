"""A run that is disturbed ends as one that was not, and what can be done with it; in this process, on one device."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
import threading
import types as python_types
from typing import NamedTuple
from unittest import mock

import bits
import jax
import meshes
import miniature
import numpy as np
import pytest

from searchr1_jax import ask, evaluate, export, train
from searchr1_jax.core import cluster
from searchr1_jax.learning import guards, minibatches, step as learning
from searchr1_jax.rollout import environment
from searchr1_jax.run import curves, parts as run_parts, run_directory

# The rollout's runs of an undisturbed miniature, in their order.
EVALUATION_0, STEP_1, STEP_2, EVALUATION_2, STEP_3, STEP_4, EVALUATION_4, END = range(8)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with jax.set_mesh(meshes.make()), mock.patch.object(curves, "learning_curve"):
        yield miniature.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def workdir(parts, tmp_path):
    """A copy of the world and the base."""
    return shutil.copytree(parts.workdir, tmp_path / "run")


class Undisturbed(NamedTuple):
    workdir: pathlib.Path  # not to be written to
    asked: list[int]  # queries before each run of the rollout, and in all


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = shutil.copytree(parts.workdir, tmp_path_factory.mktemp("undisturbed") / "run")
    assert parts.train(workdir, **{"checkpoint.every": 0})
    asked = [*parts.rollout.asked_before, parts.retriever.asked]
    assert len(asked) == END + 1 and min(np.diff(asked)) > 1  # each run of the rollout searches
    return Undisturbed(workdir, asked)


def _assert_same_run(workdir, undisturbed):
    assert miniature.rows(workdir) == miniature.rows(undisturbed.workdir)
    bits.assert_equal(miniature.last_checkpoint(workdir), miniature.last_checkpoint(undisturbed.workdir))


# A retriever that dies.


def _loses_its_retriever(parts, workdir, dies_at):
    with pytest.raises(environment.ToolError, match="failed after 4 attempts: status 500"):
        parts.train(workdir, dies_at=dies_at)


def test_the_undisturbed_run_learned_and_saved_at_its_end_only(parts, undisturbed):
    rows = miniature.rows(undisturbed.workdir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/sampled/em" in row] == [0, 2, 4]
    assert rows[-1]["kl_to_reference"] > 0 and sum(row["searches"] for row in rows[1:]) > 0
    assert miniature.saved_steps(undisturbed.workdir) == [4]  # where checkpoint.every is 0


def test_a_rollout_that_loses_its_retriever_keeps_the_steps_before_and_its_own_finished_trajectories(
    parts, undisturbed, workdir, capsys
):
    _loses_its_retriever(parts, workdir, dies_at=undisturbed.asked[STEP_4 + 1])
    assert miniature.saved_steps(workdir) == [3]  # where checkpoint.every is 100
    assert miniature.rows(workdir) == miniature.rows(undisturbed.workdir)[:4]
    kept, whole = (
        miniature.trajectories(*place)
        for place in ((workdir, "interrupted-step000004.jsonl"), (undisturbed.workdir, "step000004.jsonl"))
    )
    assert 0 < len(kept) < len(whole) and all(row in whole for row in kept)
    out = capsys.readouterr().out
    assert f"{len(kept)} episodes that were finished are in" in out and "saved step 3; start again" in out
    assert parts.train(workdir)
    assert "resuming after step 3 of 4" in capsys.readouterr().out
    _assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize("run, saved, rows", [(EVALUATION_0, [], 0), (EVALUATION_2, [2], 2), (EVALUATION_4, [4], 4)])
def test_an_evaluation_that_loses_its_retriever_is_made_up_for(parts, undisturbed, workdir, run, saved, rows):
    _loses_its_retriever(parts, workdir, dies_at=undisturbed.asked[run] + 2)
    assert miniature.saved_steps(workdir) == saved
    assert miniature.rows(workdir) == miniature.rows(undisturbed.workdir)[:rows]
    assert not list((workdir / "trajectories").glob("interrupted-*"))
    for _ in range(2):  # the second time there is nothing left to do
        assert parts.train(workdir)
        _assert_same_run(workdir, undisturbed)


def test_a_retriever_that_dies_again_right_after_the_owed_evaluation_does_no_harm(parts, undisturbed, workdir):
    asked = undisturbed.asked
    _loses_its_retriever(parts, workdir, dies_at=asked[EVALUATION_2] + 1)
    _loses_its_retriever(parts, workdir, dies_at=asked[STEP_3] - asked[EVALUATION_2] + 1)
    assert miniature.saved_steps(workdir) == [2] and miniature.rows(workdir) == miniature.rows(undisturbed.workdir)[:3]
    assert parts.train(workdir)
    _assert_same_run(workdir, undisturbed)


def test_an_error_right_after_a_save_leaves_that_checkpoint_complete(parts, undisturbed, workdir, monkeypatch):
    saved, may_finish = workdir / "checkpoints" / "1", threading.Event()
    learn, rename = learning.learn, os.rename

    def slow_rename(source, target, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            may_finish.wait(timeout=10)
        return rename(source, target, **kwargs)

    def learn_once(*args, **kwargs):
        if args[5] == 0:  # the first step
            return learn(*args, **kwargs)
        assert not saved.exists()  # it is in flight
        threading.Timer(0.2, may_finish.set).start()
        raise FloatingPointError("policy/loss is nan at step 2")

    with monkeypatch.context() as patches, pytest.raises(FloatingPointError, match="nan at step 2"):
        patches.setattr(os, "rename", slow_rename)
        patches.setattr(learning, "learn", learn_once)
        parts.train(workdir, **{"checkpoint.every": 1})
    assert saved.exists() and miniature.saved_steps(workdir) == [1]
    assert parts.train(workdir)
    _assert_same_run(workdir, undisturbed)


# A machine that is taken away.


@pytest.fixture
def watch(monkeypatch):
    """What this process knows of being asked to stop."""
    monkeypatch.setattr(cluster, "_watch", watch := cluster._Watch())
    return watch


def _told_to_end(monkeypatch, where, name, number):
    """Before the call of this number, SIGTERM comes."""
    asked, call = itertools.count(1), getattr(where, name)

    def told(*args, **kwargs):
        if next(asked) == number:
            cluster.ask_to_stop(cluster.URGENT)
        return call(*args, **kwargs)

    monkeypatch.setattr(where, name, told)


def test_a_rollout_that_must_end_now_is_dropped_and_what_was_learned_is_saved(
    parts, undisturbed, workdir, monkeypatch, watch
):
    with monkeypatch.context() as patches:
        _told_to_end(patches, train, "act", 3)
        assert not parts.train(workdir)
    assert miniature.saved_steps(workdir) == [2]
    assert miniature.rows(workdir) == miniature.rows(undisturbed.workdir)[:3]
    assert not list((workdir / "trajectories").glob("interrupted-*"))
    watch.status = 0
    assert parts.train(workdir)
    _assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize(
    "where, name, number, every, rows",
    [
        (train, "evaluate", 2, 100, 2),  # that of step 2 is owed
        (minibatches, "make", 3, 1, 3),  # a step of learning is left unsaved
    ],
)
def test_what_must_end_now_is_done_again(
    parts, undisturbed, workdir, monkeypatch, watch, where, name, number, every, rows
):
    with monkeypatch.context() as patches:
        _told_to_end(patches, where, name, number)
        assert not parts.train(workdir, **{"checkpoint.every": every})
    assert miniature.saved_steps(workdir)[-1] == 2 and len(miniature.rows(workdir)) == rows
    watch.status = 0
    assert parts.train(workdir)
    _assert_same_run(workdir, undisturbed)


def test_while_it_learns_the_actor_holds_nothing(parts, workdir, monkeypatch):
    held, learn, engine = [], learning.learn, parts.experiment.actor.engine
    noted = lambda *args, **kwargs: held.append((engine._params, engine._state)) or learn(*args, **kwargs)
    monkeypatch.setattr(learning, "learn", noted)
    assert not parts.train(workdir, stop_at=1)
    assert held == [(None, None)]


def test_checkpoints_come_by_time_too(parts, undisturbed, workdir):
    assert not parts.train(workdir, stop_at=3, **{"checkpoint.minutes": 1e-9})
    assert miniature.saved_steps(workdir) == [2, 3]
    assert parts.train(workdir)
    _assert_same_run(workdir, undisturbed)


def test_samples_of_a_question_asked_twice_in_a_step_differ(undisturbed):
    for step in (1, 2, 3, 4):  # of four questions each, out of three
        rows = miniature.trajectories(undisturbed.workdir, f"step{step:06d}.jsonl")
        keys = [(row["id"], row["sample"]) for row in rows]
        assert len(keys) == len(set(keys)) == 8 and max(sample for _, sample in keys) >= 3
        texts = {(row["id"], tuple(row["tokens"])) for row in rows}
        assert len(texts) == 8


# A run that runs away.


@pytest.fixture
def alarm(monkeypatch):
    """alarm(*numbers) lets these steps exceed a limit, counted in the order in which they are judged."""

    def set_off(*numbers: int):
        asked = itertools.count(1)
        told = ["kl_to_reference of 9 is above guard.kl of 1"]
        monkeypatch.setattr(guards, "exceeded", lambda *_: told * (next(asked) in numbers))

    return set_off


def test_a_run_that_exceeds_a_limit_is_warned_of_and_goes_on(alarm, parts, undisturbed, workdir, capsys):
    alarm(2, 3)
    assert parts.train(workdir)
    out = capsys.readouterr().out
    assert "warning: step 2: kl_to_reference of 9 is above guard.kl of 1" in out and "warning: step 3" in out
    _assert_same_run(workdir, undisturbed)


def test_on_request_it_goes_back_to_its_last_checkpoint_with_half_the_learning_rate(
    alarm, parts, undisturbed, workdir, capsys
):
    """Steps 1, 2, 3, at half the rate 3 and 4, at a quarter of it 3 and 4; the third and the fifth are too much."""
    settings = {"guard.rollbacks": 2, "guard.kl": 1e9, "checkpoint.every": 2}
    alarm(3, 5)
    assert parts.train(workdir, **settings)
    out = capsys.readouterr().out
    assert out.count("going back to step 2") == 2 and "learning rates times 0.25" in out
    rows, before = miniature.rows(workdir), miniature.rows(undisturbed.workdir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == before[:3]
    rates = [[row["policy/learning_rate"] for row in run[1:]] for run in (rows, before)]
    np.testing.assert_allclose(rates[0], np.array(rates[1]) * [1, 1, 0.25, 0.25], rtol=1e-6)
    assert rows[3]["reward"] == before[3]["reward"]  # the same questions, by the same policy


def test_a_run_killed_after_it_went_back_goes_on_at_the_lower_rate(alarm, parts, workdir, tmp_path):
    settings = {"guard.rollbacks": 1, "guard.kl": 1e9, "checkpoint.every": 1, "evaluation.every": 0}
    whole = shutil.copytree(workdir, tmp_path / "whole")
    alarm(2)
    assert parts.train(whole, **settings)
    alarm(2)
    assert not parts.train(workdir, stop_at=3, **settings)
    alarm()
    assert parts.train(workdir, **settings)
    assert miniature.rows(workdir) == miniature.rows(whole)


@pytest.mark.parametrize(
    "settings, cause", [({}, "the run went back before"), ({"checkpoint.every": 0}, "there is no checkpoint yet")]
)
def test_it_stops_where_it_cannot_go_back(alarm, parts, workdir, settings, cause):
    settings = {"guard.rollbacks": 1, "guard.kl": 1e9, "checkpoint.every": 1} | settings
    with pytest.raises(FloatingPointError, match=f"guard.kl of 1, and {cause} .guard.rollbacks is 1.; lower the"):
        alarm(2, 3)
        parts.train(workdir, **settings)


# Settings that change.


def test_a_run_goes_on_with_other_settings_only_where_that_is_accepted_and_then_says_from_which_step(
    parts, workdir, tmp_path, capsys
):
    assert not parts.train(workdir, stop_at=2)
    before = miniature.files(workdir)
    changes = {"learner.micro_batch_rows": 8, "guard.kl": 0.5, "algorithm.kl_coefficient": 0.01}
    with pytest.raises(ValueError, match=r"kl_coefficient: 0.001 there, 0.01 now; guard.kl.* --accept_changes"):
        parts.train(workdir, **changes)
    assert miniature.files(workdir) == before
    assert parts.train(workdir, accept_changes=True, **changes)
    assert "note: from here on, learner.micro_batch_rows: 4 there, 8 now" in capsys.readouterr().out
    recorded = list(map(json.loads, (workdir / "changes.jsonl").read_text().splitlines()))
    assert {row["key"]: (row["step"], row["before"], row["now"]) for row in recorded} == {
        "algorithm.kl_coefficient": (2, 0.001, 0.01),
        "guard.kl": (2, 0.0, 0.5),
        "learner.micro_batch_rows": (2, 4, 8),
    }
    assert [row["kl_coefficient"] for row in miniature.rows(workdir)[1:]] == [0.001, 0.001, 0.01, 0.01]
    assert parts.train(workdir, **changes)  # which are its own by now


# What is done with a run.


@pytest.fixture
def acting(parts):
    """The actor of the miniature in place of one that would have to be compiled."""
    with mock.patch.object(run_parts, "actor", lambda *_: parts.experiment.actor) as actor:
        yield actor


# Question files.


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("test.jsonl", "test.jsonl"),
        ("test.jsonl", "a/test.jsonl"),
        ("nq=a.jsonl", "nq=b.jsonl"),
        ("a=b.json", "a.x"),
    ],
    ids=str,
)
def test_question_files_are_named_and_each_once(parts, names):
    with pytest.raises(ValueError) as refusal:
        run_parts.questions(miniature.settings(**{"data.test": names}), "test", parts.workdir)
    assert str(refusal.value).startswith(f"data.test is {names}; give at least one file")


def test_an_evaluation_keeps_files_apart_and_tells_how_acting_differs_from_training(
    acting, undisturbed, tmp_path, capsys
):
    workdir = shutil.copytree(undisturbed.workdir, tmp_path / "run")
    for folder in ("nq", "hotpot"):
        (workdir / folder).mkdir()
        shutil.copy(workdir / "test.jsonl", workdir / folder)
    changes = {"rollout.max_turns": 1, "retriever.dimensions": 16, "learner.steps": 9, "evaluation.every": 1}
    files = {"data.test": ("nq=nq/test.jsonl", "hotpot=hotpot/test.jsonl")}
    evaluate.run(miniature.settings(**changes | files), workdir)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [
        "note: not as in training: retriever.dimensions: 32 there, 16 now",
        "note: not as in training: rollout.max_turns: 3 there, 1 now",
    ]
    evaluate.run(miniature.settings(), workdir, name="same", questions=2)
    assert "note" not in capsys.readouterr().out
    results = json.loads((workdir / "eval" / "final-greedy.json").read_text())
    rows = list(map(json.loads, (workdir / "eval" / "final-greedy.jsonl").read_text().splitlines()))
    own = [json.loads(line)["id"] for line in (workdir / "test.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {f"{folder}/{i}" for folder in ("nq", "hotpot") for i in own}
    assert len(rows) == results["n"] == 2 * len(own)
    assert list(results["em_by_source"]) == ["hotpot", "nq"]


# Export.


@pytest.fixture
def trained(undisturbed, tmp_path):
    """A copy of the undisturbed run."""
    return shutil.copytree(undisturbed.workdir, tmp_path / "runs" / "run")


@pytest.mark.parametrize("output", [".", "..", "../..", "eval/..", "config.json"])
def test_an_export_does_not_replace_the_run_or_a_file(trained, output):
    before = miniature.files(trained)
    with pytest.raises(ValueError, match="is a file or holds the run itself; name a directory of its own"):
        export.run(run_directory.settings_of(trained), trained, trained / output, overwrite=True)
    assert miniature.files(trained) == before


# Asking.


def test_a_question_that_cannot_be_answered_does_not_end_the_session(parts, undisturbed, capsys, monkeypatch):
    failing = [environment.ToolError("search", "on 'Mira Talon': status 500")]

    def run(*args, **kwargs):
        if failing:
            raise failing.pop()
        return parts.rollout.run(*args, **kwargs)

    too_long = "who founded " * 40
    actor = parts.experiment.actor._replace(rollout=python_types.SimpleNamespace(run=run))
    monkeypatch.setattr(run_parts, "actor", lambda *_: actor)
    asked = [too_long, "who is lost", "who founded it"]
    found = ask.run(miniature.settings(), undisturbed.workdir, asked, strict=False)
    assert [trajectory.example.question for trajectory in found] == asked[2:]
    out = " ".join(capsys.readouterr().out.split())
    told = ("error: the prompt of question 'ask' has", "error: the tool 'search' failed on 'Mira Talon'", "answer: ")
    assert [out.count(words) for words in told] == [1, 1, 1]
    assert out.index(told[0]) < out.index(told[1]) < out.index("Question: who founded it?") < out.index(told[2])
    with pytest.raises(ValueError, match="the prompt of question 'ask'"):
        ask.run(miniature.settings(), undisturbed.workdir, [too_long])
