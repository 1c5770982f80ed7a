"""Advantages against sums written out over the tokens that the policy wrote."""

import by_hand
import jax
import numpy as np
import pytest

from searchr1_jax.learning import advantages

# Two rows of packed trajectories (the numbers of the segments) and one empty row; W: the policy's, .: not.
MASKS = ("..WWW..WW.W...WW.W", "WW...W.W..........", "..................")
SEGMENTS = ("111111111112222222", "111112223333000000", "000000000000000000")


@pytest.fixture
def rows():
    """reward, value, mask, segment, each [3, 18]; rewards and values are not zero outside the mask either."""
    rng = np.random.default_rng(0)
    mask = np.array([[letter == "W" for letter in row] for row in MASKS])
    segment = np.array([[int(digit) for digit in row] for row in SEGMENTS], np.int32)
    reward, value = rng.standard_normal((2, *mask.shape)).astype(np.float32)
    return reward, value, mask, segment


def _by_trajectory(reward, value, mask, segment, **constants):
    expected = np.zeros(mask.shape)
    for row in range(len(mask)):
        for number in range(1, segment[row].max() + 1):
            places = np.flatnonzero(segment[row] == number)
            written = [t for t, place in enumerate(places) if mask[row, place]]
            expected[row, places] = by_hand.gae(reward[row, places], value[row, places], written, **constants)
    return expected


@pytest.mark.parametrize(
    "discount, trace_decay", [(1.0, 1.0), (1.0, 0.9), (0.95, 1.0), (0.9, 0.7), (1.0, 0.0)]
)
def test_gae_is_the_sum_over_the_written_tokens_of_each_packed_trajectory(rows, discount, trace_decay):
    constants = dict(discount=discount, trace_decay=trace_decay)
    np.testing.assert_allclose(
        advantages.gae(*rows, **constants), _by_trajectory(*rows, **constants), atol=2e-6
    )


def test_without_discount_and_decay_the_advantage_is_what_is_still_to_come_minus_the_value(rows):
    reward, value, mask, segment = rows
    actual = advantages.gae(*rows, discount=1.0, trace_decay=1.0)
    for row, t in np.argwhere(mask):
        later = mask[row] & (segment[row] == segment[row, t]) & (np.arange(mask.shape[1]) >= t)
        np.testing.assert_allclose(actual[row, t], reward[row, later].sum() - value[row, t], atol=2e-6)


def test_gae_ignores_whatever_stands_outside_the_mask(rows):
    reward, value, mask, segment = rows
    constants = dict(discount=0.9, trace_decay=0.8)
    spoilt = [np.where(mask, x, np.nan).astype(np.float32) for x in (reward, value)]
    expected = advantages.gae(*rows, **constants)
    np.testing.assert_array_equal(advantages.gae(*spoilt, mask, segment, **constants), expected)
    assert not np.any(np.asarray(expected)[~mask])


def test_retrieved_tokens_between_two_turns_do_not_decay_a_reward():
    reward, value = np.array([[0, 0, 0, 0, 8.0]], np.float32), np.zeros((1, 5), np.float32)
    mask, segment = np.array([[True, False, False, False, True]]), np.ones((1, 5), np.int32)
    actual = advantages.gae(reward, value, mask, segment, discount=0.5, trace_decay=0.5)
    np.testing.assert_array_equal(actual, [[2.0, 0, 0, 0, 8.0]])  # one written token later: 8 · γλ


def test_whitening_is_over_the_masked_entries_of_all_rows_with_the_biased_variance():
    x = np.array([[1.0, 1e6, 3.0], [np.nan, 5.0, 7.0]], np.float32)
    mask = np.array([[True, False, True], [False, True, True]])
    expected = np.array([[-3, 0, -1], [0, 1, 3]]) / np.sqrt(5)  # mean 4, variance (9 + 1 + 1 + 9) / 4
    np.testing.assert_allclose(advantages.whiten(x, mask), expected, rtol=1e-6)


def test_whitening_equal_numbers_or_nothing_gives_zero():
    same = np.full((2, 3), 0.25, np.float32)
    np.testing.assert_array_equal(advantages.whiten(same, np.ones((2, 3), bool)), 0 * same)
    np.testing.assert_array_equal(advantages.whiten(same, np.zeros((2, 3), bool)), 0 * same)


def test_group_advantages_take_the_unbiased_standard_deviation_of_each_question():
    reward = np.array([[0, 0, 1], [1, 3, 5], [1, 1, 1], [0, 0, 0]], np.float32)
    third = np.sqrt(1 / 3)  # ((1/9 + 1/9 + 4/9) / 2) under the root
    expected = [[-1 / 3 / third, -1 / 3 / third, 2 / 3 / third], [-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(advantages.group_standardised(reward), expected, atol=1e-5)


@pytest.mark.parametrize("group", [2, 3, 5, 7])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(group):
    reward = np.repeat(np.float32([[0.1], [0.7], [1.1]]), group, axis=1)
    np.testing.assert_array_equal(advantages.group_standardised(reward), 0 * reward)


def test_a_group_of_one_keeps_its_reward():
    reward = np.array([[0.0], [1.0], [-0.2]], np.float32)
    np.testing.assert_array_equal(jax.device_get(advantages.group_standardised(reward)), reward)
