r"""Reinforcement learning: roll out, reward, learn, again.

python -m searchr1_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

A run lives in its workdir and resumes from there by itself, exactly: killed at any moment and started again, it ends
with the same numbers. Ctrl-C ends it after the step in progress, with a checkpoint; a second Ctrl-C at once. SIGTERM
ends it now: what was learned is saved, a rollout or a step of learning under way is done again.
Settings that change what is learned may differ from those it began with only with --accept_changes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from searchr1_jax.core import cluster, parallel, settings as settings_lib, types
from searchr1_jax.data import stream as stream_lib
from searchr1_jax.learning import guards, kl_control, step as learning, update
from searchr1_jax.models import catalog, decoder, hf
from searchr1_jax.rollout import episodes, sampling
from searchr1_jax.run import (
    acting,
    checkpoint,
    command,
    curves,
    evaluation,
    metrics,
    model_files,
    parts,
    progress,
    run_directory,
    stop,
    tools,
)
from searchr1_jax.text import rewards, tokenizer


def run(
    settings: settings_lib.Settings,
    workdir: str | os.PathLike,
    *,
    accept_changes: bool = False,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains in the workdir, or goes on there. Returns whether the run came to its end.

    Args:
      accept_changes: go on with settings that change what is learned; they are recorded in the workdir.
      asked_to_stop: asked after each step, on all processes together.
    """
    with (
        command.session(settings, workdir) as directory,
        run_directory.locked(directory, "train"),
        metrics.booked(directory, "train"),
        checkpoint.Checkpoints(directory / "checkpoints", keep=settings.checkpoint.keep) as checkpoints,
    ):
        changes = []
        parallel.agree("the newest checkpoint", checkpoints.latest)
        if checkpoints.latest:
            changes = run_directory.check(settings, directory, accept_changes=accept_changes)
        experiment = build(settings, directory)
        return train(experiment, directory, checkpoints, asked_to_stop, changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a run, made from its settings before any of it has learned."""

    settings: settings_lib.Settings
    tokens: tokenizer.Tokenizer
    actor: parts.Actor
    decodings: dict[str, sampling.Decoding]  # of the rollout ("sampled") and of evaluations
    stream: stream_lib.QuestionStream
    questions: dict[str, str]  # the hash of each data set that is learned from
    held_out: list[episodes.Task]
    reward: rewards.WeightedSum
    learner: update.Learner
    reference: decoder.Params | None  # None where nothing is compared with it
    model: dict[str, Any]  # config.json of the policy
    initial: Callable[[], update.TrainState]  # the state as it begins


def build(settings: settings_lib.Settings, workdir: pathlib.Path) -> Experiment:
    """All parts; whatever is wrong with the settings or their files is found here, before any work."""
    decodings = {name: parts.decoding(settings, name) for name in ("sampled", *settings.evaluation.decoding)}
    tools.names(settings)
    reward = rewards.resolve(settings.reward)
    model_path = model_files.find(settings.model.path, workdir, "model.path")
    model, tokens = hf.read_config(model_path, settings.model.family), tokenizer.Tokenizer.load(model_path)
    sources = parts.questions(settings, "train", workdir)
    for source in sources:
        parts.check_prompts(settings, source, tokens)
    count = settings.evaluation.questions or None
    held_out = [q for source in parts.questions(settings, "validation", workdir) for q in list(source)[:count]]
    learner = update.Learner(model, settings)
    environment = parts.environment(settings, workdir)
    actor = parts.actor(settings, environment, model, tokens, beside=learner.resident_bytes(model))
    param_dtype = jnp.dtype(settings.model.param_dtype)
    reference = None
    if learner.has_reference:
        reference = learner.keep(hf.load(model_path, model, dtype=jnp.dtype(settings.model.reference_dtype)))

    def initial() -> update.TrainState:
        value = None
        if learner.has_value_model:  # the policy's body with a fresh head
            value = hf.load(model_path, model, kind=decoder.Value, dtype=param_dtype)
        return learner.init(hf.load(model_path, model, dtype=param_dtype), value)

    return Experiment(
        settings=settings,
        tokens=tokens,
        actor=actor,
        decodings=decodings,
        stream=stream_lib.QuestionStream(sources, seed=settings.seed, batch_questions=settings.rollout.questions),
        questions={source.name: source.digest for source in sources},
        held_out=parts.tasks(settings, held_out, tokens, samples=1),
        reward=reward,
        learner=learner,
        reference=reference,
        model=catalog.to_hf(model, dtype=str(param_dtype)),
        initial=initial,
    )


@dataclasses.dataclass(kw_only=True)
class Position:
    """Where a run is; all that a checkpoint keeps."""

    step: int  # rollouts learned from
    state: update.TrainState
    course: progress.Course
    stream: dict[str, Any]  # the position of the question stream
    owed: dict[str, float] | None  # figures of the last step that are not written, as its evaluation is still owed
    learning: bool = False  # within a step of it, in which there is no whole state to save


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """What a rollout made, the same on every process: all that learning needs, and a checkpoint could hold."""

    step: int  # that it belongs to, from 0
    policy_step: int  # steps that the policy had learned when it acted
    trajectories: list[types.Trajectory]  # sorted by question and sample
    rewards: Sequence[acting.Rewarded]  # of each
    stream: dict[str, Any]  # the position of the question stream after it
    statistics: dict[str, float]  # of the acting


def train(
    e: Experiment,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    asked_to_stop: Callable[[], bool],
    changes: list[run_directory.Change],
) -> bool:
    """The whole run, or what is left of it. Returns whether it came to its end."""
    c, total = e.settings, e.settings.learner.steps
    parallel.agree("the data", e.questions)
    if checkpoints.latest:
        run_directory.check_questions(e.questions, workdir)
    at = begin(e, checkpoints, changes)
    run_directory.claim(c, workdir, e.questions)  # only now: what could not start has claimed nothing
    run_directory.record(workdir, changes, at.step)
    if parallel.is_first():
        e.tokens.save(workdir / run_directory.TOKENIZER)
    if c.rollout.top_p < 1 or c.rollout.top_k:
        metrics.say("rollout.top_p or top_k cuts the distribution that is sampled; log-probs are of the whole one")

    with metrics.Writer(workdir, step=at.step, again=at.owed is not None) as writer:

        def finish(row: dict[str, float]) -> bool:
            """Ends a step: evaluates if due, writes, says, saves. Returns whether to stop here."""
            at.owed = row
            if evaluated := evaluation_due(c, at.step):
                row = row | evaluate(e, at, workdir)
            writer.write(at.step, row)
            metrics.say(f"step {at.step}/{total}  " + _line(row))
            if evaluated:
                curves.learning_curve(workdir)
            at.owed, every = None, c.checkpoint.every
            stopping = asked_to_stop()
            due = stopping or at.step == total or every and at.step % every == 0
            if at.step and (due or checkpoints.older_than(60 * c.checkpoint.minutes)):
                save(e, at, checkpoints)
            return stopping

        try:
            stopping = at.owed is not None and finish(at.owed)
            while at.step < total and not stopping:
                row = learn(e, at, act(e, at, workdir), workdir)
                if exceeded := guards.exceeded(row, c.guard):
                    metrics.say(f"warning: step {at.step}: {'; '.join(exceeded)}")
                    if c.guard.rollbacks:
                        go_back(e, at, checkpoints, exceeded)
                        writer.rewind(at.step)
                        row = at.owed
                stopping = row is not None and finish(row)
        except (*acting.FAILURES, cluster.Stopped) as error:
            if at.step and not at.learning and at.step not in checkpoints.steps:
                save(e, at, checkpoints)
                metrics.say(f"saved step {at.step}; start again with the same command to go on from there")
            if not isinstance(error, cluster.Stopped):
                raise
            asked_to_stop()  # so that all know the status
    curves.learning_curve(workdir)
    if at.step < total:
        metrics.say(f"stopped after step {at.step}; start again with the same command to go on")
    return at.step == total


def begin(e: Experiment, checkpoints: checkpoint.Checkpoints, changes: list[run_directory.Change]) -> Position:
    """Where the run is: at its newest checkpoint, or at its beginning."""
    state = e.initial()
    if not checkpoints.latest:
        course = progress.Course(kl_coefficient=e.settings.algorithm.kl_coefficient)
        owed = {} if e.settings.evaluation.first else None
        return Position(step=0, state=state, course=course, stream=e.stream.state(), owed=owed)
    like = _shapes(state)
    del state  # the checkpoint's takes its place in memory
    at = restore(e, checkpoints, checkpoints.latest, like)
    metrics.say(f"resuming after step {at.step} of {e.settings.learner.steps}")
    for change in changes:
        metrics.say(f"note: from here on, {change}")
        if change.key == "algorithm.kl_coefficient":
            at.course = dataclasses.replace(at.course, kl_coefficient=change.now)
    return at


def _shapes(state: update.TrainState) -> dict[str, Any]:
    """What a checkpoint of such a state is restored like."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state._asdict())


def restore(e: Experiment, checkpoints: checkpoint.Checkpoints, step: int, like: dict[str, Any]) -> Position:
    """The position that a checkpoint holds; the question stream goes back there too."""
    trees, extra = checkpoints.restore(step, like)
    about = progress.About.of(extra)
    e.stream.restore(about.stream)
    state = update.TrainState(**trees)
    return Position(step=step, state=state, course=about.course, stream=about.stream, owed=about.owed)


def save(e: Experiment, at: Position, checkpoints: checkpoint.Checkpoints) -> None:
    """Starts to save the position."""
    about = progress.About(
        model=e.model,
        base=e.settings.model.path,
        tools=list(tools.names(e.settings)),
        has_value_model=e.learner.has_value_model,
        stream=at.stream,
        step=at.step,
        owed=at.owed,
        course=at.course,
    )
    checkpoints.save(at.step, at.state._asdict(), about.as_json())


def go_back(e: Experiment, at: Position, checkpoints: checkpoint.Checkpoints, exceeded: list[str]) -> None:
    """Moves to the last checkpoint after limits were exceeded, with half the learning rates from there on.

    Raises:
      FloatingPointError: where there is no such step, or the run has gone back often enough.
    """
    allowed, course = e.settings.guard.rollbacks, at.course
    if course.rollbacks >= allowed or checkpoints.latest is None:
        why = "there is no checkpoint yet" if checkpoints.latest is None else "the run went back before"
        raise FloatingPointError(
            f"{'; '.join(exceeded)}, and {why} (guard.rollbacks is {allowed}); lower the learning rates, raise the"
            " limit, or set checkpoint.every"
        )
    checkpoints.wait()
    course = dataclasses.replace(course, rate_scale=course.rate_scale / 2, rollbacks=course.rollbacks + 1)
    metrics.say(f"going back to step {checkpoints.latest}, learning rates times {course.rate_scale:g} from there on")
    like = _shapes(at.state)
    del at.state
    vars(at).update(vars(restore(e, checkpoints, checkpoints.latest, like)) | {"course": course})


def act(e: Experiment, at: Position, workdir: pathlib.Path) -> Experience:
    """Answers the step's questions with the policy as it is; every process rewards what it answered.

    If a tool or a reward fails for good, what was finished is written first.
    """
    e.actor.engine.load(at.state.policy)
    began, step = time.time(), at.step
    tasks = parts.tasks(e.settings, next(e.stream), e.tokens, samples=e.settings.rollout.samples)
    answered = acting.answer(
        e.actor.rollout,
        tasks,
        e.decodings["sampled"],
        reward=e.reward,
        reward_threads=e.settings.reward.threads,
        seed=e.settings.seed,
        step=step,
        what=f"rollout {step + 1}",
    )
    e.actor.engine.release()  # learning takes its place in memory
    if answered.failure is not None:
        path = workdir / "trajectories" / f"interrupted-step{step + 1:06d}.jsonl"
        evaluation.keep_interrupted(path, answered.trajectories, [r and r.reward for r in answered.rewards])
        raise answered.failure
    seconds = {"seconds/hand_over": e.actor.engine.hand_over_s, "seconds/rollout": time.time() - began}
    return Experience(
        step=step,
        policy_step=step,
        trajectories=answered.trajectories,
        rewards=[rewarded for rewarded in answered.rewards if rewarded],
        stream=e.stream.state(),
        statistics=answered.statistics | {"hand_over/bytes": e.actor.engine.hand_over_bytes} | seconds,
    )


def learn(e: Experiment, at: Position, x: Experience, workdir: pathlib.Path) -> dict[str, float]:
    """Learns from what a rollout made: moves to the next step, and returns the figures of this one."""
    c, course, began = e.settings, at.course, time.time()
    at.learning = True
    at.state, row = learning.learn(
        e.learner,
        at.state,
        e.reference,
        x.trajectories,
        [worth.reward for worth in x.rewards],
        x.step,
        kl_coefficient=course.kl_coefficient,
        rate_scale=course.rate_scale,
        failed=workdir / "failed",
    )
    at.learning = False
    row |= x.statistics | evaluation.describe(x.trajectories, x.rewards)
    row |= {
        "kl_coefficient": course.kl_coefficient,
        "compiled_programs": e.actor.engine.compiled + e.learner.compiled,
        "seconds/learning": time.time() - began,
    }
    at.step, at.stream = x.step + 1, x.stream
    if c.log.trajectories_every and at.step % c.log.trajectories_every == 0:
        path = workdir / "trajectories" / f"step{at.step:06d}.jsonl"
        evaluation.write_trajectories(path, x.trajectories, [worth.reward for worth in x.rewards])
    kl = row.get("kl_to_reference", 0.0)
    coefficient = kl_control.next_coefficient(c.algorithm, course.kl_coefficient, kl, len(x.trajectories))
    at.course = dataclasses.replace(course, kl_coefficient=coefficient)
    return row


def evaluation_due(c: settings_lib.Settings, step: int) -> bool:
    if step == 0:
        return c.evaluation.first
    return bool(c.evaluation.every) and (step % c.evaluation.every == 0 or step == c.learner.steps)


def evaluate(e: Experiment, at: Position, workdir: pathlib.Path) -> dict[str, float]:
    """Figures on the held-out questions, under eval/<decoding>/."""
    e.actor.engine.load(at.state.policy)
    values = {}
    for name in e.settings.evaluation.decoding:
        path = workdir / "eval" / f"validation-{name}-step{at.step:06d}.json"
        results = evaluation.evaluate(
            e.actor.rollout,
            e.held_out,
            e.decodings[name],
            split="validation",
            name=name,
            seed=e.settings.seed,
            path=path,
            about={"step": at.step, "course": dataclasses.asdict(at.course), **e.settings.as_json()},
            write=False,
        )
        results.save(path)
        values |= {f"eval/{name}/{key}": number for key, number in results.scalars().items()}
    e.actor.engine.release()
    return values


def _line(values: dict[str, float]) -> str:
    """The figures to watch, for the console."""
    shown = {"reward": "reward", "searches": "searches", "kl_to_reference": "kl", "policy/entropy": "entropy"}
    told = [f"{label} {values[key]:.3f}" for key, label in shown.items() if key in values]
    held_out = [key for key in values if key.startswith("eval/") and key.endswith("/em")]
    told += [f"{key} {values[key]:.3f}" for key in held_out]
    if "seconds/rollout" in values:
        told.append(f"{values['seconds/rollout'] + values['seconds/learning']:.1f} s")
    return "  ".join(told)


def define() -> None:
    command.define_settings()
    flags.DEFINE_bool("accept_changes", False, "go on with settings that change what is learned; they are recorded")


def main() -> None:
    stopping, given = stop.StopSignal(), flags.FLAGS
    if not run(command.settings(), given.workdir, accept_changes=given.accept_changes, asked_to_stop=stopping.agreed):
        sys.exit(stopping.exit_status)


if __name__ == "__main__":
    command.run(main, define)
