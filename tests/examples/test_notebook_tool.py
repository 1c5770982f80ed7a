"""A tool from outside the package: in scripted episodes, and in a tiny run that is interrupted and goes on."""

import json
import shutil

import jax
import meshes
import miniature
import pytest
from rollout import scripted

from examples import notebook_tool
from searchr1_jax import train
from searchr1_jax.core import settings
from searchr1_jax.core import types
from searchr1_jax.text import rewards

PROTOCOL = settings.Protocol(correction="Again!", information="<i>{docs}</i>")


def test_an_episode_reads_its_own_notes_again(split_tokenizer):
    texts = [
        ["<note>born in Kelu</note>", "<note> of 1815 </note>", "<answer>Kelu</answer>"],
        ["<note>no idea</note>", "<answer>none</answer>"],
    ]
    question = types.QAExample(id="q", question="where", golden_answers=("Kelu",))
    scripts = {
        question: [scripted.script(split_tokenizer, *[f"<think></think>{text}" for text in turns]) for turns in texts]
    }
    notebook = notebook_tool.Notebook(None, None)
    found, _ = scripted.play(split_tokenizer, scripts, None, protocol=PROTOCOL, tools=[notebook])
    assert [turn.reply for turn in found["q", 0].turns] == [
        "<i>1. born in Kelu\n</i>",
        "<i>1. born in Kelu\n2. of 1815\n</i>",
        "",
    ]
    assert [turn.reply for turn in found["q", 1].turns] == ["<i>1. no idea\n</i>", ""]
    assert [found["q", sample].calls("note") for sample in (0, 1)] == [2, 1]
    assert all(rewards.well_formed(trajectory) for trajectory in found.values())


# A run.

CONFIG = {
    "tools": ("search", "calculate", "examples.notebook_tool:Notebook"),
    "world.layers": 1, "learner.steps": 2, "checkpoint.every": 1, "evaluation.every": 0, "evaluation.first": False,
}  # fmt: skip


def go_on(workdir, c):
    """What `python -m searchr1_jax.train` does."""
    train.run(c, workdir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that was never interrupted."""
    workdir, c = tmp_path_factory.mktemp("run"), miniature.settings(**CONFIG)
    with jax.set_mesh(meshes.make()):
        miniature.world(workdir, c)
        go_on(workdir, c)
    return workdir


def test_the_policy_calls_all_tools_and_each_call_is_counted(run):
    rows = miniature.rows(run)
    assert len(rows) == 2 and all(rows[1][f"calls/{tool}"] > 0 for tool in ("search", "calculate", "note"))
    episodes = miniature.trajectories(run, "step000002.jsonl")
    turns = [turn for episode in episodes for turn in episode["turns"]]
    notes = [turn for turn in turns if turn["event"] == "note" and turn["reply"]]
    assert len(notes) == rows[1]["calls/note"] * len(episodes)
    assert all("<information> 1. " in turn["reply"] for turn in notes)
    valid = [turn["event"] in ("search", "calculate", "note", "answer") for turn in turns]
    assert rows[1]["valid_actions"] == pytest.approx(sum(valid) / len(valid))


def test_each_tag_is_a_token_and_exports_stop_at_the_tools_tags(run):
    generation = json.loads((run / "base" / "generation_config.json").read_text())
    assert generation["stop_strings"] == ["</search>", "</calculate>", "</note>", "</answer>"]
    added = json.loads((run / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    assert {"<calculate>", "</calculate>", "<note>", "</note>"} < {token["content"] for token in added}


def test_a_run_with_a_stateful_tool_that_was_killed_goes_on_as_if_it_had_not_been(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    assert miniature.saved_steps(workdir) == [1, 2]
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.rmtree(workdir / "trajectories")
    with jax.set_mesh(meshes.make()):
        go_on(workdir, miniature.settings(**CONFIG))
    assert miniature.rows(workdir) == miniature.rows(run)
    name = "step000002.jsonl"
    assert miniature.trajectories(workdir, name) == miniature.trajectories(run, name)
