"""Losses a token, and how they are averaged. Pure functions of arrays of one shape, usually [B, T]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ppo_clip(logp, old_logp, advantage, *, clip):
    """PPO's clipped surrogate as a loss (Schulman et al., 2017, eq. 7), and where clipping took the gradient.

    ρ = π(t) / π_old(t)        loss = −min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A)

    Returns: the loss and bool "clipped", both of the shape of `logp`.
    """
    ratio = jnp.exp(logp - old_logp)
    plain, bounded = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    return -jnp.minimum(plain, bounded), bounded < plain


def clipped_value(value, old_value, target, *, clip):
    """½ max((V − R)², (clamp(V, V_old ± clip) − R)²), the value loss of the original PPO code."""
    near = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))


def kl_k1(logp, reference_logp):
    """log π − log π_ref: unbiased, may be negative (Schulman, 2020, "Approximating KL divergence")."""
    return logp - reference_logp


def kl_k3(logp, reference_logp):
    """π_ref/π − 1 − log π_ref/π, clamped to ±10: unbiased, never negative (Schulman, 2020)."""
    difference = reference_logp - logp
    return jnp.clip(jnp.exp(difference) - 1 - difference, -10, 10)


def masked_sum(x, mask) -> jax.Array:
    """Sum over the masked entries. What is not masked cannot matter, not even as NaN."""
    return jnp.sum(jnp.where(mask, x, 0.0))
