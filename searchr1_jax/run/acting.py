"""Questions answered by all processes together: each answers and rewards its share on its own, then they exchange.

    tasks ─▶ this process's share ─▶ rollout.episodes ─▶ reward, in threads ─▶ gather ─▶ everything, on every process

A reward is computed where its episode ran and travels with it, so that one that asks a judge asks once, and one that
would not come out the same twice is the same for all. A tool that fails for good stops its own process's share; the
others finish, and the exchange tells all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import time
from typing import NamedTuple

from searchr1_jax.core import cluster, parallel, types
from searchr1_jax.rollout import environment, episodes, sampling
from searchr1_jax.run import metrics
from searchr1_jax.text import rewards


class RewardError(RuntimeError):
    """A reward function that raised; says for which episode, and why."""


# That end a rollout, after what was finished is known to all.
FAILURES = (environment.ToolError, RewardError, episodes.SamplerError)


class Rewarded(NamedTuple):
    """What an episode is worth."""

    reward: types.Worth
    parts: Mapping[str, types.Worth]  # each of the rewards that it is made of, before it is weighted


class Answered(NamedTuple):
    """What came of a list of tasks; the same on every process."""

    trajectories: list[types.Trajectory]  # finished ones, sorted by question and sample
    rewards: list[Rewarded | None]  # of each; None where it was not rewarded
    failure: Exception | None  # of FAILURES, the first process's
    # tokens_per_second that the policy wrote; occupancy, the share of the slots' time that gave a token;
    # slowest_over_mean, the seconds of the slowest process over the mean of all.
    statistics: dict[str, float]


def play(
    rollout: episodes.Rollout,
    tasks: Sequence[episodes.Task],
    decoding: sampling.Decoding,
    *,
    seed: int,
    step: int,
    what: str,
    each: Callable[[types.Trajectory], object],
) -> tuple[Exception | None, bool]:
    """Calls `each` with every episode of this process's share of the tasks as it finishes, and shows how far it is.

    Returns: what ended it early, of FAILURES, and whether it was told to end now.
    """
    mine, began = list(parallel.mine(tasks)), time.perf_counter()
    searches, tokens = 0, 0
    with metrics.Progress(sum(task.samples for task in mine), what=what) as progress:
        try:
            for trajectory in rollout.run(mine, decoding, seed=seed, step=step):
                each(trajectory)
                searches, tokens = searches + trajectory.searches, tokens + int(trajectory.sampled.sum())
                rate = tokens / (time.perf_counter() - began)
                progress.advance(f"{searches} searches, {rate:.0f} tokens/s")
        except FAILURES as error:
            return error, False
        except cluster.Stopped:
            return None, True
    return None, False


def answer(
    rollout: episodes.Rollout,
    tasks: Sequence[episodes.Task],
    decoding: sampling.Decoding,
    *,
    reward: rewards.WeightedSum | None = None,
    reward_threads: int = 1,
    seed: int,
    step: int,
    what: str,
) -> Answered:
    """Answers all tasks, `samples` times each, and shows how far it is; all processes call it together.

    Args:
      reward: called in threads with each episode as it finishes.
      what: is being done, for the display.
    Raises:
      Stopped: on all processes, where one was told to end now.
    """
    began = time.perf_counter()
    finished: list[tuple[types.Trajectory, futures.Future | None]] = []
    with futures.ThreadPoolExecutor(reward_threads, "reward") as pool:
        begin_reward = lambda trajectory: reward and pool.submit(_rewarded, reward, trajectory)
        note = lambda trajectory: finished.append((trajectory, begin_reward(trajectory)))
        failure, stopped = play(rollout, tasks, decoding, seed=seed, step=step, what=what, each=note)
    rewarded: list[tuple[types.Trajectory, Rewarded | None]] = []
    for trajectory, future in finished:
        error = future and future.exception()
        if error is not None:
            failure = failure or RewardError(
                f"the reward of question {trajectory.example.id!r}, sample {trajectory.sample}, failed: {error!r}; fix"
                " the function that config.reward names"
            )
        rewarded.append((trajectory, None if future is None or error is not None else future.result()))
    seconds = time.perf_counter() - began
    shares = [_Share(*share) for share in parallel.gather((rewarded, failure, stopped, rollout.counts, seconds))]
    if any(share.stopped for share in shares):
        raise cluster.Stopped
    slowest = max(share.seconds for share in shares)
    slot_steps = sum(share.counts.slot_steps for share in shares)
    written = sum(share.counts.written for share in shares)
    everything = sorted((pair for share in shares for pair in share.rewarded), key=lambda pair: pair[0].key)
    return Answered(
        trajectories=[trajectory for trajectory, _ in everything],
        rewards=[worth for _, worth in everything],
        failure=next((share.failure for share in shares if share.failure is not None), None),
        statistics={
            "rollout/tokens_per_second": written / slowest,
            "rollout/occupancy": written / max(slot_steps, 1),
            "rollout/slowest_over_mean": slowest * len(shares) / sum(share.seconds for share in shares),
        },
    )


def _rewarded(reward: rewards.WeightedSum, trajectory: types.Trajectory) -> Rewarded:
    parts = reward.parts(trajectory)
    return Rewarded(reward.total(parts), parts)


class _Share(NamedTuple):
    """What one process sends to the others."""

    rewarded: list[tuple[types.Trajectory, Rewarded | None]]
    failure: Exception | None
    stopped: bool
    counts: episodes.Counts
    seconds: float
