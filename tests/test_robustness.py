"""What a run survives, what it refuses, and what it keeps apart; all in this process, on one device."""

from __future__ import annotations

import io
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
from rollout import scripted

from configs import base
from searchr1_jax import prepare
from searchr1_jax import sft
from searchr1_jax import train
from searchr1_jax.core import settings as settings_lib
from searchr1_jax.core import types
from searchr1_jax.learning import step as learning
from searchr1_jax.learning import supervised
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.rollout import episodes
from searchr1_jax.run import checkpoint
from searchr1_jax.run import checks
from searchr1_jax.run import curves
from searchr1_jax.run import setup
from searchr1_jax.text import protocol as text_protocol

ask, evaluate, export = map(miniature.verb, ("ask", "evaluate", "export"))

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
    with pytest.raises(retrieval.RetrievalError, match="failed after 4 attempts: status 500"):
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
        for place in (
            (workdir, "interrupted-step000004.jsonl"),
            (undisturbed.workdir, "step000004.jsonl"),
        )
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
        if args[-1] == 0:  # the first step
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


# A question that comes twice in a step.

PROTOCOL = text_protocol.Protocol(prompt="{question}\n")
A, B, C = (types.QAExample(id=f"nq/{name}", question=name, golden_answers=("x",)) for name in "abc")


def test_a_question_that_comes_again_goes_on_counting_its_samples(byte_tokenizer):
    tasks = episodes.make_tasks([A, B, A, A], byte_tokenizer, PROTOCOL, samples=2, room=9)
    assert [(task.example, task.first_sample) for task in tasks] == [(A, 0), (B, 0), (A, 2), (A, 4)]
    assert {task.samples for task in tasks} == {2}


@pytest.mark.parametrize("shapes", [dict(slots=2, group=2), dict(slots=5, group=3, extend_rows=1)], ids=str)
def test_a_question_asked_twice_plays_every_sample_once(tagged_tokenizer, shapes):
    scripts = {
        example: [scripted.script(tagged_tokenizer, f"<answer>{example.id} {n}</answer>") for n in range(6)]
        for example in (A, B)
    }
    library = scripted.Library(lambda query: [])
    trajectories, _ = scripted.play(tagged_tokenizer, scripts, library, protocol=PROTOCOL, times=2, **shapes)
    answers = {key: trajectory.answer for key, trajectory in trajectories.items()}
    assert answers == {(e.id, n): f"{e.id} {n}" for e in (A, B) for n in range(6)}


def test_samples_of_a_question_asked_twice_in_a_step_differ(undisturbed):
    for step in (1, 2, 3, 4):  # of four questions each, out of three
        rows = miniature.trajectories(undisturbed.workdir, f"step{step:06d}.jsonl")
        keys = [(row["id"], row["sample"]) for row in rows]
        assert len(keys) == len(set(keys)) == 8 and max(sample for _, sample in keys) >= 3
        texts = {(row["id"], tuple(row["tokens"])) for row in rows}
        assert len(texts) == 8


def _trajectory(example, sample):
    return types.Trajectory(
        example=example, sample=sample, tokens=np.int32([5, 6, 7]), sampled=np.array([False, True, True]),
        behaviour_logp=np.zeros(3, np.float32), prompt_tokens=1, turns=(), stop_reason="no_action", answer=None,
    )  # fmt: skip


class _Listener:
    """A learner that notes the advantage of each trajectory it is given, mini-batch by mini-batch."""

    settings = settings_lib.Settings.of(miniature.config())

    def __init__(self):
        self.heard = []

    def score(self, state, reference, batch):
        pass

    def estimate(self, batches, scores, group_advantages, *, kl_coefficient):
        for batch, advantage in zip(jax.device_get(batches), jax.device_get(group_advantages), strict=True):
            of = {int(i): set(advantage[(batch.trajectory == i) & batch.policy_mask].tolist()) for i in range(4)}
            self.heard.append([advantage for i in range(4) for advantage in of[i]])
        return [None] * len(batches), {}

    def update(self, state, batch, score, target, step, **scalars):
        return state, {"policy/loss": 0.0}


