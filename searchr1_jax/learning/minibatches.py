"""From the trajectories of a rollout to the mini-batches that are learned from, one update each.

trajectories, scores ─ groups of a question's samples ─▶ those worth learning from
    ─ cut into mini-batches ─▶ packed rows, loss weights, advantages of whole trajectories
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Sequence

import numpy as np

from searchr1_jax.core import types
from searchr1_jax.data import packing
from searchr1_jax.learning import advantages

CUTS = ("questions", "trajectories")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How mini-batches are made."""

    samples: int  # trajectories of a question
    updates: int  # mini-batches of a rollout
    minibatch_by: str  # of CUTS; "questions" keeps the samples of a question together
    drop_equal_groups: bool  # leave out questions whose samples were all rewarded alike
    advantage: str  # a key of advantages.GROUPED; any other is estimated token by token, later
    aggregation: str  # of packing.AGGREGATIONS
    constant_tokens: int  # of the aggregation "constant"
    mask_environment: bool
    row_tokens: tuple[int, ...]  # lengths that rows may have, ascending; the shortest that holds everything is taken
    micro_batch_rows: int

    def __post_init__(self):
        for key, value, choices in (
            ("learner.minibatch_by", self.minibatch_by, CUTS),
            ("algorithm.aggregation", self.aggregation, packing.AGGREGATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{key} is {value!r}; choose from {list(choices)}")


class MiniBatches(NamedTuple):
    """A rollout as its updates see it; lists of `updates` entries, an update that learns nothing has an empty batch."""

    batches: list[types.Batch]  # on the host; all of one shape
    advantages: list[np.ndarray] | None  # float32[M, B, T] each; None where they are estimated token by token
    learned: list[list[int]]  # indices of the trajectories in each
    statistics: dict[str, float]


def make(trajectories: Sequence[types.Trajectory], scores: Sequence[float], recipe: Recipe) -> MiniBatches:
    """The mini-batches of sorted trajectories, in which the samples of a question are neighbours."""
    r, total = recipe, len(trajectories)
    by_group = np.asarray(scores, np.float32).reshape(-1, r.samples)
    varied = np.asarray(advantages.has_variance(by_group))
    groups = np.arange(total).reshape(-1, r.samples)
    kept = groups[varied] if r.drop_equal_groups else groups
    if r.minibatch_by == "trajectories":
        groups, kept = groups.reshape(-1, 1), kept.reshape(-1, 1)
    parts = [part.reshape(-1).tolist() for part in np.array_split(kept, r.updates)]
    most = -(-len(groups) // r.updates) * groups.shape[1]  # whatever is left out, so that shapes are constant
    longest = max((len(trajectories[i].tokens) for part in parts for i in part), default=0)
    row_tokens = next((n for n in r.row_tokens if n >= longest), r.row_tokens[-1])
    batches = [_pack([(trajectories[i], scores[i]) for i in part], r, most, row_tokens) for part in parts]
    values = None
    if r.advantage in advantages.GROUPED:
        values = np.asarray(advantages.GROUPED[r.advantage](by_group)).reshape(-1)
        values = [packing.spread(values[part], batch) for part, batch in zip(parts, batches, strict=True)]
    rows = sum(int(batch.micro_batches) for batch in batches) * r.micro_batch_rows
    statistics = {
        "updates": float(sum(bool(part) for part in parts)),
        "groups_without_variance": float(np.mean(~varied)),
        "row_tokens": float(row_tokens),
        "row_utilisation": sum(int((b.segment > 0).sum()) for b in batches) / max(rows * row_tokens, 1),
    }
    return MiniBatches(batches, values, parts, statistics)


def _pack(pairs: list[tuple[types.Trajectory, float]], r: Recipe, max_rows: int, row_tokens: int) -> types.Batch:
    trajectories, scores = [t for t, _ in pairs], [score for _, score in pairs]
    counts = [int(t.sampled.sum()) if r.mask_environment else len(t.tokens) - t.prompt_tokens for t in trajectories]
    weights = packing.loss_weights(counts, r.aggregation, constant_tokens=r.constant_tokens)
    return packing.pack(
        trajectories,
        scores,
        row_tokens=row_tokens,
        micro_batch_rows=r.micro_batch_rows,
        max_rows=max_rows,
        mask_environment=r.mask_environment,
        weights=[np.full(len(t.tokens), w, np.float32) for t, w in zip(trajectories, weights, strict=True)],
    )
