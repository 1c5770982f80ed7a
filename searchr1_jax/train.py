r"""Reinforcement learning: roll out, reward, learn, again.

python -m searchr1_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

A run lives in its workdir and resumes from there by itself, exactly: killed at any moment and started again, it ends
with the same numbers. Ctrl-C or SIGTERM ends it after the step in progress, with a checkpoint; a second Ctrl-C at once.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.core import settings
from searchr1_jax.core import types
from searchr1_jax.data import stream as stream_lib
from searchr1_jax.learning import guards
from searchr1_jax.learning import kl_control
from searchr1_jax.learning import step as learning
from searchr1_jax.learning import update
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.rollout import engine as engine_lib
from searchr1_jax.rollout import episodes
from searchr1_jax.rollout import sampling
from searchr1_jax.run import acting
from searchr1_jax.run import checkpoint
from searchr1_jax.run import command
from searchr1_jax.run import curves
from searchr1_jax.run import evaluation
from searchr1_jax.run import metrics
from searchr1_jax.run import retrievers
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup
from searchr1_jax.text import rewards
from searchr1_jax.text import tokenizer

_CONFIG, _WORKDIR = command.define_flags()


def main(argv):
    del argv
    config, stop = _CONFIG.value, _StopSignal()
    with (
        command.session(config, _WORKDIR.value) as workdir,
        metrics.verb(workdir, "train"),
        checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    ):
        if checkpoints.latest:
            run_directory.check(config, workdir)
        finished = train(config, build(config, workdir), workdir, checkpoints, stop)
    if not finished:
        sys.exit(stop.exit_status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, made from its config before any of it has learned."""

    tokens: tokenizer.Tokenizer
    engine: engine_lib.Engine
    rollout: episodes.Rollout
    decodings: dict[str, sampling.Decoding]  # of the rollout ("sampled") and of evaluations
    stream: stream_lib.QuestionStream
    held_out: list[episodes.Task]
    reward: rewards.WeightedSum
    learner: update.Learner
    reference: decoder.Params | None  # None where nothing is compared with it
    about: dict[str, Any]  # what a checkpoint says of its policy, all that export needs beside the weights
    state: update.TrainState  # as it begins


def build(config: setup.Config, workdir: pathlib.Path) -> Run:
    """All parts; whatever is wrong with the config or its files is found here, before any work."""
    decodings = {name: setup.decoding(config, name) for name in ("sampled", *config.evaluation.decoding)}
    reward = rewards.resolve(**config.reward)
    model_path = setup.model_directory(config.model.path, workdir, "model.path")
    model, tokens = hf.read_config(model_path), tokenizer.Tokenizer.load(model_path)
    sources = setup.questions(config, "train", workdir)
    for source in sources:
        setup.tasks(config, source, tokens, samples=1)  # refuses questions too long
    count = config.evaluation.questions or None
    held_out = [q for source in setup.questions(config, "validation", workdir) for q in list(source)[:count]]
    environment = setup.search_environment(config, retrievers.make(config, workdir))
    engine, rollout = setup.rollout(config, model, tokens, environment)
    learner = update.Learner(model, settings.Settings.of(config))
    param_dtype = setup.dtype(config.model.param_dtype)
    reference = None
    if learner.has_reference:
        reference = learner.keep(hf.load(model_path, dtype=setup.dtype(config.model.reference_dtype)))
    value = None
    if learner.has_value_model:  # the policy's body with a fresh head
        value = hf.load(model_path, kind=decoder.Value, dtype=param_dtype)
    return Run(
        tokens=tokens,
        engine=engine,
        rollout=rollout,
        decodings=decodings,
        stream=stream_lib.QuestionStream(sources, seed=config.seed, batch_questions=config.rollout.questions),
        held_out=setup.tasks(config, held_out, tokens, samples=1),
        reward=reward,
        learner=learner,
        reference=reference,
        about={
            "model": model_config.to_hf(model, dtype=str(param_dtype)),
            "base": config.model.path,
            "has_value_model": learner.has_value_model,
        },
        state=learner.init(hf.load(model_path, dtype=param_dtype), value),
    )


