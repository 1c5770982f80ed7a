"""Losses against values worked out by hand."""

import jax
import numpy as np
import pytest

from searchr1_jax.learning import losses

# ratio, advantage, loss, clipped, gradient of the loss by log-prob; ε = 0.2
PPO_CASES = [
    (1.0, 2.0, -2.0, False, -2.0),
    (1.1, 2.0, -2.2, False, -2.2),
    (1.5, 2.0, -2.4, True, 0.0),  # a good token that is likelier already: no further
    (0.5, 2.0, -1.0, False, -1.0),  # a good token that got less likely: back
    (0.9, -2.0, 1.8, False, 1.8),
    (0.5, -2.0, 1.6, True, 0.0),  # a bad token that is rarer already: no further
    (1.5, -2.0, 3.0, False, 3.0),  # a bad token that got likelier: back
    (1.5, 0.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, loss, clipped, gradient", PPO_CASES)
def test_ppo_clip(ratio, advantage, loss, clipped, gradient):
    logp, old = np.float32(np.log(ratio) - 1.5), np.float32(-1.5)
    value, was_clipped = losses.ppo_clip(logp, old, np.float32(advantage), clip=0.2)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert bool(was_clipped) == clipped
    slope = jax.grad(lambda x: losses.ppo_clip(x, old, np.float32(advantage), clip=0.2)[0])(logp)
    np.testing.assert_allclose(slope, gradient, rtol=1e-6)


@pytest.mark.parametrize(
    "value, old, target, loss",
    [
        (1.2, 1.0, 2.0, 0.32),  # inside the clip: ½ · 0.8²
        (2.0, 1.0, 3.0, 1.125),  # near is 1.5, farther from the target than the value: ½ · 1.5²
        (2.0, 1.0, 0.0, 2.0),  # near is 1.5, closer to the target: the value counts, ½ · 2²
        (0.0, 1.0, -1.0, 1.125),  # near is 0.5: ½ · 1.5²
    ],
)
def test_clipped_value(value, old, target, loss):
    np.testing.assert_allclose(losses.clipped_value(value, old, target, clip=0.5), loss, rtol=1e-6)


def test_a_value_that_moved_beyond_the_clip_towards_its_target_learns_nothing_more():
    slope = jax.grad(lambda value: losses.clipped_value(value, 1.0, 3.0, clip=0.5))
    assert slope(2.0) == 0.0 and slope(1.25) == -1.75


def test_k1_is_the_difference_of_log_probs():
    np.testing.assert_array_equal(losses.kl_k1(np.float32([-1, -3]), np.float32([-2, -1])), [1, -2])


def test_k3_is_never_negative_and_zero_at_equality():
    logp, reference = np.float32([-2, -2, -2]), np.float32(-2 + np.log([0.5, 2, 1]))
    expected = [0.5 - 1 + np.log(2), 2 - 1 - np.log(2), 0]  # r − 1 − log r for r = ½, 2, 1
    np.testing.assert_allclose(losses.kl_k3(logp, reference), expected, atol=1e-6)


def test_k3_is_clamped_to_ten_where_its_gradient_ends():
    assert losses.kl_k3(-50.0, -1.0) == 10
    assert jax.grad(losses.kl_k3)(-50.0, -1.0) == 0
    np.testing.assert_allclose(losses.kl_k3(-9.0, -12.0), np.exp(-3) + 2, rtol=1e-6)


def test_k1_and_k3_estimate_the_same_divergence():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    exact = (p * np.log(p / q)).sum()
    for estimator in (losses.kl_k1, losses.kl_k3):
        np.testing.assert_allclose((p * estimator(np.log(p), np.log(q))).sum(), exact, rtol=1e-6)


def test_a_masked_sum_takes_nothing_from_outside_the_mask():
    x, mask = np.float32([1, np.nan, 4, np.inf]), np.array([True, False, True, False])
    assert losses.masked_sum(x, mask) == 5
    np.testing.assert_array_equal(jax.grad(losses.masked_sum)(x, mask), [1, 0, 1, 0])
