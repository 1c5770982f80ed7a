r"""Answers every question of a split, once or --samples times, and writes the figures.

python -m searchr1_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart --decoding=greedy,sampled

The policy is the newest checkpoint of the workdir, or --model=<Hugging Face directory>; the search engine is the
config's, or --retriever=http://…, so that a published checkpoint can be judged against an existing server. Writes
eval/<name>-<decoding>.json and, beside it, the episodes as .jsonl.
"""

from __future__ import annotations

from absl import flags

from searchr1_jax.run import command
from searchr1_jax.run import evaluation
from searchr1_jax.run import metrics
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup

_CONFIG, _WORKDIR = command.define_flags()
_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory; default: the newest checkpoint of the workdir")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default: the newest")
_RETRIEVER = flags.DEFINE_string("retriever", None, "http://… of a retrieval server; default: the config's")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "which questions")
_QUESTIONS = flags.DEFINE_integer("questions", 0, "the first n of them; 0: all")
_DECODING = flags.DEFINE_list("decoding", ["greedy"], "greedy, sampled, or both")
_SAMPLES = flags.DEFINE_integer(
    "samples", 1, "trajectories a question; the figures are means over all of them", lower_bound=1
)
_NAME = flags.DEFINE_string("name", None, "of the files in <workdir>/eval; default: final, or final-<split>")


def main(argv):
    del argv
    config = _CONFIG.value
    decodings = {name: setup.decoding(config, name) for name in _DECODING.value}
    if _RETRIEVER.value:
        config.retriever.url = _RETRIEVER.value
    with (
        command.session(config, _WORKDIR.value, create=bool(_MODEL.value)) as workdir,
        metrics.verb(workdir, "evaluate"),
    ):
        policy = setup.policy(config, workdir, model=_MODEL.value, step=_STEP.value)
        examples = [example for source in setup.questions(config, _SPLIT.value, workdir) for example in source]
        examples = examples[: _QUESTIONS.value or None]
        tasks = setup.tasks(config, examples, policy.tokens, samples=_SAMPLES.value)
        for words in [] if _MODEL.value else run_directory.acting_differences(config, workdir):
            metrics.say(f"note: not as in training: {words}")
        # What the engine can append a prompt to at once.
        config.rollout.samples = max(config.rollout.samples, _SAMPLES.value)
        environment = setup.environment(config, workdir)
        engine, rollout = setup.rollout(config, policy.model, policy.tokens, environment)
        engine.load(policy.params)
        count = f"{len(tasks)} {_SPLIT.value} questions" + f", {_SAMPLES.value} times each" * (_SAMPLES.value > 1)
        metrics.say(f"evaluating {policy.origin} on {count}")
        split = _SPLIT.value
        prefix = _NAME.value or ("final" if split == "test" else f"final-{split}")
        for name, decoding in decodings.items():
            results, trajectories = evaluation.evaluate(
                rollout, tasks, decoding, split=split, name=name, seed=config.seed, directory=workdir / "eval"
            )
            scores = [evaluation.exact_match(t) for t in trajectories]
            file = workdir / "eval" / f"{prefix}-{name}.json"
            evaluation.write_trajectories(file.with_suffix(".jsonl"), trajectories, scores)
            results.save(file)
            hops = "  ".join(f"{h}-hop {em:.3f}" for h, em in results.em_by_hops.items())
            metrics.say(f"{name:8} exact match {results.em:.3f}  searches {results.searches:.2f}  {hops}  ->  {file}")


if __name__ == "__main__":
    command.run(main)