def test_groups_of_a_question_asked_twice_stay_whole(parts, tmp_path):
    """Each group of G = 2 has its own mean; the first mini-batch holds a's two groups, the second b's and c's."""
    rewards = {"nq/a": (0.0, 1.0, 5.0, 5.0), "nq/b": (3.0, 1.0), "nq/c": (0.0, 0.0)}
    arriving = [_trajectory(e, n) for e, n in ((C, 1), (A, 2), (A, 0), (B, 1), (A, 3), (C, 0), (B, 0), (A, 1))]
    rollout = python_types.SimpleNamespace(run=lambda *_, **__: iter(arriving), counts=episodes.Counts())
    run = mock.Mock(rollout=rollout, decodings={"sampled": None})
    trajectories, _ = train.roll_out(miniature.config(), run, [], 0, tmp_path)
    scores = [rewards[t.example.id][t.sample] for t in trajectories]
    learner = _Listener()
    learning.learn(learner, None, None, trajectories, scores, 0, kl_coefficient=0.0, failed=tmp_path)
    half = 0.5**0.5  # (1 - ½) / the unbiased standard deviation of (0, 1); also that of (3, 1)
    np.testing.assert_allclose(learner.heard, [[-half, half, 0, 0], [half, -half, 0, 0]], atol=1e-5)


# A run that runs away.


class _Alarm:
    """In place of `guards.exceeded`: some steps exceed limits, by their number in the order of judgement."""

    def __init__(self, *judgements: int):
        self._judgements, self._asked = judgements, 0

    def __call__(self, values, guard):
        self._asked += 1
        return ["kl_to_reference of 9 is above guard.kl of 1"] * (self._asked in self._judgements)


def test_a_run_that_exceeds_a_limit_is_warned_of_and_goes_on(parts, undisturbed, workdir, capsys):
    assert parts.train(workdir, exceeded=_Alarm(2, 3))
    out = capsys.readouterr().out
    assert "warning: step 2: kl_to_reference of 9 is above guard.kl of 1" in out and "warning: step 3" in out
    _assert_same_run(workdir, undisturbed)


