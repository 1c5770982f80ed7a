"""What stops a run, or warns, before more of it is lost: figures that are not finite or beyond their limits."""

import json
import math
import pathlib
from typing import Sequence

import numpy as np

from searchr1_jax.core import parallel, settings, types
from searchr1_jax.text import rewards as rewards_lib

_FINITE = ("policy/loss", "policy/gradient_norm", "value/loss", "value/gradient_norm")


def exceeded(values: dict[str, float], guard: settings.Guard) -> list[str]:
    """What of a step's figures is beyond its limit, in words."""
    upper = {
        "kl_to_reference": ("guard.kl", guard.kl),
        "policy/entropy": ("guard.entropy_high", guard.entropy_high),
        "policy/gradient_norm": ("guard.gradient_norm", guard.gradient_norm),
    }
    found = [
        f"{name} of {values[name]:.4g} is above {key} of {limit:g}"
        for name, (key, limit) in upper.items()
        if limit and values.get(name, 0.0) > limit
    ]
    found += [f"{name} is {values[name]}" for name in (*upper, "sampler_gap/max") if math.isnan(values.get(name, 0.0))]
    entropy = values.get("policy/entropy", math.inf)
    if entropy < guard.entropy_low:
        found.append(f"policy/entropy of {entropy:.4g} is below guard.entropy_low of {guard.entropy_low:g}")
    return found


def check_rewards(trajectories: Sequence[types.Trajectory], rewards: Sequence[types.Worth]) -> None:
    """Raises FloatingPointError for a reward that is no number, before anything is learned from it."""
    for t, reward in zip(trajectories, rewards, strict=True):
        if not math.isfinite(rewards_lib.amount(reward)):
            raise FloatingPointError(
                f"the reward of question {t.example.id!r}, sample {t.sample}, is {reward}; it has to be a finite"
                " number: fix the function that config.reward names"
            )


def check_update(
    values: dict[str, float], batch: types.Batch, ids: Sequence[str], *, step: int, directory: pathlib.Path
) -> None:
    """Refuses an update whose figures are not finite; its batch, on the host, is saved first.

    The file holds the fields of `types.Batch`, and the `ids` of the questions as JSON.

    Raises:
      FloatingPointError: naming the step, the questions and where the batch is.
    """
    for name in _FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            path = directory / f"step{step:06d}.npz"
            if parallel.is_first():
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(path, ids=json.dumps(list(ids)), **vars(batch))
            first = ", ".join(sorted(set(ids))[:10])
            raise FloatingPointError(
                f"{name} is {values[name]} at step {step}; its batch is in {path}, its questions begin with {first}."
                " Start again with the same command to go on from the last checkpoint; a lower policy.learning_rate or"
                " policy.max_gradient_norm may avoid it"
            )
