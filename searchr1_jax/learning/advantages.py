"""Advantages: how much better than expected each of the policy's tokens was. Pure functions, and the table of them.

A row of `ADVANTAGES` has one function and says what that needs. Those of tokens and turns know the settings, too.

    of_tokens          in the jitted program, over packed rows    reward, value, mask, segment [B, T] ─▶ [B, T]
    of_trajectories    on the host, among a question's samples    reward [Q, G] ─▶ [Q, G]    G samples of Q questions
    of_turns           the same, turn by turn                     reward, rewarded [Q, G, K] ─▶ [Q, G, K]
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import names, settings


def gae(reward_BT, value_BT, mask_BT, segment_BT, algorithm: settings.Algorithm):
    """Generalised advantage estimates over the tokens the policy wrote (Schulman et al., 2016, eq. 16).

    δₜ = rₜ + γ V(next written token) − Vₜ        Aₜ = δₜ + γλ A(next written token)

        segment  1 1 1 1 1 2 2      nothing follows a segment's last written token: V and A are 0 there
        mask     0 1 0 0 1 0 1      (0: prompt, retrieved text, a correction or padding: stepped over)

    Args:
      reward_BT, value_BT: float32[B, T], reward received on writing token t, value just before it.
      mask_BT, segment_BT: bool[B, T], the tokens to estimate for; int32[B, T], trajectories of a packed row.
      algorithm: γ is its discount, λ its gae_lambda.
    Returns: float32[B, T] advantages, zero where the mask is False.
    """
    discount, gae_lambda = algorithm.discount, algorithm.gae_lambda
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


def returns(reward_BT, value_BT, mask_BT, segment_BT, algorithm: settings.Algorithm):
    """Discounted sum of what a token and the written ones after it receive; GAE with V = 0 and λ = 1.

    Gₜ = rₜ + γ G(next written token)

    Of what `gae` takes, the values are not looked at. With the KL penalty in the reward and `whiten`, this is the
    advantage of REINFORCE++ (Hu, 2025).
    """
    del value_BT
    no_value = jnp.zeros_like(reward_BT)
    return gae(reward_BT, no_value, mask_BT, segment_BT, dataclasses.replace(algorithm, gae_lambda=1.0))


EPSILON = 1e-6  # of standard deviations


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
    """Dr. GRPO's advantage, r − mean over a question's samples (Liu et al., 2025); a group of one keeps its reward."""
    if reward_QG.shape[1] == 1:
        return reward_QG
    reward_QG = reward_QG - reward_QG[:, :1]  # changes nothing but rounding: equal rewards give exactly 0
    return reward_QG - jnp.mean(reward_QG, axis=1, keepdims=True)


def group_standardised(reward_QG):
    """GRPO's advantage, (r − mean) / (std + ε) over a question's samples (Shao et al., 2024, eq. 3).

    The standard deviation is the unbiased one. A group of one has nothing to compare with, and keeps its reward.
    """
    if reward_QG.shape[1] == 1:
        return reward_QG
    difference_QG = group_mean(reward_QG)
    return difference_QG / (jnp.std(difference_QG, axis=1, keepdims=True, ddof=1) + EPSILON)


def leave_one_out(reward_QG):
    """RLOO's advantage, r − mean of the question's other samples (Ahmadian et al., 2024).

    That is r − mean of all, times G / (G − 1). A group of one keeps its reward.
    """
    samples = reward_QG.shape[1]
    return group_mean(reward_QG) * (samples / max(samples - 1, 1))


def turn_returns(reward_QGK, rewarded_QGK, algorithm: settings.Algorithm):
    """Discounted sums of the standardised rewards of a turn and those after it, one advantage a turn.

    r̂ = (r − mean) / (std + ε) over all rewards of a question's samples        A_k = Σ_{j≥k} γ^{j−k} r̂_j

    That is GRPO with rewards of steps (Shao et al., 2024, section 4.1.3), discounted from turn to turn as in MT-GRPO
    (Zeng et al., 2025, where γ weighs the outcome in the advantage of the turn before). With a reward for the last turn
    alone and γ = 1 it is `group_standardised`. The standard deviation is the unbiased one; a group of one keeps its
    rewards.

    Args:
      reward_QGK: float32[Q, G, K], of K turns of G samples of each of Q questions.
      rewarded_QGK: bool[Q, G, K], the turns that have a reward: a trajectory's last, or all it has.
      algorithm: γ is its discount.
    Returns: float32[Q, G, K]; what stands behind a trajectory's last turn is 0.
    """
    reward_QGK = np.where(rewarded_QGK, np.float64(reward_QGK), 0.0)  # in float64 equal rewards give exactly 0
    if reward_QGK.shape[1] > 1:
        mean_and_std = {"axis": (1, 2), "keepdims": True, "where": rewarded_QGK}
        difference_QGK = reward_QGK - np.mean(reward_QGK, **mean_and_std)
        reward_QGK = difference_QGK / (np.std(reward_QGK, ddof=1, **mean_and_std) + EPSILON)
        reward_QGK = np.where(rewarded_QGK, reward_QGK, 0.0)
    advantage_QGK = np.zeros_like(reward_QGK)
    after_QG = 0.0
    for k in reversed(range(reward_QGK.shape[2])):
        advantage_QGK[..., k] = after_QG = reward_QGK[..., k] + algorithm.discount * after_QG
    return advantage_QGK.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage:
    """A way to estimate advantages: exactly one of three functions, and what it needs."""

    # (reward_BT, value_BT, mask_BT, segment_BT, algorithm), as `gae`; then whitened, unless algorithm.whiten is False.
    of_tokens: Callable[..., jax.Array] | None = None
    of_trajectories: Callable[..., Any] | None = None  # (reward_QG), as `group_mean`; turns' rewards are added up
    of_turns: Callable[..., Any] | None = None  # (reward_QGK, rewarded_QGK, algorithm), as `turn_returns`
    ignores: tuple[str, ...] = ()  # keys of the section `algorithm` that such a function is given and does not look at
    needs_value: bool = False  # a value model, which learns to tell the returns: advantage + value
    known_as: str = ""  # the algorithm that a policy is then said to be trained with

    def __post_init__(self):
        functions = [f for f in (self.of_tokens, self.of_trajectories, self.of_turns) if f is not None]
        if len(functions) != 1 or (self.needs_value and self.of_tokens is None):
            raise ValueError(
                f"an Advantage with {len(functions)} functions and needs_value={self.needs_value} cannot be estimated;"
                " give it one of of_tokens, of_trajectories and of_turns, and values to of_tokens alone"
            )


ADVANTAGES: dict[str, Advantage] = {
    "gae": Advantage(of_tokens=gae, needs_value=True, known_as="PPO"),
    "return": Advantage(of_tokens=returns, ignores=("gae_lambda",), known_as="REINFORCE++"),
    "group_standardised": Advantage(of_trajectories=group_standardised, known_as="GRPO"),
    "group_mean": Advantage(of_trajectories=group_mean, known_as="Dr. GRPO"),
    "leave_one_out": Advantage(of_trajectories=leave_one_out, known_as="RLOO"),
    "reward": Advantage(of_trajectories=plain, known_as="REINFORCE"),
    "turn_returns": Advantage(of_turns=turn_returns, ignores=("gae_lambda",), known_as="GRPO with rewards of turns"),
}


def find(name: str) -> Advantage:
    """The row of `algorithm.advantage`. Raises ValueError where there is none, or it is no `Advantage`."""
    return names.resolve(name, ADVANTAGES, "algorithm.advantage", Advantage)


def has_variance(reward_QGK, rewarded_QGK):
    """bool[Q], whether a question's rewards differ; where not, group advantages are 0 (DAPO, Yu et al., 2025).

    Takes what `turn_returns` does; K = 1 where whole trajectories are compared. False for a group of one that is
    rewarded once. NaN differs from everything, so that it is never dropped unseen.
    """
    first_Q = np.argmax(rewarded_QGK.reshape(len(rewarded_QGK), -1), axis=1)
    first_Q11 = np.take_along_axis(reward_QGK.reshape(len(reward_QGK), -1), first_Q[:, None], axis=1)[..., None]
    return np.any((reward_QGK != first_Q11) & rewarded_QGK, axis=(1, 2))
