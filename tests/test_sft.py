"""Supervised training on files: trajectories against demonstrations, and rejection sampling from end to end."""

from __future__ import annotations

import itertools
import json
import shutil

import bits
import jax
import meshes
import miniature
import numpy as np
import pytest
import slow_decoder

from searchr1_jax import evaluate, sft
from searchr1_jax.learning import supervised
from searchr1_jax.models import hf
from searchr1_jax.run import checkpoint, evaluation
from searchr1_jax.text import tokenizer

CHOICE = {
    "data.demonstrations": ("eval/candidates-sampled.jsonl",), "sft.min_reward": 1.0, "sft.model": "base",
    "sft.output": "chosen", "sft.steps": 8, "sft.optimizer.warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workdir with a world and a base that searches by chance; not to be written to."""
    workdir = tmp_path_factory.mktemp("world")
    with jax.set_mesh(meshes.make()):
        miniature.world(workdir, miniature.settings())
    return workdir


@pytest.fixture
def workdir(world, tmp_path):
    """A copy of the world."""
    return shutil.copytree(world, tmp_path / "run")


@pytest.fixture(scope="module")
def learner(world):
    """Of all tests, so that it is compiled once."""
    c, model = miniature.settings(**CHOICE), hf.read_config(world / "base")
    with jax.set_mesh(meshes.make()):
        return supervised.SupervisedLearner(model, c, total_steps=c.sft.steps)


# Trajectories.


def _demonstrate(path):
    """Four demonstrations, each of turns, passages and a correction."""
    passages = [{"id": "7", "title": '"Mira"', "text": "Mira is from Kelu."}]
    for n in range(1, 5):
        turns = "I <search> Kelu </search>", "no tag" * n, "<answer> x </answer>"
        look, lapse, answer = ({"turn": text, "weight": 1.0} for text in turns)
        segments = [look, {"passages": passages}, lapse, {"correction": True}, answer]
        row = {"id": f"d{n}", "question": "who is Kelu", "golden_answers": ["x"], "segments": segments}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def test_a_trajectory_teaches_what_its_demonstration_teaches(workdir, learner, laptop):
    """Though the texts that frame a demonstration are others by then, and its contents weigh more."""
    base, tokens = workdir / "base", tokenizer.Tokenizer.load(workdir / "base")
    model = hf.read_config(base)
    config = miniature.settings(**{"data.demonstrations": ("shown.jsonl",), "sft.content_weight": 1.0})

    def taught(config):
        batch = next(sft.batches(config, sft.source(config, workdir, tokens, model, 0)))
        return jax.device_get(learner.update(learner.init(hf.load(base)), batch, 0))

    _demonstrate(workdir / "shown.jsonl")
    pairs = itertools.islice(sft.source(config, workdir, tokens, model, 0), 4)
    shown = sorted((trajectory for trajectory, _ in pairs), key=lambda t: t.key)
    evaluation.write_trajectories(workdir / "played.jsonl", shown, [0.0] * 4)
    state, statistics = taught(config)
    logp = [slow_decoder.token_logp(hf.load(base), model, t.tokens)[t.sampled] for t in shown]
    np.testing.assert_allclose(statistics["loss"], -np.concatenate(logp).mean(), rtol=1e-5)
    changes = {"data.demonstrations": ("played.jsonl",), "sft.content_weight": 5.0, "protocol.prompt": "{question}"}
    played_state, played = taught(miniature.settings(**changes))
    assert played["loss"] == statistics["loss"] and played["gradient_norm"] == statistics["gradient_norm"] > 0
    bits.assert_equal(played_state.optimizer, state.optimizer)
    bits.assert_equal(played_state.policy, state.policy)


VOCABULARY = 320  # of the babbler's embedding, which is padded: its tokenizer has 300


@pytest.mark.parametrize(
    "reward, token, complaint",
    [
        (1.0, VOCABULARY, "played.jsonl, line 1: token 320 is not of the model's 320; train the model that wrote it"),
        (0.5, VOCABULARY - 1, "all 1 trajectories of .* rewarded less than sft.min_reward of 1; lower it"),
    ],
    ids=["another vocabulary", "too little reward"],
)
def test_what_cannot_be_learned_is_refused_before_any_work(workdir, laptop, monkeypatch, reward, token, complaint):
    row = {"id": "a", "question": "", "golden_answers": [], "tokens": [5, token], "sampled": [0, 1]}
    row["reward"] = reward
    (workdir / "played.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(supervised, "SupervisedLearner", lambda *_, **__: pytest.fail("work began"))
    config = miniature.settings(**CHOICE | {"data.demonstrations": ("played.jsonl",)})
    with pytest.raises(ValueError, match=complaint):
        sft.run(config, workdir)


# Rejection sampling.


def test_what_was_chosen_becomes_likelier_than_what_was_left_out(workdir, laptop, learner, capsys, monkeypatch):
    """Hardly an answer of the babbler's is right, so the first search is what is to be learned."""
    monkeypatch.setattr(supervised, "SupervisedLearner", lambda *_, **__: learner)
    monkeypatch.setattr(evaluation, "exact_match", lambda t: float(t.turns[0].event == "search"))
    asked = dict(split="train", decodings=["sampled"], samples=5, name="candidates")
    evaluate.run(miniature.settings(), workdir, model=str(workdir / "base"), **asked)
    rows = list(map(json.loads, (workdir / "eval" / "candidates-sampled.jsonl").read_text().splitlines()))
    assert [row["sample"] for row in rows] == [0, 1, 2, 3, 4] * 3  # questions
    rewards = np.array([row["reward"] for row in rows])
    assert 0 < rewards.sum() < 15
    results = json.loads((workdir / "eval" / "candidates-sampled.json").read_text())
    assert results["n"] == 15 and results["em"] == pytest.approx(rewards.mean())
    sft.run(miniature.settings(**CHOICE), workdir)
    out = capsys.readouterr().out
    assert f"left out {int((1 - rewards).sum())} of 15 trajectories: rewarded less than 1" in out
    model = hf.read_config(workdir / "base")

    def logp(name):
        params = jax.device_get(hf.load(workdir / name))
        return np.array(
            [
                slow_decoder.token_logp(params, model, row["tokens"])[np.array(row["sampled"], bool)].mean()
                for row in rows
            ]
        )

    with jax.set_mesh(meshes.make()):
        gained = logp("chosen") - logp("base")
    assert gained[rewards == 1].min() > 0
    assert gained[rewards == 1].mean() > gained[rewards == 0].mean() + 0.1


# What a run goes on with, and what it refuses.

DEMONSTRATIONS = {"data.demonstrations": ("demonstrations.jsonl",)}


def _answers(workdir, *, longest=1, count=40):
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
        sft.train(miniature.settings(**DEMONSTRATIONS | changes), workdir, checkpoints)


def test_sft_goes_on_under_its_own_config_only(workdir, laptop):
    _answers(workdir)
    _teach(workdir, **{"sft.output": "taught"})
    before = miniature.files(workdir)
    changed = {"sft.output": "taught", "sft.content_weight": 2.0, "sft.steps": 2}
    message = "another config .sft.steps: 1 there, 2 now; sft.content_weight: 5.0 there, 2.0 now"
    with pytest.raises(ValueError, match=message):
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


def test_a_demonstration_that_does_not_fit_is_refused_before_the_first_step(workdir, untaught, laptop):
    _answers(workdir, longest=200)
    with pytest.raises(ValueError, match="demonstration 'd39' has [0-9]+ tokens, more than the context of 128"):
        _teach(workdir)


def test_sft_in_another_world_than_the_workdirs_is_refused(workdir, untaught, laptop):
    invented = {"data.demonstrations": (), "sft.drill_steps": 1, "sft.mixture_steps": 0}
    with pytest.raises(ValueError, match=r"not the config's \(seed: 0 there, 5 now\); run .*prepare in another"):
        _teach(workdir, **invented, **{"world.seed": 5})
    (workdir / "world.json").unlink()
    with pytest.raises(ValueError, match=r"not the config's \(it holds none\).* or name files in data.demonstrations"):
        _teach(workdir, **invented)
