r"""Answers every question of a split, once or --samples times, and writes the figures.

python -m searchr1_jax.evaluate --workdir=runs/quickstart --decoding=greedy,sampled

The policy is the newest checkpoint of the workdir, or --model=<Hugging Face directory>; the search engine is the
config's, or --retriever=http://…, so that a published checkpoint can be judged against an existing server. Writes
eval/<name>-<decoding>.json and, beside it, the episodes as .jsonl. Finished episodes are kept as they come: where it
ended early, the same command goes on after them.
"""

from collections.abc import Sequence
import os

from absl import flags

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.run import command, evaluation, metrics, model_files, parts, run_directory

SPLITS = ("train", "validation", "test")


def run(
    settings: settings_lib.Settings,
    workdir: str | os.PathLike,
    *,
    model: str | None = None,
    step: int | None = None,
    split: str = "test",
    questions: int = 0,
    decodings: Sequence[str] = ("greedy",),
    samples: int = 1,
    name: str | None = None,
) -> dict[str, evaluation.Results]:
    """The figures by decoding; the arguments are the flags of the same names.

    Raises:
      ValueError: where there is no such policy, split or decoding, or a question does not fit.
      ToolError: where a tool fails for good.
    """
    chosen = {each: parts.decoding(settings, each) for each in decodings}
    prefix = name or ("final" if split == "test" else f"final-{split}")
    with (
        command.session(settings, workdir, create=bool(model), learns=False) as directory,
        run_directory.locked(directory, f"evaluate-{prefix}"),
        metrics.booked(directory, "evaluate"),
    ):
        policy = model_files.load(settings, directory, model=model, step=step)
        examples = [example for source in parts.questions(settings, split, directory) for example in source]
        tasks = parts.tasks(settings, examples[: questions or None], policy.tokens, samples=samples)
        for words in [] if model else run_directory.acting_differences(settings, directory):
            metrics.say(f"note: not as in training: {words}")
        group = max(settings.rollout.samples, samples)  # a prompt is forked to at most this many slots
        settings = settings.replace({"rollout.samples": group})
        actor = parts.actor(settings, parts.environment(settings, directory), policy.model, policy.tokens)
        actor.engine.load(policy.params)
        times = f", {samples} times each" if samples > 1 else ""
        metrics.say(f"evaluating {policy.origin} on {len(tasks)} {split} questions{times}")
        found, acting = {}, run_directory.acting_settings(settings)
        for each, decoding in chosen.items():
            file = directory / "eval" / f"{prefix}-{each}.json"
            results = evaluation.evaluate(
                actor.rollout,
                tasks,
                decoding,
                split=split,
                name=each,
                seed=settings.seed,
                path=file.with_suffix(".jsonl"),
                about={"policy": policy.identity, "corpus": settings.data.corpus, **acting},
            )
            results.save(file)
            hops = "  ".join(f"{h}-hop {em:.3f}" for h, em in results.em_by_hops.items())
            metrics.say(f"{each:8} {results.headline()}  searches {results.searches:.2f}  {hops}  ->  {file}")
            found[each] = results
    return found


def define() -> None:
    command.define_settings()
    command.define_policy()
    flags.DEFINE_enum("split", "test", SPLITS, "which questions")
    flags.DEFINE_integer("questions", 0, "the first n of them; 0: all")
    flags.DEFINE_list("decoding", ["greedy"], "greedy, sampled, or both")
    flags.DEFINE_integer("samples", 1, "trajectories a question; the figures are means over all of them", lower_bound=1)
    flags.DEFINE_string("name", None, "of the files in <workdir>/eval; default: final, or final-<split>")


def main() -> None:
    asked = command.values("model", "step", "split", "questions", "samples", "name")
    run(command.settings(), flags.FLAGS.workdir, decodings=flags.FLAGS.decoding, **asked)


if __name__ == "__main__":
    command.run(main, define)
