"""Questions answered by all processes together: each answers its share on its own devices, then they exchange.

    tasks ─▶ this process's share ─▶ rollout.episodes ─▶ gather ─▶ all trajectories, on every process, sorted

A tool that fails for good ends the share of its process only; the others finish theirs, and then all know.
"""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import NamedTuple

from searchr1_jax.core import parallel
from searchr1_jax.core import types
from searchr1_jax.rollout import environment
from searchr1_jax.rollout import episodes
from searchr1_jax.rollout import sampling
from searchr1_jax.run import metrics


class Answered(NamedTuple):
    """What came of a list of tasks; the same on every process."""

    trajectories: list[types.Trajectory]  # finished ones, sorted by question and sample
    failure: environment.ToolError | None  # the first process's, if a tool failed for good
    # tokens_per_second that the policy wrote; occupancy, the share of the slots' time that gave a token;
    # slowest_over_mean, the seconds of the slowest process over the mean of all.
    statistics: dict[str, float]


def answer(
    rollout: episodes.Rollout,
    tasks: Sequence[episodes.Task],
    decoding: sampling.Decoding,
    *,
    seed: int,
    step: int,
    what: str,
) -> Answered:
    """Answers all tasks, `samples` times each, and shows how far it is; all processes call it together.

    Args:
      what: is being done, for the display.
    """
    mine, began = list(parallel.mine(tasks)), time.perf_counter()
    finished: list[types.Trajectory] = []
    failure, searches, tokens = None, 0, 0
    with metrics.Progress(sum(task.samples for task in mine), what=what) as progress:
        try:
            for trajectory in rollout.run(mine, decoding, seed=seed, step=step):
                finished.append(trajectory)
                searches, tokens = searches + trajectory.searches, tokens + int(trajectory.sampled.sum())
                rate = tokens / (time.perf_counter() - began)
                progress.advance(f"{searches} searches, {rate:.0f} tokens/s")
        except environment.ToolError as error:
            failure = error
    seconds = time.perf_counter() - began
    shares = [_Share(*share) for share in parallel.gather((finished, failure, rollout.counts, seconds))]
    slowest = max(share.seconds for share in shares)
    slot_steps = sum(share.counts.slot_steps for share in shares)
    written = sum(share.counts.written for share in shares)
    return Answered(
        trajectories=sorted((t for share in shares for t in share.trajectories), key=lambda t: t.key),
        failure=next((share.failure for share in shares if share.failure is not None), None),
        statistics={
            "rollout/tokens_per_second": written / slowest,
            "rollout/occupancy": written / max(slot_steps, 1),
            "rollout/slowest_over_mean": slowest * len(shares) / sum(share.seconds for share in shares),
        },
    )


class _Share(NamedTuple):
    """What one process sends to the others."""

    trajectories: list[types.Trajectory]
    failure: environment.ToolError | None
    counts: episodes.Counts
    seconds: float
