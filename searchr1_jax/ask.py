r"""Asks the policy a question and prints the episode, coloured by who wrote what.

python -m searchr1_jax.ask --workdir=runs/quickstart --question="who founded …"

Without --question it reads questions from the terminal, one a line. --model and --retriever are those of `evaluate`.
"""

from collections.abc import Iterable, Iterator
import itertools
import os
import sys

from absl import flags
from rich import console as rich_console, text as rich_text

from searchr1_jax.core import settings as settings_lib, types
from searchr1_jax.rollout import environment
from searchr1_jax.run import command, model_files, parts
from searchr1_jax.text import tokenizer

_STYLES = {"prompt": "dim", "policy": "bold green", "environment": "cyan"}


def coloured(trajectory: types.Trajectory, tokens: tokenizer.Tokenizer) -> rich_text.Text:
    """The episode's text, each stretch in the colour of its author."""
    out = rich_text.Text(tokens.decode(trajectory.tokens[: trajectory.prompt_tokens]), style=_STYLES["prompt"])
    rest = range(trajectory.prompt_tokens, len(trajectory.tokens))
    for sampled, stretch in itertools.groupby(rest, key=lambda t: bool(trajectory.sampled[t])):
        text = tokens.decode(trajectory.tokens[list(stretch)])
        out.append(text, style=_STYLES["policy" if sampled else "environment"])
    return out


def run(
    settings: settings_lib.Settings,
    workdir: str | os.PathLike,
    questions: Iterable[str],
    *,
    model: str | None = None,
    step: int | None = None,
    decoding: str = "greedy",
    strict: bool = True,
    console: rich_console.Console | None = None,
) -> list[types.Trajectory]:
    """Asks one question after another, prints the episodes, and returns them.

    Args:
      strict: whether a question that cannot be asked, or a tool that fails, is an error; else it is printed, and the
        next question may do better.
    """
    console, chosen, episodes = console or rich_console.Console(), parts.decoding(settings, decoding), []
    with command.session(settings, workdir, create=bool(model), alone=True, learns=False) as directory:
        policy = model_files.load(settings, directory, model=model, step=step)
        actor = parts.actor(settings, parts.environment(settings, directory), policy.model, policy.tokens)
        actor.engine.load(policy.params)
        legend = ((f"{author}  ", style) for author, style in _STYLES.items())
        console.print(rich_text.Text.assemble(f"{policy.origin}    ", *legend))
        for question in questions:
            example = types.QAExample(id="ask", question=question, golden_answers=())
            try:
                tasks = parts.tasks(settings, [example], policy.tokens, samples=1)
                (trajectory,) = actor.rollout.run(tasks, chosen, seed=settings.seed, step=0)
            except (ValueError, environment.ToolError) as error:
                if strict:
                    raise
                console.print(f"error: {error}", markup=False)
                continue
            console.print(coloured(trajectory, policy.tokens))
            outcome = f"[{trajectory.stop_reason}]  answer: {trajectory.answer}\n"
            console.print(outcome, style="dim", markup=False)
            episodes.append(trajectory)
    return episodes


def _lines(console: rich_console.Console) -> Iterator[str]:
    """Questions from the terminal, or from whatever stands in for it, until its end."""
    while True:
        if sys.stdin.isatty():
            console.print("question: ", end="")
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line


def define() -> None:
    command.define_settings()
    command.define_policy()
    flags.DEFINE_string("question", None, "what to ask; default: lines from the terminal")
    flags.DEFINE_enum("decoding", "greedy", ["greedy", "sampled"], "how tokens are chosen")


def main() -> None:
    given, console = flags.FLAGS, rich_console.Console()
    questions = _lines(console) if given.question is None else [given.question]
    policy = command.values("model", "step", "decoding")
    run(command.settings(), given.workdir, questions, **policy, strict=given.question is not None, console=console)


if __name__ == "__main__":
    command.run(main, define)
