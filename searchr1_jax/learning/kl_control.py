"""How strongly the policy is held to its reference: the coefficient of the KL penalty, from step to step."""

import numpy as np

from searchr1_jax.core import settings


def next_coefficient(algorithm: settings.Algorithm, coefficient: float, kl: float, trajectories: int) -> float:
    """β after a step: fixed, or with a target a proportional controller in log space (Ziegler et al., 2019, 2.2).

    e = clip(KL / target − 1, −0.2, 0.2)        β ← β (1 + e n / horizon)

    Args:
      kl: mean KL to the reference that the step measured, nats. NaN gives NaN.
      trajectories: n, how many the step learned from.
    """
    if not algorithm.kl_target:
        return coefficient
    error = float(np.clip(kl / algorithm.kl_target - 1, -0.2, 0.2))
    return coefficient * (1 + error * trajectories / algorithm.kl_horizon)
