"""Losses a token, what weighs them, and KL estimators. Pure functions of arrays of one shape, usually [B, T].

A policy loss is a row of `POLICY_LOSSES`, a KL estimator one of `KL`, or a user's own of the same signature.

None of them knows how losses are averaged. The caller zeroes log-probs, advantages and values outside the mask
*before* it calls, and masks the result: a ratio that overflows there has a gradient of inf · 0, which no mask
applied afterwards removes. What is given a mask needs no such care: nothing outside it reaches masked tokens.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from searchr1_jax.core import names, settings


class Written(NamedTuple):
    """What a policy loss is of; each [B, T], and zero outside the mask where it is a float32."""

    logp: jax.Array  # float32, of the policy that learns: the one with a gradient
    old_logp: jax.Array  # float32, of the policy before the rollout's updates
    behaviour_logp: jax.Array  # float32, that the sampler gave
    advantage: jax.Array  # float32
    mask: jax.Array  # bool, the tokens to learn from
    segment: jax.Array  # int32, trajectories of a packed row
    turn: jax.Array  # int32, the turn that wrote the token, -1 outside the mask


def ppo_clip(written: Written, algorithm: settings.Algorithm):
    """PPO's clipped surrogate as a loss (Schulman et al., 2017, eq. 7), and where clipping took the gradient.

    ρ = π(t) / π_old(t)        loss = −min(ρ A, clamp(ρ, 1 − ε_low, 1 + ε_high) A)

    and, with a dual clip c > 1 (0: none), at most −c A where A < 0 (Ye et al., 2020): a bad token that got much
    likelier counts no more than that. ε_high > ε_low is DAPO's "clip-higher" (Yu et al., 2025).

    Returns: the loss and bool "clipped", each [B, T]. Where it is clipped the gradient is exactly 0. log ρ is clamped
      to ±20, so that both are finite whatever the log-probs.
    """
    return _clip(written.logp - written.old_logp, written.advantage, algorithm, dual_clip=algorithm.dual_clip)


def gspo_clip(written: Written, algorithm: settings.Algorithm):
    """PPO's loss with the ratio of a whole trajectory at each of its tokens (GSPO-token, Zheng et al., 2025).

    sᵢ = exp(mean over trajectory i's masked tokens of log π/π_old)        ρ(t) = sg[sᵢ] · π(t) / sg[π(t)]

    With one advantage a trajectory, the mean of this loss over its masked tokens has the value and the gradient of
    −min(sᵢ A, clamp(sᵢ) A). The ratio's bounds are those of a geometric mean, thus far closer to 1 than PPO's. There is
    no dual clip; the result is as `ppo_clip`'s.
    """
    logp, mask = written.logp, written.mask
    of_trajectory = jax.lax.stop_gradient(segment_mean(logp - written.old_logp, mask, written.segment))
    log_ratio = of_trajectory + jnp.where(mask, logp - jax.lax.stop_gradient(logp), 0.0)
    return _clip(log_ratio, written.advantage, algorithm, dual_clip=0)


def _clip(log_ratio, advantage, algorithm: settings.Algorithm, *, dual_clip: float):
    """The clipped surrogate of any ratio."""
    log_ratio = jnp.clip(log_ratio, -20, 20)
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    constant = jnp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantage
    clipped = constant < ratio * advantage
    if dual_clip:
        beyond = (advantage < 0) & (ratio > dual_clip)
        clipped, constant = clipped | beyond, jnp.where(beyond, dual_clip * advantage, constant)
    moving = jnp.exp(jnp.where(clipped, 0.0, log_ratio)) * advantage
    return -jnp.where(clipped, jax.lax.stop_gradient(constant), moving), clipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A policy loss and what it makes of the settings."""

    of_tokens: Callable[[Written, settings.Algorithm], tuple[jax.Array, jax.Array]]  # loss and "clipped", each [B, T]
    ignores: tuple[str, ...] = ()  # keys of the section `algorithm` that it does not look at
    known_as: str = ""  # the algorithm that it makes of others; empty: they keep their names


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo_clip": PolicyLoss(of_tokens=ppo_clip),
    "gspo_clip": PolicyLoss(of_tokens=gspo_clip, ignores=("dual_clip",), known_as="GSPO"),
}


