"""Advantages against sums written out over the tokens that the policy wrote."""

import by_hand
import jax
import numpy as np
import pytest

from searchr1_jax.data import packing
from searchr1_jax.learning import advantages


@pytest.fixture
def rows():
    """reward, value, mask, segment, each [4, 18]; rewards and values are not zero outside the mask either."""
    mask, segment = by_hand.packed_rows()
    reward, value = np.random.default_rng(0).standard_normal((2, *mask.shape)).astype(np.float32)
    return reward, value, mask, segment


def _by_trajectory(formula, arrays, mask, segment, **constants):
    expected = np.zeros(mask.shape)
    for row, places, written in by_hand.each_trajectory(mask, segment):
        expected[row, places] = formula(*(x[row, places] for x in arrays), written, **constants)
    return expected


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 1.0), (1.0, 0.9), (0.95, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_gae_is_the_sum_over_the_written_tokens_of_each_packed_trajectory(rows, discount, gae_lambda):
    reward, value, mask, segment = rows
    constants = dict(discount=discount, gae_lambda=gae_lambda)
    expected = _by_trajectory(by_hand.gae, (reward, value), mask, segment, **constants)
    np.testing.assert_allclose(advantages.gae(*rows, by_hand.algorithm(**constants)), expected, atol=2e-6)


def test_without_discount_and_decay_the_advantage_is_what_is_still_to_come_minus_the_value(rows):
    reward, value, mask, segment = rows
    actual = advantages.gae(*rows, by_hand.algorithm())
    for row, t in np.argwhere(mask):
        later = mask[row] & (segment[row] == segment[row, t]) & (np.arange(mask.shape[1]) >= t)
        np.testing.assert_allclose(actual[row, t], reward[row, later].sum() - value[row, t], atol=2e-6)


def test_gae_ignores_whatever_stands_outside_the_mask(rows):
    reward, value, mask, segment = rows
    constants = by_hand.algorithm(discount=0.9, gae_lambda=0.8)
    spoilt = [np.where(mask, x, np.nan).astype(np.float32) for x in (reward, value)]
    expected = advantages.gae(*rows, constants)
    np.testing.assert_array_equal(advantages.gae(*spoilt, mask, segment, constants), expected)
    assert not np.any(np.asarray(expected)[~mask])


def test_retrieved_tokens_between_two_turns_do_not_decay_a_reward():
    reward, value = np.array([[0, 0, 0, 0, 8.0]], np.float32), np.zeros((1, 5), np.float32)
    mask, segment = np.array([[True, False, False, False, True]]), np.ones((1, 5), np.int32)
    actual = advantages.gae(reward, value, mask, segment, by_hand.algorithm(discount=0.5, gae_lambda=0.5))
    np.testing.assert_array_equal(actual, [[2.0, 0, 0, 0, 8.0]])  # one written token later: 8 · γλ


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_are_the_discounted_rewards_of_the_written_tokens_still_to_come(rows, discount):
    reward, value, mask, segment = rows
    constants = by_hand.algorithm(discount=discount, gae_lambda=0.5)  # λ is GAE's
    expected = _by_trajectory(by_hand.returns, (reward,), mask, segment, discount=discount)
    np.testing.assert_allclose(advantages.returns(*rows, constants), expected, atol=2e-6)
    spoilt = np.where(mask, reward, np.nan).astype(np.float32)
    actual = advantages.returns(spoilt, value, mask, segment, constants)
    assert not np.any(np.asarray(actual)[~mask])
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_gae_takes_a_turns_reward_where_the_turn_ends():
    """Trajectories of two, one and three turns, rewarded turn by turn or, the second, with a number."""
    rewards = [[0.5, 1.0], 2.0, [-1.0, 0.0, 3.0]]
    trajectories = by_hand.trajectories(seed=0, layouts=((3, 2, 1, 3), (2, 4), (1, 2, 2, 1, 1, 2)))
    batch = packing.pack(trajectories, rewards, row_tokens=12, micro_batch_rows=2, max_rows=3)
    value = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    constants = dict(discount=0.9, gae_lambda=0.8)
    each_micro_batch = jax.vmap(lambda *arrays: advantages.gae(*arrays, by_hand.algorithm(**constants)))
    actual = each_micro_batch(batch.reward, value, batch.policy_mask, batch.segment)
    last_tokens = [[4, 8], [5], [2, 5, 8]]
    for i, (t, places) in enumerate(zip(trajectories, last_tokens, strict=True)):
        received = np.zeros(len(t.tokens))
        received[places] = rewards[i]
        expected = by_hand.gae(received, value[batch.trajectory == i], np.flatnonzero(t.sampled), **constants)
        np.testing.assert_allclose(np.asarray(actual)[batch.trajectory == i], expected, atol=2e-6)


def test_reinforce_pp_whitens_returns_with_the_penalty_over_all_written_tokens():
    outcome, kl = np.float32([[0, 0, 0, 1, 0, 3]]), np.float32([[9, 1, 9, 2, 2, 1]])
    mask, segment = np.array([[False, True, False, True, True, True]]), np.int32([[1, 1, 1, 1, 2, 2]])
    returns = advantages.returns(outcome - 0.5 * kl, 0 * kl, mask, segment, by_hand.algorithm())
    actual = advantages.whiten(returns, mask)
    # Returns -0.5, 0; 1.5, 2.5: mean 0.875, variance (1.375² + 0.875² + 0.625² + 1.625²) / 4 = 1.421875.
    expected = np.array([[0, -1.375, 0, -0.875, 0.625, 1.625]]) / np.sqrt(1.421875)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_whitening_is_over_the_masked_entries_of_all_rows_with_the_biased_variance():
    x = np.array([[1.0, 1e6, 3.0], [np.nan, 5.0, 7.0]], np.float32)
    mask = np.array([[True, False, True], [False, True, True]])
    expected = np.array([[-3, 0, -1], [0, 1, 3]]) / np.sqrt(5)  # mean 4, variance (9 + 1 + 1 + 9) / 4
    np.testing.assert_allclose(advantages.whiten(x, mask), expected, rtol=1e-6)


def test_whitening_equal_numbers_or_nothing_gives_zero():
    same = np.full((2, 3), 0.25, np.float32)
    np.testing.assert_array_equal(advantages.whiten(same, np.ones((2, 3), bool)), 0 * same)
    np.testing.assert_array_equal(advantages.whiten(same, np.zeros((2, 3), bool)), 0 * same)


OF_TRAJECTORIES = {name: row.of_trajectories for name, row in advantages.ADVANTAGES.items() if row.of_trajectories}


def test_group_advantages_of_small_groups():
    reward = np.array([[0, 0, 1], [1, 3, 5], [1, 1, 1], [0, 0, 0]], np.float32)
    third = np.sqrt(1 / 3)  # the unbiased std of the first: ((1/9 + 1/9 + 4/9) / 2) under the root
    expected = {
        "group_standardised": [[-1 / 3 / third, -1 / 3 / third, 2 / 3 / third], [-1, 0, 1]],
        "group_mean": [[-1 / 3, -1 / 3, 2 / 3], [-2, 0, 2]],
        "leave_one_out": [[-1 / 2, -1 / 2, 1], [-3, 0, 3]],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            OF_TRAJECTORIES[name](reward), [*values, [0, 0, 0], [0, 0, 0]], atol=1e-5, err_msg=name
        )
    np.testing.assert_array_equal(OF_TRAJECTORIES["reward"](reward), reward)


@pytest.mark.parametrize("name", OF_TRAJECTORIES)
@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_group_advantages_are_the_papers_formulas(name, samples):
    reward = np.random.default_rng(samples).standard_normal((6, samples)).astype(np.float32)
    expected = [by_hand.group_advantages(name, row) for row in reward.astype(np.float64).tolist()]
    np.testing.assert_allclose(OF_TRAJECTORIES[name](reward), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(set(OF_TRAJECTORIES) - {"reward"}))
@pytest.mark.parametrize("samples", [2, 3, 5, 7])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(name, samples):
    reward = np.repeat(np.float32([[0.1], [0.7], [1.1]]), samples, axis=1)
    np.testing.assert_array_equal(OF_TRAJECTORIES[name](reward), 0 * reward)
    assert not np.any(has_variance(reward))


@pytest.mark.parametrize("name", OF_TRAJECTORIES)
def test_a_group_of_one_keeps_its_reward(name):
    reward = np.array([[0.0], [1.0], [-0.2]], np.float32)
    np.testing.assert_array_equal(jax.device_get(OF_TRAJECTORIES[name](reward)), reward)


def has_variance(reward_QG):
    return advantages.has_variance(reward_QG[..., None], np.ones((*reward_QG.shape, 1), bool))


def test_a_group_has_variance_where_one_reward_differs_from_the_others():
    reward = np.float32([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0.8, 0.8, 0.8], [np.nan, 0, 0]])
    np.testing.assert_array_equal(has_variance(reward), [False, True, True, False, True])
    np.testing.assert_array_equal(has_variance(reward[:4, :1]), [False] * 4)