def train(
    config: setup.Config,
    run: Run,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    stop: _StopSignal,
) -> bool:
    """The whole run, or what is left of it. Returns whether it came to its end."""
    total, state, step = config.learner.steps, run.state, checkpoints.latest or 0
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state._asdict())
    run = dataclasses.replace(run, state=None)  # learning donates it
    course = Course(kl_coefficient=config.algorithm.kl_coefficient)
    row = {} if step == 0 and config.evaluation.first else None  # of a step whose evaluation is still owed
    if step:
        del state  # the checkpoint's takes its place in memory
        state, course, row = restore(run, checkpoints, step, like)
        metrics.say(f"resuming after step {step} of {total}")
    run_directory.claim(config, workdir)  # only now: what could not start has claimed nothing
    if parallel.is_first():
        run.tokens.save(workdir / run_directory.TOKENIZER)
    if config.rollout.top_p < 1 or config.rollout.top_k:
        metrics.say("rollout.top_p or top_k cuts the distribution that is sampled; log-probs are of the whole one")
    position = run.stream.state()

    def save(owed: dict[str, float] | None = None) -> None:
        extra = run.about | {
            "stream": position,
            "step": step,
            "owed": owed,
            "course": dataclasses.asdict(course),
        }
        checkpoints.save(step, state._asdict(), extra)

    with metrics.Writer(workdir, step=step, again=row is not None) as writer:
        try:
            while row is not None or step < total:
                if row is None:
                    run.engine.load(state.policy)
                    state, course, row = one_step(config, run, state, course, step, workdir)
                    step, position = step + 1, run.stream.state()
                    if exceeded := guards.exceeded(row, run.learner.settings.guard):
                        metrics.say(f"warning: step {step}: {'; '.join(exceeded)}")
                    if exceeded and config.guard.rollbacks:
                        del state
                        step, course = go_back(config, checkpoints, course, exceeded)
                        state, _, row = restore(run, checkpoints, step, like)
                        position = run.stream.state()
                        writer.rewind(step)
                        continue
                if evaluation_due(config, step):
                    row |= evaluate(config, run, state, step, workdir)
                writer.write(step, row)
                metrics.say(f"step {step}/{total}  " + _line(row))
                if evaluation_due(config, step):
                    curves.learning_curve(workdir)
                row = None
                every = config.checkpoint.every
                stopping = stop.agreed()  # asked once: no stop without a checkpoint
                if step and (stopping or step == total or every and step % every == 0):
                    save()
                if stopping:
                    break
        except retrieval.RetrievalError:
            if step and step not in checkpoints.steps:
                save(owed=row)
                metrics.say(f"saved step {step}; start again with the same command to go on from there")
            raise
    curves.learning_curve(workdir)
    if step < total:
        metrics.say(f"stopped after step {step}; start again with the same command to go on")
    return step == total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What a run changes of its settings as it goes; saved with each checkpoint."""

    kl_coefficient: float  # β
    rate_scale: float = 1.0  # of the learning rates
    rollbacks: int = 0  # so far


def restore(run: Run, checkpoints: checkpoint.Checkpoints, step: int, like):
    """The state, the course and the row still owed of a checkpoint; the question stream goes back there too."""
    trees, extra = checkpoints.restore(step, like)
    run.stream.restore(extra["stream"])
    return update.TrainState(**trees), Course(**extra["course"]), extra["owed"]


def go_back(config: setup.Config, checkpoints: checkpoint.Checkpoints, course: Course, exceeded: list[str]):
    """The step to go on from after limits were exceeded, and the course from there.

    Raises:
      FloatingPointError: where there is no such step, or the run has gone back often enough.
    """
    if course.rollbacks >= config.guard.rollbacks or checkpoints.latest is None:
        why = "there is no checkpoint yet" if checkpoints.latest is None else "the run went back before"
        raise FloatingPointError(
            f"{'; '.join(exceeded)}, and {why} (guard.rollbacks is {config.guard.rollbacks}); lower the learning rates,"
            " raise the limit, or set checkpoint.every"
        )
    checkpoints.wait()
    course = dataclasses.replace(course, rate_scale=course.rate_scale / 2, rollbacks=course.rollbacks + 1)
    step = checkpoints.latest
    metrics.say(f"going back to step {step}, learning rates times {course.rate_scale:g} from there on")
    return step, course


def evaluation_due(config: setup.Config, step: int) -> bool:
    if step == 0:
        return config.evaluation.first
    every = config.evaluation.every
    return bool(every) and (step % every == 0 or step == config.learner.steps)


def evaluate(config: setup.Config, run: Run, state, step: int, workdir: pathlib.Path) -> dict[str, float]:
    """Figures on the held-out questions, under eval/<decoding>/."""
    run.engine.load(state.policy)
    values = {}
    for name in config.evaluation.decoding:
        results, _ = evaluation.evaluate(
            run.rollout, run.held_out, run.decodings[name],
            split="validation", name=name, seed=config.seed, directory=workdir / "eval",
        )  # fmt: skip
        results.save(workdir / "eval" / f"validation-{name}-step{step:06d}.json")
        values |= {f"eval/{name}/{key}": number for key, number in results.scalars().items()}
    return values


def one_step(config: setup.Config, run: Run, state, course: Course, step: int, workdir: pathlib.Path):
    """Rolls out with the weights that the engine holds, and learns. Returns the next state, course, and figures."""
    began = time.time()
    tasks = setup.tasks(config, next(run.stream), run.tokens, samples=config.rollout.samples)
    trajectories, acting_values = roll_out(config, run, tasks, step, workdir)
    acted = time.time()
    parts = [run.reward.parts(t) for t in trajectories]
    worth = [run.reward.total(part) for part in parts]
    state, values = learning.learn(
        run.learner, state, run.reference, trajectories, worth, step,
        kl_coefficient=course.kl_coefficient, rate_scale=course.rate_scale, failed=workdir / "failed",
    )  # fmt: skip
    values |= acting_values | describe(trajectories, worth)
    values |= {f"reward/{name}": float(np.mean([rewards.amount(part[name]) for part in parts])) for name in parts[0]}
    values |= {
        "kl_coefficient": course.kl_coefficient,
        "hand_over/bytes": run.engine.hand_over_bytes,
        "seconds/hand_over": run.engine.hand_over_s,
        "compiled_programs": run.engine.compiled + run.learner.compiled,
        "seconds/rollout": acted - began,
        "seconds/learning": time.time() - acted,
    }
    if (every := config.log.trajectories_every) and (step + 1) % every == 0:
        path = workdir / "trajectories" / f"step{step + 1:06d}.jsonl"
        evaluation.write_trajectories(path, trajectories, worth)
    kl = values.get("kl_to_reference", 0.0)
    algorithm = run.learner.settings.algorithm
    coefficient = kl_control.next_coefficient(algorithm, course.kl_coefficient, kl, len(trajectories))
    return state, dataclasses.replace(course, kl_coefficient=coefficient), values


def roll_out(config, run: Run, tasks, step: int, workdir: pathlib.Path):
    """The step's trajectories of all processes, sorted, and figures of the acting.

    If a search fails for good, what was finished is written first.
    """
    decoding, what = run.decodings["sampled"], f"rollout {step + 1}"
    answered = acting.answer(run.rollout, tasks, decoding, seed=config.seed, step=step, what=what)
    if answered.failure is not None:
        path = workdir / "trajectories" / f"interrupted-step{step + 1:06d}.jsonl"
        evaluation.keep_interrupted(path, answered.trajectories, run.reward)
        raise answered.failure
    return answered.trajectories, answered.statistics


def describe(trajectories: list[types.Trajectory], worth: list[types.Worth]) -> dict[str, float]:
    """What the trajectories of a step look like; means over them unless named otherwise."""
    mean = lambda values: float(np.mean(list(values)))
    turns = [turn for t in trajectories for turn in t.turns]
    return {
        "reward": mean(map(rewards.amount, worth)),
        "exact_match": mean(map(evaluation.exact_match, trajectories)),
        "searches": mean(t.searches for t in trajectories),
        "repeated_queries": mean(map(rewards.repeated_queries, trajectories)),
        "turns": mean(len(t.turns) for t in trajectories),
        "response_tokens": mean(len(t.tokens) - t.prompt_tokens for t in trajectories),
        "answered": mean(t.stop_reason == "answered" for t in trajectories),
        "truncated": mean(t.stop_reason == "length" for t in trajectories),
        "valid_actions": mean(turn.event in ("search", "answer") for turn in turns),
        "eos_dropped": float(sum(t.eos_dropped for t in trajectories)),
        "passages_cut": float(sum(t.passages_cut for t in trajectories)),
    }


def _line(values: dict[str, float]) -> str:
    """The figures to watch, for the console."""
    shown = {"reward": "reward", "searches": "searches", "kl_to_reference": "kl", "policy/entropy": "entropy"}
    parts = [f"{label} {values[key]:.3f}" for key, label in shown.items() if key in values]
    parts += [f"{key} {value:.3f}" for key, value in values.items() if key.startswith("eval/") and key.endswith("/em")]
    if "seconds/rollout" in values:
        parts.append(f"{values['seconds/rollout'] + values['seconds/learning']:.1f} s")
    return "  ".join(parts)


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step in progress."""

    def __init__(self):
        self._asked, self.exit_status = 0, 0  # of this process, at any moment; of all, when they have agreed
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        if self._asked:
            raise KeyboardInterrupt
        self._asked = 128 + number
        metrics.say("stopping after this step; once more to stop at once")

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all ask together."""
        self.exit_status = max(parallel.gather(self._asked))
        return self.exit_status != 0


if __name__ == "__main__":
    command.run(main)
