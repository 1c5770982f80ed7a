r"""A policy loss of one's own: CISPO, which clips the weight of a token and never its gradient.

python -m searchr1_jax.train --config=configs/quickstart.py:algorithm=grpo --workdir=runs/cispo \
    --config.algorithm.policy_loss=examples.policy_loss:cispo --config.algorithm.clip_high=4.0

A row of `learning.losses.POLICY_LOSSES` is one function of what was written and of the settings' section `algorithm`;
so is this one, which the config names.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from searchr1_jax.core import settings
from searchr1_jax.learning import losses


def clipped_weight(written: losses.Written, algorithm: settings.Algorithm):
    """loss = −sg[min(ρ, 1 + ε_high)] A log π, ρ = π(t) / π_old(t) (MiniMax-M1, 2025, eq. 4).

    Where PPO stops the gradient of a rare token that got likelier, this goes on with a bounded weight.

    Returns: the loss and bool "clipped", each [B, T].
    """
    ratio = jnp.exp(jax.lax.stop_gradient(written.logp - written.old_logp))
    largest = 1 + algorithm.clip_high
    return -jnp.minimum(ratio, largest) * written.advantage * written.logp, ratio > largest


cispo = losses.PolicyLoss(of_tokens=clipped_weight, ignores=("clip_low", "dual_clip"), known_as="CISPO")
