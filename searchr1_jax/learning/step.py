"""One step of learning, from what a rollout brought to the next state.

trajectories, rewards ─ minibatches ─▶ batches on the mesh ─ update.Learner: score, estimate, update ─▶ TrainState
                                                         guards: what is not finite stops the run
"""

import pathlib
from typing import Sequence

import jax
import numpy as np

from searchr1_jax.core import cluster, parallel, types
from searchr1_jax.learning import guards, minibatches, update
from searchr1_jax.models import decoder


def learn(
    learner: update.Learner,
    state: update.TrainState,
    reference: decoder.Params | None,
    trajectories: Sequence[types.Trajectory],
    rewards: Sequence[types.Worth],
    step: int,
    *,
    kl_coefficient: float,
    rate_scale: float = 1.0,
    failed: pathlib.Path,
) -> tuple[update.TrainState, dict[str, float]]:
    """Learns from the sorted trajectories of a rollout. Returns the next state (`state` is donated) and statistics.

    Args:
      reference: as `learner.keep` returned it; None where the learner has none.
      step: counts rollouts from 0.
      failed: directory for the batch of an update that came to something not finite.
    Raises:
      Stopped: after a mini-batch, on all processes, where one was told to end now; the state is lost.
    """
    guards.check_rewards(trajectories, rewards)
    made = minibatches.make(trajectories, rewards, learner.settings, step)
    on_mesh = lambda trees: [parallel.to_mesh(tree, None, "batch", None) for tree in trees]
    batches = on_mesh(made.batches)
    scores = [learner.score(state, reference, batch) for batch in batches]
    group_advantages = None if made.advantages is None else on_mesh(made.advantages)
    targets, statistics = learner.estimate(batches, scores, group_advantages, kl_coefficient=kl_coefficient)
    scalars = {"kl_coefficient": kl_coefficient, "rate_scale": rate_scale}
    collected = []
    for batch, score, target, learned in zip(batches, scores, targets, made.learned, strict=True):
        if learned:
            state, values = learner.update(state, batch, score, target, step, **scalars)
            collected.append(jax.block_until_ready(values))
            if max(parallel.gather(cluster.asked_to_stop())) == cluster.URGENT:
                raise cluster.Stopped
    statistics, collected = jax.device_get((statistics, collected))
    done = [(batch, learned) for batch, learned in zip(made.batches, made.learned, strict=True) if learned]
    for values, (batch, learned) in zip(collected, done, strict=True):
        ids = [trajectories[i].example.id for i in learned]
        guards.check_update(values, batch, ids, step=step + 1, directory=failed)
    means = {name: float(np.mean([each[name] for each in collected])) for name in collected[0]} if collected else {}
    return state, made.statistics | {name: float(value) for name, value in statistics.items()} | means
