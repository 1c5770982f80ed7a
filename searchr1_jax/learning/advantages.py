"""Advantages: how much better than expected each of the policy's tokens was. Pure functions of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gae(reward_BT, value_BT, mask_BT, segment_BT, *, discount, gae_lambda):
    """Generalised advantage estimates over the tokens the policy wrote (Schulman et al., 2016, eq. 16).

    δₜ = rₜ + γ V(next written token) − Vₜ        Aₜ = δₜ + γλ A(next written token)

        segment  1 1 1 1 1 2 2      nothing follows a segment's last written token: V and A are 0 there
        mask     0 1 0 0 1 0 1      (0: prompt, retrieved text, a correction or padding: stepped over)

    Args:
      reward_BT: float32[B, T], reward received on writing token t.
      value_BT: float32[B, T], value just before token t.
      mask_BT: bool[B, T], the tokens to estimate for.
      segment_BT: int32[B, T], trajectories of a packed row.
    Returns: float32[B, T] advantages, zero where the mask is False.
    """
    end = jnp.zeros_like(value_BT[:, 0])

    def backwards(after, now):
        next_value, next_advantage, next_segment = after
        reward, value, mask, segment = now
        same = segment == next_segment
        next_value, next_advantage = jnp.where(same, next_value, 0.0), jnp.where(same, next_advantage, 0.0)
        advantage = reward + discount * next_value - value + discount * gae_lambda * next_advantage
        carry = jnp.where(mask, value, next_value), jnp.where(mask, advantage, next_advantage), segment
        return carry, jnp.where(mask, advantage, 0.0)

    by_time = tuple(jnp.swapaxes(x, 0, 1) for x in (reward_BT, value_BT, mask_BT, segment_BT))
    start = end, end, jnp.zeros_like(segment_BT[:, 0])
    _, advantage_TB = jax.lax.scan(backwards, start, by_time, reverse=True)
    return jnp.swapaxes(advantage_TB, 0, 1)


def returns(reward_BT, mask_BT, segment_BT, *, discount):
    """Discounted sum of what a token and the written ones after it receive; GAE with V = 0 and λ = 1.

    Gₜ = rₜ + γ G(next written token)

    With the KL penalty in the reward and `whiten`, this is the advantage of REINFORCE++ (Hu, 2025).

    Args:
      reward_BT, mask_BT, segment_BT: as in `gae`.
    Returns: float32[B, T], zero where the mask is False.
    """
    no_value = jnp.zeros_like(reward_BT)
    return gae(reward_BT, no_value, mask_BT, segment_BT, discount=discount, gae_lambda=1.0)


def whiten(x, mask):
    """(x − mean) / std over the masked entries of the whole array, biased variance; zero elsewhere."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask, x, 0.0)) / count
    variance = jnp.sum(jnp.where(mask, jnp.square(x - mean), 0.0)) / count
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def plain(reward_QG):
    """REINFORCE's: the reward itself (Williams, 1992)."""
    return reward_QG


def group_mean(reward_QG):
    """Dr. GRPO's advantage, r − mean over a question's samples (Liu et al., 2025).

    A group of one has nothing to compare with: mean 0, so that the advantage is the reward itself.

    Args:
      reward_QG: float32[Q, G], G samples of each of Q questions.
    Returns: float32[Q, G].
    """
    if reward_QG.shape[1] == 1:
        return reward_QG
    reward_QG = reward_QG - reward_QG[:, :1]  # changes nothing but rounding: equal rewards give exactly 0
    return reward_QG - jnp.mean(reward_QG, axis=1, keepdims=True)


def group_standardised(reward_QG, epsilon: float = 1e-6):
    """GRPO's advantage, (r − mean) / (std + ε) over a question's samples (Shao et al., 2024, eq. 3).

    The standard deviation is the unbiased one. A group of one has nothing to compare with: mean 0 and std 1, so
    that the advantage is the reward itself.

    Args:
      reward_QG: float32[Q, G], G samples of each of Q questions.
    Returns: float32[Q, G].
    """
    if reward_QG.shape[1] == 1:
        return reward_QG
    difference_QG = group_mean(reward_QG)
    return difference_QG / (jnp.std(difference_QG, axis=1, keepdims=True, ddof=1) + epsilon)


def leave_one_out(reward_QG):
    """RLOO's advantage, r − mean of the question's other samples (Ahmadian et al., 2024).

    That is r − mean of all, times G / (G − 1). A group of one has no others: the advantage is the reward itself.

    Args:
      reward_QG: float32[Q, G], G samples of each of Q questions.
    Returns: float32[Q, G].
    """
    samples = reward_QG.shape[1]
    return group_mean(reward_QG) * (samples / max(samples - 1, 1))


# One number for a whole trajectory, from its reward and those of the question's other samples.
GROUPED = {
    "group_standardised": group_standardised,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "reward": plain,
}


def has_variance(reward_QG):
    """Whether a question's rewards differ; where not, group advantages are 0 (DAPO, Yu et al., 2025).

    False for a group of one. NaN differs from everything, so that it is never dropped unseen.

    Args:
      reward_QG: float32[Q, G], G samples of each of Q questions.
    Returns: bool[Q].
    """
    return jnp.any(reward_QG != reward_QG[:, :1], axis=1)
