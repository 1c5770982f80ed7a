"""Trajectories packed into rows of one length: the batch that learning sees.

    trajectories ─ first_fit ─▶ rows ─ pack ─▶ Batch, M micro-batches of B rows of T tokens

        row      prompt policy info policy │ prompt policy │ empty
        segment    1 1    1 1   1 1   1 1  │   2 2   2 2   │ 0 0 0
        mask       0 0    1 1   0 0   1 1  │   0 0   1 1   │ 0 0 0
        turn      -1-1    0 0  -1-1   1 1  │  -1-1   0 0   │-1-1-1
        reward     0 0    0 r   0 0   0 r  │   0 0   0 r   │ 0 0 0

M is the worst case, one trajectory a row, so that shapes are constant; `micro_batches` says how many are in
use, and nothing is computed for the others.
"""

from typing import Sequence

import jax
import numpy as np

from searchr1_jax.core import types
from searchr1_jax.text import rewards as rewards_lib

jax.tree_util.register_dataclass(types.Batch)

_EMPTY = {  # what stands in the places of no trajectory
    "tokens": np.int32(0), "segment": np.int32(0), "position": np.int32(0), "policy_mask": np.False_,
    "sampled": np.False_, "response": np.False_, "behaviour_logp": np.float32(0), "turn": np.int32(-1),
    "reward": np.float32(0), "weight": np.float32(0), "trajectory": np.int32(-1),
}  # fmt: skip


def first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows as lists of indices: longest first, each into the first row that has room (Johnson, 1973).

    ValueError where one does not fit into a row of its own.
    """
    if lengths and max(lengths) > row_tokens:
        raise ValueError(
            f"a trajectory of {max(lengths)} tokens does not fit a row of {row_tokens}; raise learner.row_tokens"
            " to at least rollout.context_tokens"
        )
    rows: list[list[int]] = [[] for _ in lengths]
    room = [row_tokens] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next(r for r, left in enumerate(room) if left >= lengths[i])
        rows[row].append(i)
        room[row] -= lengths[i]
    return [row for row in rows if row]


def pack(
    trajectories: Sequence[types.Trajectory],
    rewards: Sequence[types.Worth],
    *,
    row_tokens: int,
    micro_batch_rows: int,
    max_rows: int,
    mask_environment: bool = True,
    weights: Sequence[np.ndarray] | None = None,
) -> types.Batch:
    """A batch on the host; ValueError where a trajectory is longer than a row, or the rows do not suffice.

    Args:
      rewards: of each trajectory. One of a turn is put on the turn's last masked token, or, where it has none, on the
        last one before; a number on the last of all.
      max_rows: rows to reserve; the batch has ⌈max_rows / micro_batch_rows⌉ micro-batches.
      mask_environment: learn from the policy's own tokens only. False is an ablation: everything after the
        prompt then counts as the policy's, a reply as written by the turn that it answers.
      weights: loss weight of every token of every trajectory, float32[T] each; 1 where not given.
    """
    rows = first_fit([len(t.tokens) for t in trajectories], row_tokens)
    if len(rows) > max_rows:
        raise ValueError(f"{len(trajectories)} trajectories fill {len(rows)} rows, more than the {max_rows} reserved")
    micro_batches = -(-max_rows // micro_batch_rows)
    shape = (micro_batches * micro_batch_rows, row_tokens)
    arrays = {name: np.full(shape, value) for name, value in _EMPTY.items()}
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, start=1):
            t, position = trajectories[i], np.arange(len(trajectories[i].tokens))
            response = position >= t.prompt_tokens
            mask = t.sampled if mask_environment else response
            turn = np.where(mask, np.maximum.accumulate(t.turn).clip(0), -1)
            placed = {
                "tokens": t.tokens, "segment": segment, "position": position, "policy_mask": mask,
                "sampled": t.sampled, "response": response, "behaviour_logp": t.behaviour_logp, "turn": turn,
                "reward": _reward(rewards[i], turn), "weight": 1.0 if weights is None else weights[i], "trajectory": i,
            }  # fmt: skip
            for name, values in placed.items():
                arrays[name][r, start : start + len(position)] = values
            start += len(position)
    folded = {name: x.reshape(micro_batches, micro_batch_rows, row_tokens) for name, x in arrays.items()}
    return types.Batch(**folded, micro_batches=np.int32(-(-len(rows) // micro_batch_rows)))


def _reward(reward: types.Worth, turn: np.ndarray) -> np.ndarray:
    """float32[T], the rewards of a trajectory on the tokens of its turns."""
    placed = np.zeros(len(turn), np.float32)
    each = rewards_lib.by_turn(reward)
    of_turns = {int(turn.max(initial=-1)): rewards_lib.amount(reward)} if each is None else dict(enumerate(each))
    for k, value in of_turns.items():
        places = np.flatnonzero((turn >= 0) & (turn <= k))
        placed[places[-1:]] += value
    return placed


def loss_weights(counts: Sequence[int], aggregation: str, *, constant_tokens: int) -> np.ndarray:
    """What each masked token of each trajectory weighs in the loss Σ w l; float32[N].

        token_mean     1 / Σ n                every token alike (DAPO; Yu et al., 2025, eq. 8)
        sequence_mean  1 / (N nᵢ)             every trajectory alike (GRPO; Shao et al., 2024, eq. 3)
        constant       1 / (N constant)       as many tokens, as much weight, whatever the others (Liu et al., 2025)

    nᵢ are the `counts` of masked tokens of the N trajectories of a mini-batch.
    """
    n = np.maximum(np.asarray(counts, np.float64), 1)
    if aggregation == "token_mean":
        return np.full(len(n), 1 / max(sum(counts), 1), np.float32)
    if aggregation == "sequence_mean":
        return (1 / (len(n) * n)).astype(np.float32)
    return np.full(len(n), 1 / (max(len(n), 1) * constant_tokens), np.float32)


def spread(values_NK: np.ndarray, batch: types.Batch) -> np.ndarray:
    """Values of turns as values of their tokens, float32[M, B, T]; zero where the mask is False.

    `values_NK` are of the N trajectories that were packed: one a turn, or (K = 1) one for all turns of each.
    """
    values_NK = np.pad(np.asarray(values_NK, np.float32), ((0, 1), (0, 0)))  # index -1 is empty space
    turn = np.minimum(batch.turn, values_NK.shape[1] - 1)
    return np.where(batch.policy_mask, values_NK[batch.trajectory, turn], np.float32(0))
