"""The example of a tool, in scripted episodes; a run with it is in test_together.py."""

from rollout import scripted

from examples import notebook_tool
from searchr1_jax.core import settings, types
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
