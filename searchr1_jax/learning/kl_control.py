"""How strongly the policy is held to its reference: the coefficient of the KL penalty, from step to step."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLControl:
    """β fixed, or β adapted so that the KL stays near a target. The caller keeps the current β."""

    coefficient: float  # β, or where it starts when it adapts
    target: float  # nats, of the KL that `next` is given; 0: β is fixed
    horizon: int  # trajectories in which a KL far from its target changes β by about a fifth

    def __post_init__(self):
        if self.coefficient < 0:
            raise ValueError(f"algorithm.kl_coefficient of {self.coefficient} rewards distance; set 0 or more")
        if self.target < 0:
            raise ValueError(f"algorithm.kl_target of {self.target} cannot be met; set more than 0, or 0 for none")
        if self.target and not self.coefficient:
            raise ValueError(
                "algorithm.kl_coefficient of 0 stays 0, as it adapts by factors; set a start above 0,"
                " or algorithm.kl_target to 0"
            )
        if self.target and self.horizon < 1:
            raise ValueError(f"algorithm.kl_horizon of {self.horizon} is no number of trajectories; set 1 or more")

    def next(self, coefficient: float, kl: float, trajectories: int) -> float:
        """β after a step, a proportional controller in log space (Ziegler et al., 2019, section 2.2).

        e = clip(KL / target − 1, −0.2, 0.2)        β ← β (1 + e n / horizon)

        Args:
          coefficient: β of the step.
          kl: mean KL to the reference that the step measured, nats. NaN gives NaN.
          trajectories: n, how many the step learned from.
        Raises:
          ValueError: where n is so many horizons that β could reach 0.
        """
        if not self.target:
            return coefficient
        if trajectories >= 5 * self.horizon:
            raise ValueError(
                f"a step of {trajectories} trajectories could bring β to 0 with algorithm.kl_horizon"
                f" {self.horizon}; set it to more than {trajectories // 5}"
            )
        error = float(np.clip(kl / self.target - 1, -0.2, 0.2))
        return coefficient * (1 + error * trajectories / self.horizon)
