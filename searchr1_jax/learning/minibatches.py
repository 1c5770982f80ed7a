"""From the trajectories of a rollout to the mini-batches that are learned from, one update each.

trajectories, rewards ─ groups of a question's samples ─▶ those worth learning from
    ─ cut into mini-batches ─▶ packed rows, loss weights, advantages within groups
"""

from typing import NamedTuple, Sequence

import numpy as np

from searchr1_jax.core import settings as settings_lib, types
from searchr1_jax.data import packing
from searchr1_jax.learning import advantages
from searchr1_jax.text import rewards as rewards_lib


class MiniBatches(NamedTuple):
    """A rollout as its updates see it; a list's entry is an update's, which is empty where it learns nothing."""

    batches: list[types.Batch]  # on the host; all of one shape
    advantages: list[np.ndarray] | None  # float32[M, B, T] each; None where they are estimated token by token
    learned: list[list[int]]  # indices of the trajectories in each
    statistics: dict[str, float]


def make(
    trajectories: Sequence[types.Trajectory],
    rewards: Sequence[types.Worth],
    settings: settings_lib.Settings,
    step: int = 0,
) -> MiniBatches:
    """The mini-batches of sorted trajectories, in which the samples of a question are neighbours.

    The step, which counts rollouts from 0, and the seed decide which questions come together.
    """
    c, algorithm = settings.learner, settings.algorithm
    estimator = advantages.find(algorithm.advantage)
    by_turn = estimator.of_turns is not None
    reward_QGK, rewarded_QGK = _in_groups(trajectories, rewards, settings.rollout.samples, turns=by_turn)
    varied_Q = advantages.has_variance(reward_QGK, rewarded_QGK)
    parts, most = _cut(varied_Q, settings, step)
    longest = max((len(trajectories[i].tokens) for part in parts for i in part), default=0)
    row_tokens = next((n for n in c.row_tokens if n >= longest), c.row_tokens[-1])
    batches = [_pack([(trajectories[i], rewards[i]) for i in part], settings, most, row_tokens) for part in parts]
    values = None
    if estimator.of_turns:
        values = estimator.of_turns(reward_QGK, rewarded_QGK, algorithm)
    elif estimator.of_trajectories:
        values = estimator.of_trajectories(reward_QGK[..., 0])
    if values is not None:
        values_NK = np.asarray(values).reshape(len(trajectories), -1)
        values = [packing.spread(values_NK[part], batch) for part, batch in zip(parts, batches, strict=True)]
    rows = sum(int(batch.micro_batches) for batch in batches) * c.micro_batch_rows
    statistics = {
        "updates": float(sum(bool(part) for part in parts)),
        "groups_without_variance": float(np.mean(~varied_Q)),
        "row_tokens": float(row_tokens),
        "row_utilisation": sum(int((b.segment > 0).sum()) for b in batches) / max(rows * row_tokens, 1),
    }
    return MiniBatches(batches, values, parts, statistics)


def _in_groups(trajectories, rewards, samples: int, *, turns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rewards as float32[Q, G, K], and bool[Q, G, K] where there is one; K = 1, and sums, without `turns`."""
    counts = [max(t.turn_count, 1) if turns else 1 for t in trajectories]
    if not turns:
        rewards = list(map(rewards_lib.amount, rewards))
    reward_NK = np.zeros((len(rewards), max(counts)), np.float32)
    rewarded_NK = np.zeros(reward_NK.shape, bool)
    for i, (reward, count) in enumerate(zip(rewards, counts, strict=True)):
        place = i, slice(count - np.size(reward), count)  # a number counts for the last turn
        reward_NK[place], rewarded_NK[place] = reward, True
    shape = -1, samples, max(counts)
    return reward_NK.reshape(shape), rewarded_NK.reshape(shape)


def _cut(varied_Q: np.ndarray, settings: settings_lib.Settings, step: int) -> tuple[list[list[int]], int]:
    """Indices of the trajectories of each mini-batch, and how many one has at most, so that shapes are constant.

    Mini-batches are slices of the groups in a random order: as they come, sorted by id, the questions of a data set
    are neighbours, and an update would see one set alone.
    """
    groups_QG = np.arange(len(varied_Q) * settings.rollout.samples).reshape(len(varied_Q), -1)
    order = np.random.default_rng((settings.seed, step)).permutation(len(groups_QG))
    kept = groups_QG[order[varied_Q[order]]] if settings.algorithm.drop_equal_groups else groups_QG[order]
    if settings.learner.minibatch_by == "trajectories":
        groups_QG, kept = groups_QG.reshape(-1, 1), kept.reshape(-1, 1)
    updates = settings.learner.updates_per_rollout
    parts = [sorted(part.reshape(-1).tolist()) for part in np.array_split(kept, updates)]
    return parts, -(-len(groups_QG) // updates) * groups_QG.shape[1]


def _pack(
    pairs: list[tuple[types.Trajectory, types.Worth]], settings: settings_lib.Settings, max_rows: int, row_tokens: int
) -> types.Batch:
    a, r = settings.algorithm, settings.rollout
    trajectories, rewards = [t for t, _ in pairs], [reward for _, reward in pairs]
    counts = [int(t.sampled.sum()) if a.mask_environment else len(t.tokens) - t.prompt_tokens for t in trajectories]
    constant_tokens = a.constant_tokens or (r.max_turns + 1) * r.max_turn_tokens
    weights = packing.loss_weights(counts, a.aggregation, constant_tokens=constant_tokens)
    return packing.pack(
        trajectories,
        rewards,
        row_tokens=row_tokens,
        micro_batch_rows=settings.learner.micro_batch_rows,
        max_rows=max_rows,
        mask_environment=a.mask_environment,
        weights=[np.full(len(t.tokens), w, np.float32) for t, w in zip(trajectories, weights, strict=True)],
    )
