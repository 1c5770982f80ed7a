r"""Asks the policy a question and prints the episode, coloured by who wrote what.

python -m searchr1_jax.ask --config=configs/quickstart.py --workdir=runs/quickstart --question="who founded …"

Without --question it reads questions from the terminal, one a line. --model and --retriever are those of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import sys

from absl import flags
from rich import console as rich_console
from rich import text as rich_text

from searchr1_jax.core import types
from searchr1_jax.rollout import environment as environment_lib
from searchr1_jax.run import command
from searchr1_jax.run import setup
from searchr1_jax.text import tokenizer

_CONFIG, _WORKDIR = command.define_flags()
_QUESTION = flags.DEFINE_string("question", None, "what to ask; default: lines from the terminal")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory; default: the newest checkpoint of the workdir")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_RETRIEVER = flags.DEFINE_string("retriever", None, "http://… of a retrieval server; default: the config's")
_DECODING = flags.DEFINE_enum("decoding", "greedy", ["greedy", "sampled"], "how tokens are chosen")

_STYLES = {"prompt": "dim", "policy": "bold green", "environment": "cyan"}


def coloured(trajectory: types.Trajectory, tokens: tokenizer.Tokenizer) -> rich_text.Text:
    """The episode's text, each stretch in the colour of its author."""
    out = rich_text.Text(tokens.decode(trajectory.tokens[: trajectory.prompt_tokens]), style=_STYLES["prompt"])
    rest = range(trajectory.prompt_tokens, len(trajectory.tokens))
    for sampled, stretch in itertools.groupby(rest, key=lambda t: bool(trajectory.sampled[t])):
        text = tokens.decode(trajectory.tokens[list(stretch)])
        out.append(text, style=_STYLES["policy" if sampled else "environment"])
    return out


def _lines(console: rich_console.Console) -> Iterator[str]:
    """Questions from the terminal, or from whatever stands in for it, until its end."""
    while True:
        if sys.stdin.isatty():
            console.print("question: ", end="")
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line


def main(argv):
    del argv
    config, console = _CONFIG.value, rich_console.Console()
    if _RETRIEVER.value:
        config.retriever.url = _RETRIEVER.value
    decoding = setup.decoding(config, _DECODING.value)
    with command.session(config, _WORKDIR.value, create=bool(_MODEL.value), alone=True) as workdir:
        policy = setup.policy(config, workdir, model=_MODEL.value, step=_STEP.value)
        environment = setup.environment(config, workdir)
        engine, rollout = setup.rollout(config, policy.model, policy.tokens, environment)
        engine.load(policy.params)
        legend = rich_text.Text.assemble(
            f"{policy.origin}    ", *((f"{author}  ", style) for author, style in _STYLES.items())
        )
        console.print(legend)
        for question in [_QUESTION.value] if _QUESTION.value else _lines(console):
            example = types.QAExample(id="ask", question=question, golden_answers=())
            try:
                tasks = setup.tasks(config, [example], policy.tokens, samples=1)
                (trajectory,) = rollout.run(tasks, decoding, seed=config.seed, step=0)
            except (ValueError, environment_lib.ToolError) as error:
                if _QUESTION.value:
                    raise
                console.print(f"error: {error}", markup=False)  # the next question may do better
                continue
            console.print(coloured(trajectory, policy.tokens))
            outcome = f"[{trajectory.stop_reason}]  answer: {trajectory.answer}\n"
            console.print(outcome, style="dim", markup=False)


if __name__ == "__main__":
    command.run(main)
