"""Rows that are never over-full, and a batch drawn by hand."""

import random

import jax
import numpy as np
import pytest

from searchr1_jax.core import types
from searchr1_jax.data import packing


def trajectory(tokens, sampled, prompt_tokens, logp=None, turns=()):
    tokens = np.array(tokens, np.int32)
    return types.Trajectory(
        example=types.QAExample(id="q", question="?", golden_answers=()),
        sample=0,
        tokens=tokens,
        sampled=np.array(sampled, bool),
        behaviour_logp=np.zeros(len(tokens), np.float32) if logp is None else np.array(logp, np.float32),
        prompt_tokens=prompt_tokens,
        turns=tuple(types.Turn(text="", event="invalid", tokens=count) for count in turns),
        stop_reason="no_action",
        answer=None,
    )


# Longest first: c takes the first row, a does not fit there, b does not fit there either but stands behind a.
A = trajectory([11, 12, 13, 14, 15], [0, 0, 1, 1, 0], 2, [0, 0, -0.5, -0.25, 0])
B = trajectory([21, 22, 23], [0, 1, 1], 1, [0, -1, -2])
C = trajectory([31, 32, 33, 34, 35, 36], [0, 0, 0, 1, 0, 1], 3, [0, 0, 0, -3, 0, -4])
LIMITS = dict(row_tokens=8, micro_batch_rows=2, max_rows=3)


def pack(trajectories=(A, B, C), rewards=(1.0, 0.5, -1.0), **settings):
    return packing.pack(trajectories, rewards, **{**LIMITS, **settings})


def test_the_batch_drawn_by_hand():
    batch = pack()
    drawn = {
        "tokens": [[31, 32, 33, 34, 35, 36, 0, 0], [11, 12, 13, 14, 15, 21, 22, 23]],
        "segment": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2]],
        "position": [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]],
        "policy_mask": [[0, 0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]],
        "sampled": [[0, 0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]],
        "response": [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1, 1]],
        "behaviour_logp": [[0, 0, 0, -3, 0, -4, 0, 0], [0, 0, -0.5, -0.25, 0, 0, -1, -2]],
        "turn": [[-1, -1, -1, 0, -1, 1, -1, -1], [-1, -1, 0, 0, -1, -1, 0, 0]],
        "reward": [[0, 0, 0, 0, 0, -1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0.5]],
        "weight": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
        "trajectory": [[2, 2, 2, 2, 2, 2, -1, -1], [0, 0, 0, 0, 0, 1, 1, 1]],
    }
    kinds = {"policy_mask": bool, "sampled": bool, "behaviour_logp": np.float32, "reward": np.float32}
    kinds |= {"response": bool, "weight": np.float32}
    for name, rows in drawn.items():
        field = getattr(batch, name)
        assert field.shape == (2, 2, 8) and field.dtype == kinds.get(name, np.int32), name
        np.testing.assert_array_equal(field[0], rows, err_msg=name)
        np.testing.assert_array_equal(field[1], -1 if name in ("trajectory", "turn") else 0, err_msg=name)
    assert batch.micro_batches == 1 and batch.micro_batches.dtype == np.int32


def test_without_the_mask_everything_after_the_prompt_counts_as_the_policys():
    batch = pack(mask_environment=False)
    np.testing.assert_array_equal(batch.policy_mask[0], [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1, 1]])
    np.testing.assert_array_equal(batch.sampled, pack().sampled)
    # A reply belongs to the turn that it answers.
    np.testing.assert_array_equal(batch.turn[0], [[-1, -1, -1, 0, 0, 1, -1, -1], [-1, -1, 0, 0, 0, -1, 0, 0]])
    np.testing.assert_array_equal(batch.reward[0], [[0, 0, 0, 0, 0, -1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0.5]])


def test_loss_weights_of_nothing_written_are_finite():
    for aggregation in ("token_mean", "sequence_mean", "constant"):
        weights = packing.loss_weights([0, 0], aggregation, constant_tokens=5)
        assert weights.dtype == np.float32 and np.isfinite(weights).all()
        assert packing.loss_weights([], aggregation, constant_tokens=5).shape == (0,)


def test_weights_stand_at_their_tokens():
    weights = [np.arange(len(t.tokens), dtype=np.float32) + 10 * i for i, t in enumerate((A, B, C), start=1)]
    np.testing.assert_array_equal(
        pack(weights=weights).weight[0], [[30, 31, 32, 33, 34, 35, 0, 0], [10, 11, 12, 13, 14, 20, 21, 22]]
    )


def test_a_trajectory_without_sampled_tokens_has_no_place_for_its_reward():
    silent = trajectory([1, 2], [0, 0], 2)
    batch = pack((silent, B), (7.0, 0.5))
    np.testing.assert_array_equal(batch.reward[0, 0], [0, 0, 0.5, 0, 0, 0, 0, 0])
    assert batch.reward.sum() == 0.5


# One row: five turns, of which the fourth was not replied to and the third has no token.
TURNS = trajectory(range(10, 20), [0, 1, 1, 0, 1, 1, 0, 1, 1, 1], 1, turns=(2, 2, 0, 1, 2))


