"""Losses against values worked out by hand."""

import functools
import math

import by_hand
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from searchr1_jax.core import parallel
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


PPO = dict(clip_low=0.2, clip_high=0.2, dual_clip=0.0)
DAPO = dict(clip_low=0.2, clip_high=0.28, dual_clip=0.0)
DUAL = dict(clip_low=0.2, clip_high=0.2, dual_clip=3.0)


def _policy_loss(loss, logp, old, advantage, mask=True, segment=1, **constants):
    written = losses.Written(logp, old, old, advantage, mask, segment, None)
    return loss(written, by_hand.algorithm(**constants))


ppo_clip, gspo_clip = (functools.partial(_policy_loss, loss) for loss in (losses.ppo_clip, losses.gspo_clip))


def _check_ppo(constants, ratio, advantage, loss, clipped, gradient):
    loss_of = lambda logp: ppo_clip(logp, np.float32(-1.5), np.float32(advantage), **constants)
    logp = np.float32(np.log(ratio) - 1.5)
    value, was_clipped = loss_of(logp)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert bool(was_clipped) == clipped
    np.testing.assert_allclose(jax.grad(lambda x: loss_of(x)[0])(logp), gradient, rtol=1e-6)


@pytest.mark.parametrize("ratio, advantage, loss, clipped, gradient", PPO_CASES)
def test_ppo_clip(ratio, advantage, loss, clipped, gradient):
    _check_ppo(PPO, ratio, advantage, loss, clipped, gradient)


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped, gradient",
    [
        (1.25, 2.0, -2.5, False, -2.5),  # above 1 + clip_low, below 1 + clip_high
        (1.3, 2.0, -2.56, True, 0.0),
        (0.75, -2.0, 1.6, True, 0.0),  # above 1 - clip_high, but the lower bound is 1 - clip_low
    ],
)
def test_the_bounds_of_the_ratio_may_differ(ratio, advantage, loss, clipped, gradient):
    _check_ppo(DAPO, ratio, advantage, loss, clipped, gradient)


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped, gradient",
    [
        (2.9, -2.0, 5.8, False, 5.8),
        (3.1, -2.0, 6.0, True, 0.0),  # a bad token that got far likelier: no more than c |A|
        (3.1, 2.0, -2.4, True, 0.0),  # a good one: as ever
        (0.5, -2.0, 1.6, True, 0.0),
    ],
)
def test_a_dual_clip_bounds_the_loss_of_bad_tokens(ratio, advantage, loss, clipped, gradient):
    _check_ppo(DUAL, ratio, advantage, loss, clipped, gradient)


@pytest.mark.parametrize("constants", [PPO, DAPO, DUAL])
def test_the_policy_loss_is_the_papers_objective_at_each_token(constants):
    logp, old, advantage = np.random.default_rng(0).standard_normal((3, 20, 20)).astype(np.float32)
    expected = [
        -by_hand.clipped_objective(math.exp(float(new) - float(before)), float(a), **constants)
        for new, before, a in zip(logp.flat, old.flat, advantage.flat, strict=True)
    ]
    actual, clipped = ppo_clip(logp, old, advantage, **constants)
    np.testing.assert_allclose(np.ravel(actual), expected, rtol=2e-6, atol=1e-7)
    assert 0.1 < np.mean(clipped) < 0.9


def test_where_the_ratio_is_clipped_nothing_flows_even_if_it_overflows():
    slope = lambda a, constants: jax.grad(
        lambda x: ppo_clip(x, -200.0, a, **constants)[0]
    )(-1.0)  # fmt: skip
    assert slope(1.0, PPO) == 0.0
    assert slope(-1.0, DUAL) == 0.0
    assert ppo_clip(-1.0, -200.0, -1.0, **DUAL)[0] == 3.0


@pytest.mark.parametrize("loss", [ppo_clip, gspo_clip])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("logp, old", [(-5.0, -100.0), (-100.0, -5.0)])
def test_loss_and_gradient_are_finite_whatever_the_ratio(loss, advantage, logp, old):
    of = lambda x: jnp.sum(loss(x, np.float32([[old]]), np.float32([[advantage]]), np.array([[True]]),
                                np.array([[1]]), **PPO)[0])  # fmt: skip
    value, slope = jax.value_and_grad(of)(np.float32([[logp]]))
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert advantage or (value == 0 and slope == 0)


# Whole trajectories.

segment_mean = jax.jit(losses.segment_mean)
GSPO = dict(clip_low=0.03, clip_high=0.05)


@pytest.fixture
def rows():
    """logp, old_logp, advantage (one a trajectory), mask, segment, each [4, 18]; no zeros outside the mask."""
    mask, segment = by_hand.packed_rows()
    logp, noise = np.random.default_rng(1).standard_normal((2, *mask.shape)).astype(np.float32)
    advantage = np.float32([1.5, -0.5, 2.0, -1.0])[segment] * np.float32([[1], [1], [1], [-1]])
    return logp, logp + 0.3 * noise, advantage, mask, segment


