"""Evaluation: every question answered exactly once, judged by exact match.

Called by the command `evaluate` and, every n steps, by `train`.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from searchr1_jax.core import cluster, files, parallel, types
from searchr1_jax.rollout import episodes, sampling
from searchr1_jax.run import acting, kept, metrics
from searchr1_jax.text import protocol, rewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Figures of one evaluation; means over its trajectories."""

    split: str
    decoding: str  # "greedy" or "sampled"
    n: int  # questions x samples
    em: float  # exact match, the mean over the questions of all sets
    em_over_sets: float  # the mean of the data sets' means, as papers average
    f1: float
    searches: float  # answered searches a question
    calls: dict[str, float]  # answered calls a question, by tool
    response_tokens: float  # tokens after the prompt, retrieved ones included
    em_by_hops: dict[str, float]  # by the searches that an ideal episode needs; "0" where unknown
    em_by_source: dict[str, float]  # by data set: what stands before the last "/" of the ids
    stop_reasons: dict[str, int]

    def save(self, path: pathlib.Path) -> None:
        if parallel.is_first():
            files.write_json(path, dataclasses.asdict(self))

    def scalars(self) -> dict[str, float]:
        """What metrics.jsonl takes."""
        several = self.calls if len(self.calls) > 1 else {}
        return {
            "em": self.em,
            "f1": self.f1,
            "searches": self.searches,
            "response_tokens": self.response_tokens,
            **({"em_over_sets": self.em_over_sets} if len(self.em_by_source) > 1 else {}),
            **{f"calls/{tool}": calls for tool, calls in several.items()},
        }

    def headline(self) -> str:
        """Exact match for the console; of several data sets the mean over them first, and each."""
        if len(self.em_by_source) == 1:
            return f"exact match {self.em:.3f}"
        each = "  ".join(f"{name} {em:.3f}" for name, em in self.em_by_source.items())
        over_sets = f"{self.em_over_sets:.3f} over {len(self.em_by_source)} sets"
        return f"exact match {over_sets} ({each}), {self.em:.3f} over questions"


class Scored(NamedTuple):
    """The figures of one finished episode; JSON holds them as they are."""

    em: float
    f1: float
    searches: int
    calls: dict[str, int]  # answered ones, by tool
    response_tokens: int
    hops: int
    stop_reason: str


def score(t: types.Trajectory) -> Scored:
    return Scored(
        em=exact_match(t),
        f1=rewards.token_f1(t.answer, t.example.golden_answers),
        searches=t.searches,
        calls={tool: t.calls(tool) for tool in t.tools},
        response_tokens=len(t.tokens) - t.prompt_tokens,
        hops=t.example.hops,
        stop_reason=t.stop_reason,
    )


def summarise(scored: Mapping[kept.Key, Scored], *, split: str, decoding: str) -> Results:
    """Figures over finished episodes, by question and sample; independent of their order."""
    pairs = sorted(scored.items())
    each, n = [one for _, one in pairs], len(pairs)
    by_hops, by_source = collections.defaultdict(list), collections.defaultdict(list)
    for (identity, _), one in pairs:
        by_hops[str(one.hops)].append(one.em)
        by_source[identity.rpartition("/")[0]].append(one.em)
    sets = _means(by_source)
    return Results(
        split=split,
        decoding=decoding,
        n=n,
        em=sum(one.em for one in each) / n,
        em_over_sets=sum(sets.values()) / len(sets),
        f1=sum(one.f1 for one in each) / n,
        searches=sum(one.searches for one in each) / n,
        calls={tool: sum(one.calls[tool] for one in each) / n for tool in each[0].calls},
        response_tokens=sum(one.response_tokens for one in each) / n,
        em_by_hops=_means(by_hops),
        em_by_source=sets,
        stop_reasons=dict(sorted(collections.Counter(one.stop_reason for one in each).items())),
    )


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(scores) / len(scores) for name, scores in sorted(groups.items())}


def evaluate(
    rollout: episodes.Rollout,
    tasks: Sequence[episodes.Task],
    decoding: sampling.Decoding,
    *,
    split: str,
    name: str,
    seed: int,
    path: pathlib.Path,
    about: Mapping[str, Any],
    write: bool = True,
) -> Results:
    """Answers all tasks with the weights that the rollout's engine holds; all processes together.

    Each process keeps what it finished on disk, and they exchange figures alone. What an earlier try kept is not done
    again.

    Args:
      name: of the decoding, for the results.
      seed: of sampling.
      path: of the episodes, as .jsonl, where they are to be written in the end.
      about: beside these arguments, what the episodes depend on: the policy, the settings of acting; JSON.
    Raises:
      ToolError, Stopped: what was finished is kept.
    """
    about = {**about, "split": split, "decoding": dataclasses.asdict(decoding), "seed": seed, "asked": _digest(tasks)}
    keeping = kept.Kept(path, about)
    found = {key: Scored(**figures) for key, figures in keeping.figures.items()}
    if found:
        metrics.say(f"going on after {len(found)} episodes that were kept")
    mine: dict[kept.Key, Scored] = {}

    def keep(trajectory: types.Trajectory) -> None:
        mine[trajectory.key] = one = score(trajectory)
        keeping.add(trajectory.key, one._asdict(), trajectory_row(trajectory, one.em))

    left = [part for task in tasks for part in _left(task, found)]
    try:
        what = f"{split}, {name}"
        failure, stopped = acting.play(rollout, left, decoding, seed=seed, step=0, what=what, each=keep)
    finally:
        keeping.close()
    ends = parallel.gather((mine, failure, stopped))
    for theirs, _, _ in ends:
        found |= theirs
    if any(stopped for _, _, stopped in ends):
        raise cluster.Stopped
    if failures := [failure for _, failure, _ in ends if failure is not None]:
        metrics.say(f"{len(found)} episodes are finished and kept; start again with the same command to go on")
        raise failures[0]
    keeping.merge(write=write)
    return summarise(found, split=split, decoding=name)