@pytest.mark.parametrize(
    "reward, placed",
    [
        (3.0, [0, 0, 0, 0, 0, 0, 0, 0, 0, 3]),
        ([1.0, 2.0, 4.0, 8.0, 16.0], [0, 0, 1, 0, 0, 2 + 4, 0, 8, 0, 16]),  # the third's on the token before it
        (np.float32([0, 0, 0, 0, 0.5]), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]),
    ],
)
def test_a_turns_reward_stands_on_its_last_token_and_a_number_is_the_last_turns(reward, placed):
    batch = pack((TURNS,), (reward,), row_tokens=10)
    np.testing.assert_array_equal(batch.turn[0, 0], [-1, 0, 0, -1, 1, 1, -1, 3, 4, 4])
    np.testing.assert_array_equal(batch.reward[0, 0], placed)
    assert TURNS.turn_count == 5


def test_where_replies_count_as_the_policys_a_turns_reward_stands_behind_its_reply():
    batch = pack((TURNS,), ([1.0, 2.0, 4.0, 8.0, 16.0],), row_tokens=10, mask_environment=False)
    np.testing.assert_array_equal(batch.turn[0, 0], [-1, 0, 0, 0, 1, 1, 1, 3, 4, 4])
    np.testing.assert_array_equal(batch.reward[0, 0], [0, 0, 0, 1, 0, 0, 2 + 4, 8, 0, 16])


def test_values_of_trajectories_are_spread_over_their_masked_tokens():
    spread = packing.spread(np.array([[0.5], [2], [-3]]), pack())
    drawn = [[[0, 0, 0, -3, 0, -3, 0, 0], [0, 0, 0.5, 0.5, 0, 0, 2, 2]], np.zeros((2, 8))]
    np.testing.assert_array_equal(spread, drawn)
    assert spread.dtype == np.float32


def test_values_of_turns_are_spread_over_the_tokens_of_each():
    spread = packing.spread(np.array([[0.5, 9], [2, 9], [-3, -4]]), pack())
    np.testing.assert_array_equal(spread[0], [[0, 0, 0, -3, 0, -4, 0, 0], [0, 0, 0.5, 0.5, 0, 0, 2, 2]])


@pytest.mark.parametrize(
    "trajectories, max_rows, reserved, used",
    [(1, 1, 1, 1), (1, 5, 3, 1), (2, 5, 3, 1), (3, 5, 3, 2), (5, 5, 3, 3), (4, 4, 2, 2), (0, 4, 2, 0)],
)
def test_micro_batches_are_reserved_for_all_rows_and_counted_where_used(trajectories, max_rows, reserved, used):
    batch = pack([C] * trajectories, [0.0] * trajectories, max_rows=max_rows)
    assert batch.tokens.shape == (reserved, 2, 8)
    assert batch.micro_batches == used


def test_a_batch_is_a_tree_of_twelve_arrays():
    assert len(jax.tree.leaves(pack())) == 12


def test_rows_that_do_not_suffice_are_refused():
    with pytest.raises(ValueError, match="3 trajectories fill 2 rows, more than the 1 reserved"):
        pack(max_rows=1)


def test_a_trajectory_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a trajectory of 6 tokens does not fit a row of 5; raise learner.row_tokens"):
        pack(row_tokens=5)


def test_first_fit_takes_the_longest_first_and_the_first_row_with_room():
    #                                0  1  2  3  4  5      rows: 7+3 · 6+4 · 5+3
    assert packing.first_fit([3, 5, 7, 4, 6, 3], 10) == [[2, 0], [4, 3], [1, 5]]
    assert packing.first_fit([], 10) == []
    assert packing.first_fit([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_over_full_and_none_has_room_for_what_stands_in_a_later_one(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 60))]
    rows = packing.first_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    left = [40 - sum(lengths[i] for i in row) for row in rows]
    assert min(left) >= 0
    for r in range(len(rows)):
        for later in rows[r + 1 :]:
            assert left[r] < min(lengths[i] for i in later)


@pytest.mark.parametrize("seed", range(5))
def test_every_token_of_every_trajectory_is_in_the_batch_once(seed):
    rng = np.random.default_rng(seed)
    trajectories = []
    for _ in range(17):
        length = int(rng.integers(2, 30))
        prompt = int(rng.integers(1, length))
        sampled = (rng.random(length) < 0.6) & (np.arange(length) >= prompt)
        trajectories.append(trajectory(rng.integers(1, 99, length), sampled, prompt, -rng.random(length) * sampled))
    batch = pack(trajectories, rng.random(17), row_tokens=32, micro_batch_rows=4, max_rows=17)
    for i, t in enumerate(trajectories):
        places = np.argwhere(batch.trajectory == i)
        assert len(places) == len(t.tokens) and len({(m, b) for m, b, _ in places}) == 1
        place = tuple(places.T)
        for name in ("tokens", "sampled", "behaviour_logp"):
            np.testing.assert_array_equal(getattr(batch, name)[place], getattr(t, name))
        np.testing.assert_array_equal(batch.position[place], np.arange(len(t.tokens)))
        assert len(set(batch.segment[place])) == 1
    empty = batch.trajectory == -1
    assert empty.sum() == batch.tokens.size - sum(len(t.tokens) for t in trajectories)
    for name in ("tokens", "segment", "position", "policy_mask", "sampled", "reward", "weight"):
        assert not getattr(batch, name)[empty].any(), name
