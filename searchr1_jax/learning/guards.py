"""What stops a run, or warns, before more of it is lost: figures that are not finite or beyond their limits."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Sequence

import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.core import types

_FINITE = ("policy/loss", "policy/gradient_norm", "value/loss", "value/gradient_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a step's figures; 0 is no limit."""

    kl: float  # nats a token, to the reference
    entropy_low: float  # nats a token
    entropy_high: float
    gradient_norm: float  # of the policy, before clipping

    def exceeded(self, values: dict[str, float]) -> list[str]:
        """What is beyond its limit, in words."""
        upper = {
            "kl_to_reference": ("guard.kl", self.kl),
            "policy/entropy": ("guard.entropy_high", self.entropy_high),
            "policy/gradient_norm": ("guard.gradient_norm", self.gradient_norm),
        }
        found = [
            f"{name} of {values[name]:.4g} is above {key} of {limit:g}"
            for name, (key, limit) in upper.items()
            if limit and values.get(name, 0.0) > limit
        ]
        entropy = values.get("policy/entropy", math.inf)
        if entropy < self.entropy_low:
            found.append(f"policy/entropy of {entropy:.4g} is below guard.entropy_low of {self.entropy_low:g}")
        return found


def check_scores(trajectories: Sequence[types.Trajectory], scores: Sequence[float]) -> None:
    """Refuses a reward that is no number, before anything is learned from it.

    Raises:
      FloatingPointError: naming the question and the value.
    """
    for trajectory, score in zip(trajectories, scores, strict=True):
        if not math.isfinite(score):
            raise FloatingPointError(
                f"the reward of question {trajectory.example.id!r}, sample {trajectory.sample}, is {score}; it has to"
                " be a finite number: mend the function that config.reward names"
            )


def check_update(
    values: dict[str, float], batch: types.Batch, ids: Sequence[str], *, step: int, directory: pathlib.Path
) -> None:
    """Refuses what an update should not have come to; its batch is saved first.

    Args:
      values: the update's figures.
      batch: what it learned from, on the host.
      ids: of its questions.
    Raises:
      FloatingPointError: naming the step, the questions and where the batch is.
    """
    for name in _FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            path = directory / f"step{step:06d}.npz"
            save_batch(path, batch, ids)
            first = ", ".join(sorted(set(ids))[:10])
            raise FloatingPointError(
                f"{name} is {values[name]} at step {step}; its batch is in {path}, its questions begin with {first}."
                " Start again with the same command to go on from the last checkpoint; a lower policy.learning_rate or"
                " policy.max_gradient_norm may avoid it"
            )


def save_batch(path: pathlib.Path, batch: types.Batch, ids: Sequence[str]) -> None:
    """Writes a batch for `load_batch`; the first process does."""
    if not parallel.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez_compressed(file, ids=json.dumps(list(ids)), **vars(batch))


def load_batch(path: pathlib.Path) -> tuple[types.Batch, list[str]]:
    """The batch of an update that failed, as `Learner.update` takes it once on the mesh, and its questions."""
    with np.load(path) as file:
        arrays = dict(file)
    ids = json.loads(str(arrays.pop("ids")))
    return types.Batch(**arrays), ids