def _digest(tasks: Sequence[episodes.Task]) -> str:
    """Of all that is asked, golden answers included: figures of other questions are no figures of these."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.example, task.prompt, task.samples, task.first_sample)).encode())
    return digest.hexdigest()


def _left(task: episodes.Task, found: Mapping[kept.Key, Scored]) -> Iterator[episodes.Task]:
    """The samples of a task that are not there yet, as tasks of neighbours."""
    wanted = range(task.first_sample, task.first_sample + task.samples)
    missing = [sample for sample in wanted if (task.example.id, sample) not in found]
    for _, run in itertools.groupby(enumerate(missing), key=lambda pair: pair[1] - pair[0]):
        neighbours = [sample for _, sample in run]
        yield dataclasses.replace(task, samples=len(neighbours), first_sample=neighbours[0])


def trajectory_row(trajectory: types.Trajectory, reward: types.Worth | None) -> dict[str, Any]:
    """A trajectory as a JSON object: texts for people, ids and mask for programs."""
    each = None if reward is None else rewards.by_turn(reward)
    return {
        "id": trajectory.example.id,
        "sample": trajectory.sample,
        "question": trajectory.example.question,
        "golden_answers": list(trajectory.example.golden_answers),
        "answer": trajectory.answer,
        "reward": None if reward is None else rewards.amount(reward),
        **({} if each is None else {"turn_rewards": list(each)}),
        "stop_reason": trajectory.stop_reason,
        "turns": [{"text": t.text, "event": t.event, "content": t.content, "reply": t.reply} for t in trajectory.turns],
        "tokens": trajectory.tokens.tolist(),
        "sampled": trajectory.sampled.astype(int).tolist(),
        "behaviour_logp": [round(float(x), 6) for x in trajectory.behaviour_logp],
    }


def exact_match(trajectory: types.Trajectory) -> float:
    return rewards.exact_match(trajectory.answer, trajectory.example.golden_answers)


def describe(trajectories: Sequence[types.Trajectory], worths: Sequence[acting.Rewarded]) -> dict[str, float]:
    """What the trajectories of a step look like; means over them unless named otherwise."""
    mean = lambda values: float(np.mean(list(values)))
    turns, called = [turn for t in trajectories for turn in t.turns], trajectories[0].tools
    return {
        "reward": mean(rewards.amount(worth.reward) for worth in worths),
        **{f"reward/{name}": mean(rewards.amount(w.parts[name]) for w in worths) for name in worths[0].parts},
        "exact_match": mean(map(exact_match, trajectories)),
        "searches": mean(t.searches for t in trajectories),
        "repeated_queries": mean(map(rewards.repeated_queries, trajectories)),
        "turns": mean(len(t.turns) for t in trajectories),
        "response_tokens": mean(len(t.tokens) - t.prompt_tokens for t in trajectories),
        "answered": mean(t.stop_reason == "answered" for t in trajectories),
        "truncated": mean(t.stop_reason == "length" for t in trajectories),
        "valid_actions": mean(turn.event not in (protocol.INVALID, protocol.TRUNCATED) for turn in turns),
        "eos_dropped": float(sum(t.eos_dropped for t in trajectories)),
        "passages_cut": float(sum(t.passages_cut for t in trajectories)),
    } | {f"calls/{tool}": mean(t.calls(tool) for t in trajectories) for tool in called if len(called) > 1}


def keep_interrupted(
    path: pathlib.Path, trajectories: Sequence[types.Trajectory], worths: Sequence[types.Worth | None]
) -> None:
    """Writes what was finished when a tool failed for good, and says where it is."""
    write_trajectories(path, trajectories, worths)
    metrics.say(f"{len(trajectories)} episodes that were finished are in {path}")


def write_trajectories(
    path: pathlib.Path, trajectories: Sequence[types.Trajectory], worths: Sequence[types.Worth | None]
) -> None:
    """One trajectory a line, each with its reward; the first process does."""
    if parallel.is_first():
        files.write_jsonl(path, (trajectory_row(t, worth) for t, worth in zip(trajectories, worths, strict=True)))