def test_turns_have_variance_where_rewards_of_any_of_them_differ_whatever_stands_where_there_is_none():
    rewarded = np.array([[[True, True], [True, False]], [[False, True], [True, False]]])
    alike, differing = (
        np.float32([[[2, 2], [2, 7]], [[7, 3], [3, 7]]]),
        np.float32([[[2, 1], [2, 2]], [[3, 3], [1, 3]]]),
    )
    np.testing.assert_array_equal(advantages.has_variance(alike, rewarded), [False, False])
    np.testing.assert_array_equal(advantages.has_variance(differing, rewarded), [True, True])


# Advantages of turns.


def _turn_returns(rewards, *, discount=1.0):
    """Of one question, whose samples are rewarded with a number (after so many turns) or one number a turn."""
    turns = [len(r) if isinstance(r, list) else r[0] for r in rewards]
    reward, rewarded = (
        np.zeros((1, len(rewards), max(turns)), np.float32),
        np.zeros((1, len(rewards), max(turns)), bool),
    )
    for sample, (given, count) in enumerate(zip(rewards, turns, strict=True)):
        values = given if isinstance(given, list) else [given[1]]
        reward[0, sample, count - len(values) : count] = values
        rewarded[0, sample, count - len(values) : count] = True
    (advantage,) = advantages.turn_returns(reward, rewarded, by_hand.algorithm(discount=discount))
    return [row[:count].tolist() for row, count in zip(advantage, turns, strict=True)]