def find_policy_loss(name: str) -> PolicyLoss:
    """The row of `algorithm.policy_loss`. Raises ValueError where there is none, or it is no `PolicyLoss`."""
    return names.resolve(name, POLICY_LOSSES, "algorithm.policy_loss", PolicyLoss)


def segment_mean(x_BT, mask_BT, segment_BT):
    """Mean over the masked tokens of each trajectory of a packed row, at every one of its tokens.

    Sums are gathered at a trajectory's last token and copied back, each in log T steps of twice the reach: only rows
    are split over devices, so nothing is exchanged, and a step is one pass over [B, T].

    Args:
      mask_BT: bool[B, T]; what it leaves out cannot matter, not even as NaN.
      segment_BT: int32[B, T], each trajectory's tokens side by side; 0 is empty space.
    Returns: float32[B, T], the same at each token of a trajectory; 0 in empty space and where nothing is masked.
    """
    length = x_BT.shape[1]
    mask_BT = mask_BT & (segment_BT > 0)
    reaches = 1 << jnp.arange((length - 1).bit_length())

    def moved(x, by):
        """x[t + by] at t, and 0 beyond the row."""
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (length, length))), length + by, length, axis=1)

    def gather(sums, reach):
        same = segment_BT == moved(segment_BT, -reach)
        return jax.tree.map(lambda x: x + jnp.where(same, moved(x, -reach), 0.0), sums), None

    def copy_back(sums, reach):
        same = segment_BT == moved(segment_BT, reach)
        return jax.tree.map(lambda x: jnp.where(same, moved(x, reach), x), sums), None

    sums = jnp.where(mask_BT, x_BT, 0.0), mask_BT.astype(x_BT.dtype)
    sums, _ = jax.lax.scan(gather, sums, reaches)
    (total, count), _ = jax.lax.scan(copy_back, sums, reaches)
    return total / jnp.maximum(count, 1)


def truncated_importance(old_logp, behaviour_logp, *, cap):
    """min(π_old / μ, cap), a constant weight for the loss of a token that μ sampled (Yao et al., 2025).

    It corrects for a sampler whose arithmetic or weights differ from the learner's. Never more than `cap`, also where
    the ratio overflows; has no gradient.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_logp - behaviour_logp), cap))


def clipped_value(value, old_value, target, *, clip):
    """½ max((V − R)², (clamp(V, V_old ± clip) − R)²), the value loss of the original PPO code."""
    near = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))


def kl_k1(logp, reference_logp):
    """log π − log π_ref: unbiased, may be negative; its gradient is 0 on average (Schulman, 2020)."""
    return logp - reference_logp


def kl_k2(logp, reference_logp):
    """½ (log π − log π_ref)²: biased a little, never negative; its gradient is on average the KL's (Schulman, 2020)."""
    return 0.5 * jnp.square(logp - reference_logp)


def kl_k3(logp, reference_logp):
    """π_ref/π − 1 − log π_ref/π, clamped to ±10: unbiased but for the clamp, never negative (Schulman, 2020).

    Where it is clamped the gradient is exactly 0, also where π_ref/π overflows.
    """
    difference = jnp.clip(reference_logp - logp, -20, 20)  # beyond ±20 the result is clamped anyway
    return jnp.clip(jnp.exp(difference) - 1 - difference, -10, 10)


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def find_kl(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function of `algorithm.kl_estimator`. Raises ValueError where there is none."""
    return names.resolve(name, KL, "algorithm.kl_estimator")


def masked_sum(x, mask) -> jax.Array:
    """Sum over the masked entries. What is not masked cannot matter, not even as NaN."""
    return jnp.sum(jnp.where(mask, x, 0.0))