def test_on_request_it_goes_back_to_its_last_checkpoint_with_half_the_learning_rate(
    parts, undisturbed, workdir, capsys
):
    """Steps 1, 2, 3, at half the rate 3 and 4, at a quarter of it 3 and 4; the third and the fifth are too much."""
    settings = {"guard.rollbacks": 2, "checkpoint.every": 2}
    assert parts.train(workdir, exceeded=_Alarm(3, 5), **settings)
    out = capsys.readouterr().out
    assert out.count("going back to step 2") == 2 and "learning rates times 0.25" in out
    rows, before = miniature.rows(workdir), miniature.rows(undisturbed.workdir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[:3] == before[:3]
    rates = [[row["policy/learning_rate"] for row in run[1:]] for run in (rows, before)]
    np.testing.assert_allclose(rates[0], np.array(rates[1]) * [1, 1, 0.25, 0.25], rtol=1e-6)
    assert rows[3]["reward"] == before[3]["reward"]  # the same questions, by the same policy


def test_a_run_killed_after_it_went_back_goes_on_at_the_lower_rate(parts, workdir, tmp_path):
    settings = {"guard.rollbacks": 1, "checkpoint.every": 1, "evaluation.every": 0}
    whole = shutil.copytree(workdir, tmp_path / "whole")
    assert parts.train(whole, exceeded=_Alarm(2), **settings)
    assert not parts.train(workdir, exceeded=_Alarm(2), stop_at=3, **settings)
    assert parts.train(workdir, exceeded=_Alarm(), **settings)
    assert miniature.rows(workdir) == miniature.rows(whole)


@pytest.mark.parametrize(
    "settings, cause", [({}, "the run went back before"), ({"checkpoint.every": 0}, "there is no checkpoint yet")]
)
def test_it_stops_where_it_cannot_go_back(parts, workdir, settings, cause):
    settings = {"guard.rollbacks": 1, "checkpoint.every": 1} | settings
    with pytest.raises(FloatingPointError, match=f"guard.kl of 1, and {cause} .guard.rollbacks is 1.; lower the"):
        parts.train(workdir, exceeded=_Alarm(2, 3), **settings)


# Supervised training.

DEMONSTRATIONS = {"data.demonstrations": ("demonstrations.jsonl",)}


def _demonstrate(workdir, *, longest=1, count=40):
    """Demonstrations of which the last has an answer of so many words."""
    words = [1] * (count - 1) + [longest]
    rows = [
        {
            "id": f"d{n}",
            "question": "who",
            "golden_answers": ["x"],
            "segments": [{"turn": f"<answer> {'x ' * length}</answer>", "weight": 1.0}],
        }
        for n, length in enumerate(words)
    ]
    (workdir / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _teach(workdir, **changes):
    with checkpoint.Checkpoints(workdir / "sft", keep=1) as checkpoints:
        sft.train(miniature.config(**DEMONSTRATIONS | changes), workdir, checkpoints)


def test_sft_goes_on_under_its_own_config_only(workdir):
    _demonstrate(workdir)
    _teach(workdir, **{"sft.output": "taught"})
    before = miniature.files(workdir)
    changed = {"sft.output": "taught", "sft.content_weight": 2.0, "sft.steps": 2}
    with pytest.raises(
        ValueError, match="another config .sft.content_weight: 5.0 there, 2.0 now; sft.steps: 1 there, 2 now"
    ):
        _teach(workdir, **changed)
    with pytest.raises(ValueError, match="sft.model: 'init' there, 'base' now.*, or remove that directory"):
        _teach(workdir, **{"sft.output": "taught", "sft.model": "base"})  # whose weights have other shapes
    assert miniature.files(workdir) == before
    _teach(workdir, **{"sft.output": "taught", "seed": 1, "rollout.slots": 16})  # it does not depend on these
    assert miniature.files(workdir).keys() == before.keys()


@pytest.fixture
def untaught(monkeypatch):
    """No step of supervised training may be taken."""
    monkeypatch.setattr(supervised.SupervisedLearner, "update", lambda *_: pytest.fail("a step was taken"))


def test_a_demonstration_that_does_not_fit_is_refused_before_the_first_step(workdir, untaught):
    _demonstrate(workdir, longest=200)
    with pytest.raises(ValueError, match="demonstration 'd39' has [0-9]+ tokens, more than the context of 128"):
        _teach(workdir)


def test_sft_in_another_world_than_the_workdirs_is_refused(workdir, untaught):
    invented = {"data.demonstrations": (), "sft.drill_steps": 1, "sft.mixture_steps": 0}
    with pytest.raises(ValueError, match=r"not the config's \(seed: 0 there, 5 now\); run .*prepare in another"):
        _teach(workdir, **invented, **{"world.seed": 5})
    (workdir / "world.json").unlink()
    with pytest.raises(ValueError, match=r"persons: None there, 40 now.* or name files in data.demonstrations"):
        _teach(workdir, **invented)


# The invented world.


@pytest.mark.parametrize("name", ["corpus.jsonl", "test.jsonl", "init/config.json"])
def test_prepare_does_not_replace_a_users_own_files(parts, tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=f"{name.split('/')[0]} is not of an invented world; .*another --workdir"):
        miniature.call(prepare, config=miniature.config(), workdir=tmp_path)
    assert miniature.files(tmp_path) == {file: b"{}\n"}


def test_prepare_does_not_replace_another_world(workdir):
    before = miniature.files(workdir)
    with pytest.raises(ValueError, match=r"holds another world \(protocol.passage: .*; seed: 0 there, 1 now\)"):
        changed = miniature.config(**{"world.seed": 1, "protocol.passage": "{text}\n"})
        miniature.call(prepare, config=changed, workdir=workdir)
    assert miniature.files(workdir) == before


def test_prepare_makes_the_same_files_again(workdir):
    before = miniature.files(workdir)
    miniature.call(prepare, config=miniature.config(**{"seed": 3}), workdir=workdir)
    after = miniature.files(workdir)
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed <= {"verbs.jsonl", "corpus.jsonl.offsets.npy"}  # that tell the time


# Configs.


def _refused(**changes):
    c = base.get_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as refusal:
        checks.check(c)
    return str(refusal.value)


@pytest.mark.parametrize("key", checks._AT_LEAST_ONE)
def test_what_has_to_be_there_is_counted_from_one(key):
    for value in (0, -3):
        assert _refused(**{key: value}).startswith(f"{key} is {value}; ")


@pytest.mark.parametrize("key", ["param_dtype", "compute_dtype", "reference_dtype", "actor_dtype"])
def test_a_dtype_that_there_is_not_is_refused_with_those_that_there_are(key):
    message = _refused(**{f"model.{key}": "bf16"})
    assert message == f"model.{key} is 'bf16'; choose from ['float32', 'bfloat16', 'float16']"


def test_a_misspelt_attention_is_refused_with_those_that_there_are():
    assert "model.attention is 'flash'; choose auto or one of ['xla', " in _refused(**{"model.attention": "flash"})


# Question files.


@pytest.mark.parametrize(
    "names",
    [(), ("test.jsonl", "test.jsonl"), ("test.jsonl", "./test.jsonl"), ("test.jsonl", "test.json")],
    ids=str,
)
def test_question_files_are_named_and_each_once(parts, names):
    with pytest.raises(ValueError) as refusal:
        setup.questions(miniature.config(**{"data.test": names}), "test", parts.workdir)
    assert str(refusal.value).startswith(f"data.test is {names}; name at least one file, and each once")


def test_an_evaluation_keeps_files_apart_and_tells_how_acting_differs_from_training(
    parts, undisturbed, tmp_path, capsys
):
    workdir = shutil.copytree(undisturbed.workdir, tmp_path / "run")
    for folder in ("nq", "hotpot"):
        (workdir / folder).mkdir()
        shutil.copy(workdir / "test.jsonl", workdir / folder)
    changes = {"rollout.max_turns": 1, "retriever.dimensions": 16, "learner.steps": 9, "evaluation.every": 1}
    files = {"data.test": ("nq/test.jsonl", "hotpot/test.jsonl")}
    with mock.patch.object(setup, "rollout", lambda *_: (parts.run.engine, parts.rollout)):
        miniature.call(evaluate, config=miniature.config(**changes | files), workdir=workdir)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
        assert notes == [
            "note: not as in training: retriever.dimensions: 32 there, 16 now",
            "note: not as in training: rollout.max_turns: 3 there, 1 now",
        ]
        miniature.call(evaluate, config=miniature.config(), workdir=workdir, name="same", questions=2)
        assert "note" not in capsys.readouterr().out
    results = json.loads((workdir / "eval" / "final-greedy.json").read_text())
    rows = list(map(json.loads, (workdir / "eval" / "final-greedy.jsonl").read_text().splitlines()))
    own = [json.loads(line)["id"] for line in (workdir / "test.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {f"{folder}/test/{i}" for folder in ("nq", "hotpot") for i in own}
    assert len(rows) == results["n"] == 2 * len(own)
    assert list(results["em_by_source"]) == ["hotpot/test", "nq/test"]


# Export.


@pytest.fixture
def trained(undisturbed, tmp_path):
    """A copy of the undisturbed run."""
    return shutil.copytree(undisturbed.workdir, tmp_path / "runs" / "run")


@pytest.mark.parametrize("output", [".", "..", "../..", "eval/..", "config.json"])
def test_an_export_does_not_replace_the_run_or_a_file(trained, output):
    before = miniature.files(trained)
    with pytest.raises(ValueError, match="is a file or holds the run itself; name a directory of its own"):
        miniature.call(export, workdir=trained, output=trained / output, overwrite=True)
    assert miniature.files(trained) == before


def test_an_export_takes_the_config_of_the_run(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    config["model"]["param_dtype"] = "bfloat16"
    (trained / "config.json").write_text(json.dumps(config))
    miniature.call(export, workdir=trained, output=tmp_path / "model")
    assert {str(x.dtype) for x in bits.stored(tmp_path / "model").values()} == {"bfloat16"}
    (trained / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist; name the --workdir of a run, or its --config"):
        miniature.call(export, workdir=trained, output=tmp_path / "another")


# Asking.


def test_a_question_that_cannot_be_answered_does_not_end_the_session(parts, undisturbed, capsys, monkeypatch):
    failing = [retrieval.RetrievalError("Mira Talon", "status 500", attempts=4)]

    def run(*args, **kwargs):
        if failing:
            raise failing.pop()
        return parts.rollout.run(*args, **kwargs)

    too_long = "who founded " * 40
    rollout = parts.run.engine, python_types.SimpleNamespace(run=run)
    monkeypatch.setattr(setup, "rollout", lambda *_: rollout)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{too_long}\n\nwho is lost\nwho founded it\n"))
    flags = dict(config=miniature.config(), workdir=undisturbed.workdir)
    miniature.call(ask, **flags)
    out = " ".join(capsys.readouterr().out.split())
    told = (
        "error: the prompt of question 'ask' has",
        "error: the search for 'Mira Talon' failed",
        "answer: ",
    )
    assert [out.count(words) for words in told] == [1, 1, 1]
    assert out.index(told[0]) < out.index(told[1]) < out.index("Question: who founded it?") < out.index(told[2])
    with pytest.raises(ValueError, match="the prompt of question 'ask'"):
        miniature.call(ask, **flags, question=too_long)
