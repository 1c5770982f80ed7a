r"""An advantage of one's own: better than the question's other samples, in units of the whole rollout.

python -m searchr1_jax.train --config=configs/quickstart.py:algorithm=grpo --workdir=runs/batch-standardised \
    --config.algorithm.advantage=examples.advantage:batch_standardised

A row of `learning.advantages.ADVANTAGES` is one function and what it needs; so is this one, which the config names.
`of_trajectories` compares whole trajectories. For advantages of single tokens write `of_tokens` like
`advantages.gae`, for those of turns `of_turns` like `advantages.turn_returns`.
"""

from __future__ import annotations

import jax.numpy as jnp

from searchr1_jax.learning import advantages


def standardise(reward_QG):
    """(r − mean of the question) / (std of that over the rollout + ε), as in REINFORCE++-baseline (Hu et al., 2025).

    A question whose samples hardly differ counts little, where GRPO makes as much of it as of any other.

    Args:
      reward_QG: float32[Q, G], G samples of each of Q questions; G of 2 or more.
    Returns: float32[Q, G].
    """
    difference_QG = reward_QG - jnp.mean(reward_QG, axis=1, keepdims=True)
    return difference_QG / (jnp.std(difference_QG) + 1e-6)


batch_standardised = advantages.Advantage(of_trajectories=standardise, known_as="REINFORCE++-baseline")