def _mean_by_trajectory(x, mask, segment):
    expected = np.zeros(mask.shape)
    for row, places, written in by_hand.each_trajectory(mask, segment):
        expected[row, places] = np.mean(x[row, places][written], dtype=np.float64) if written else 0
    return expected


def test_segment_mean_is_the_mean_over_a_trajectorys_written_tokens_at_each_of_its_tokens(rows):
    x, _, _, mask, segment = rows
    actual = segment_mean(np.where(mask, x, np.nan), mask, segment)
    np.testing.assert_allclose(actual, _mean_by_trajectory(x, mask, segment), atol=2e-7)
    for row, places, _ in by_hand.each_trajectory(mask, segment):
        assert len(np.unique(actual[row, places])) == 1


def test_segment_mean_of_small_rows():
    x, segment = np.float32([[32, 1, 2, 4, 8, 16]]), np.int32([[0, 1, 1, 1, 2, 0]])
    mask = np.array([[True, True, False, True, True, True]])
    np.testing.assert_array_equal(segment_mean(x, mask, segment), [[0, 2.5, 2.5, 2.5, 8, 0]])
    for length in (1, 2, 3, 4):
        whole = [part[:, :length] for part in (x, np.ones((1, 6), bool), np.ones((1, 6), np.int32))]
        expected = np.full((1, length), x[0, :length].mean())
        np.testing.assert_allclose(segment_mean(*whole), expected, rtol=1e-7)


def test_the_slope_of_a_segment_mean_is_one_over_the_count_of_written_tokens():
    segment, mask = np.int32([[1, 1, 1, 2]]), np.array([[True, False, True, True]])
    jacobian = jax.jacobian(lambda x: segment_mean(x[None], mask, segment)[0])(np.float32([1, 2, 3, 4]))
    of_first = [0.5, 0, 0.5, 0]
    np.testing.assert_array_equal(jacobian, [of_first, of_first, of_first, [0, 0, 0, 1]])


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def learn_gspo(logp, old, advantage, mask, segment, share):
    """The sum over trajectories of the mean loss of their written tokens, and where it is clipped."""
    loss, clipped = gspo_clip(logp, old, advantage, mask, segment, **GSPO)
    return losses.masked_sum(share * loss, mask), clipped


def _share(mask, segment):
    """One over the number of its trajectory's written tokens, at each of these."""
    share = np.zeros(mask.shape, np.float32)
    for row, places, written in by_hand.each_trajectory(mask, segment):
        share[row, places[written]] = 1 / max(len(written), 1)
    return share


def test_gspo_has_the_value_and_the_gradient_of_the_objective_of_whole_sequences(rows):
    logp, old, advantage, mask, segment = rows
    (loss, clipped), gradient = learn_gspo(*rows, _share(mask, segment))
    expected, slopes, seen = 0.0, np.zeros(mask.shape), set()
    for row, places, written in by_hand.each_trajectory(mask, segment):
        if written:
            at = row, places[written]
            new, before, a = logp[at].astype(np.float64), old[at].astype(np.float64), float(advantage[at][0])
            objective = lambda x: by_hand.sequence_objective(x, before, a, **GSPO)
            expected -= objective(new)
            slopes[at] = -by_hand.slope(objective, new)
            assert np.all(clipped[at] == (not slopes[at].any()))
            seen.add(bool(slopes[at].any()))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slopes, atol=1e-6)
    assert seen == {True, False}  # trajectories that are clipped, and others


def test_gspo_of_one_trajectory():
    logp, old = np.log(np.float32([[0.9, 0.5, 0.4]])), np.log(np.float32([[0.1, 0.4, 0.4]]))
    mask, segment = np.array([[False, True, True]]), np.int32([[1, 1, 1]])
    loss = lambda a, high: gspo_clip(
        logp, old, np.float32([[a, a, a]]), mask, segment, clip_low=0.1, clip_high=high
    )  # fmt: skip
    s = math.sqrt(0.5 / 0.4)  # 1.118
    np.testing.assert_allclose(loss(2.0, 0.2)[0][mask], [-2 * s] * 2, rtol=1e-6)
    np.testing.assert_allclose(loss(2.0, 0.1)[0][mask], [-2.2] * 2, rtol=1e-6)
    assert not np.any(loss(2.0, 0.2)[1]) and np.all(loss(2.0, 0.1)[1])