def test_turn_returns_add_up_the_standardised_rewards_still_to_come():
    """Rewards 0, 1; 1; 0, 0, 1: mean ½, unbiased variance 6 · ¼ / 5."""
    unit = 0.5 / (0.3**0.5 + 1e-6)
    expected = {1.0: [[0, 1], [1], [-1, 0, 1]], 0.5: [[-0.5, 1], [1], [-1.25, -0.5, 1]]}
    for discount, units in expected.items():
        actual = _turn_returns([[0, 1], [1], [0, 0, 1]], discount=discount)
        for mine, slow in zip(actual, units, strict=True):
            np.testing.assert_allclose(mine, np.array(slow) * unit, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("discount", [1.0, 0.8, 0.0])
def test_turn_returns_are_the_formula(seed, discount):
    rng = np.random.default_rng(seed)
    rewards = [rng.standard_normal(rng.integers(1, 5)).astype(np.float32).tolist() for _ in range(4)]
    expected = by_hand.turn_returns(rewards, discount=discount)
    for mine, slow in zip(_turn_returns(rewards, discount=discount), expected, strict=True):
        np.testing.assert_allclose(mine, slow, rtol=2e-5, atol=2e-6)


def test_with_one_reward_at_the_end_and_no_discount_every_turn_has_the_advantage_of_grpo():
    rewards, turns = np.float32([0.0, 1.0, 0.3, 1.0]), (3, 1, 2, 2)
    grpo = advantages.group_standardised(rewards[None])[0]
    for row, advantage, count in zip(_turn_returns(list(zip(turns, rewards))), grpo, turns, strict=True):
        np.testing.assert_allclose(row, [advantage] * count, rtol=1e-6)
    discounted = _turn_returns(list(zip(turns, rewards)), discount=0.5)
    np.testing.assert_allclose(discounted[0], grpo[0] * np.float32([0.25, 0.5, 1]), rtol=1e-6)


def test_equal_rewards_of_turns_give_exactly_zero_and_a_group_of_one_keeps_its_rewards():
    assert _turn_returns([[0.1, 0.1], [0.1], [0.1] * 3]) == [[0, 0], [0], [0, 0, 0]]
    assert _turn_returns([[1.0, 0.5, 2.0]]) == [[3.5, 2.5, 2.0]]


@pytest.mark.parametrize("fields", [{}, {"of_tokens": max, "of_turns": max}, {"of_turns": max, "needs_value": True}])
def test_a_row_that_cannot_be_estimated_is_refused(fields):
    with pytest.raises(ValueError, match="give it one of of_tokens, of_trajectories and of_turns"):
        advantages.Advantage(**fields)


def test_a_name_of_something_else_is_refused():
    with pytest.raises(ValueError, match="algorithm.advantage names 'json:dumps', which is .*; make it a .*Advantage"):
        advantages.find("json:dumps")