def test_trajectories_lose_the_same_on_eight_devices_as_on_one(rows):
    twice = [np.concatenate([x, x[::-1]]) for x in (*rows, _share(*rows[3:]))]

    def on(mesh):
        with jax.set_mesh(mesh):
            arrays = parallel.to_mesh(twice, "batch", None)
            x, _, _, mask, segment, _ = arrays
            mean = segment_mean(x, mask, segment)
            assert mean.sharding == x.sharding
            (loss, _), gradient = learn_gspo(*arrays)
            return jax.device_get((mean, gradient, loss))

    one, eight = on(meshes.make()), on(meshes.make(data=2, fsdp=4))
    np.testing.assert_array_equal(eight[0], one[0])
    np.testing.assert_array_equal(eight[1], one[1])
    np.testing.assert_allclose(eight[2], one[2], rtol=1e-6)


def test_importance_is_the_ratio_of_learner_to_sampler_up_to_the_cap():
    learner, sampler = np.log(np.float32([0.1, 0.4, 0.6, 0.9])), np.log(np.float32([0.2, 0.4, 0.4, 0.3]))
    weight = functools.partial(losses.truncated_importance, cap=2.0)
    np.testing.assert_allclose(weight(learner, sampler), [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert weight(-1.0, -200.0) == 2.0
    assert jax.grad(weight, argnums=(0, 1))(-1.0, -1.5) == (0.0, 0.0)


# Everything, of log-prob (or value), old log-prob (old value) and advantage (target).
WITH_ZEROS_OUTSIDE = {
    "ppo": lambda new, old, a, mask, segment: ppo_clip(new, old, a, **DUAL)[0],
    "gspo": lambda new, old, a, mask, segment: gspo_clip(new, old, a, mask, segment, **GSPO)[0],
    "importance": lambda new, old, a, mask, segment: losses.truncated_importance(old, a, cap=2.0) * new,
    "value": lambda new, old, a, mask, segment: losses.clipped_value(new, old, a, clip=0.5),
    "k1": lambda new, old, a, mask, segment: losses.KL["k1"](new, old),
    "k2": lambda new, old, a, mask, segment: losses.KL["k2"](new, old),
    "k3": lambda new, old, a, mask, segment: losses.KL["k3"](new, old),
}


@pytest.mark.parametrize("name", WITH_ZEROS_OUTSIDE)
def test_a_token_outside_the_mask_gets_exactly_no_gradient_whatever_stands_there(rows, name):
    *arrays, mask, segment = rows

    def loss(*arrays):
        zeroed = [jnp.where(mask, x, 0.0) for x in arrays]
        return losses.masked_sum(WITH_ZEROS_OUTSIDE[name](*zeroed, mask, segment), mask)

    learn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    expected = learn(*arrays)
    assert np.any(expected[1][0]) and not any(np.any(np.asarray(g)[~mask]) for g in expected[1])
    for spoilt in (np.nan, np.inf, -1e4, 1e4):
        for which in range(3):
            other = [np.where(mask | (i != which), x, np.float32(spoilt)) for i, x in enumerate(arrays)]
            jax.tree.map(np.testing.assert_array_equal, learn(*other), expected)


def test_gspo_which_has_the_mask_needs_no_zeros_outside_it(rows):
    *arrays, mask, segment = rows
    (expected, _), slope = learn_gspo(*rows, _share(mask, segment))
    arrays = [np.where(mask, x, np.float32(np.nan)) for x in arrays]
    (actual, _), spoilt_slope = learn_gspo(*arrays, mask, segment, _share(mask, segment))
    assert actual == expected
    np.testing.assert_array_equal(spoilt_slope, slope)


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


def test_k3_stays_clamped_where_its_ratio_overflows():
    for logp, reference in ((-200.0, -1.0), (-1.0, -200.0)):
        assert losses.kl_k3(logp, reference) == 10
        assert jax.grad(losses.kl_k3)(logp, reference) == 0


def test_k2_is_half_the_square():
    np.testing.assert_array_equal(losses.kl_k2(np.float32([-1, -3, -2]), np.float32([-2, -1, -2])), [0.5, 2, 0])


P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_estimate_the_same_divergence(name):
    estimate = (P * losses.KL[name](np.log(P), np.log(Q))).sum()
    np.testing.assert_allclose(estimate, (P * np.log(P / Q)).sum(), rtol=1e-6)


def test_as_a_loss_k2_has_the_gradient_of_the_divergence_and_k1_has_none():
    estimate = lambda logits, name: jnp.sum(P * losses.KL[name](jax.nn.log_softmax(logits), np.log(Q)))
    divergence = lambda logits: np.sum(_softmax(logits) * np.log(_softmax(logits) / Q))
    exact = by_hand.slope(divergence, np.log(P))
    np.testing.assert_allclose(jax.grad(estimate)(np.log(P), "k2"), exact, atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimate)(np.log(P), "k1"), 0 * exact, atol=1e-6)


def _softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_a_masked_sum_takes_nothing_from_outside_the_mask():
    x, mask = np.float32([1, np.nan, 4, np.inf]), np.array([True, False, True, False])
    assert losses.masked_sum(x, mask) == 5
    np.testing.assert_array_equal(jax.grad(losses.masked_sum)(x, mask), [1, 0, 1, 0])
