"""Supervised learning of given trajectories: the same packing, mask and accumulation, another loss."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from searchr1_jax.core import settings as settings_lib, types
from searchr1_jax.learning import losses, optimizer
from searchr1_jax.models import config as model_config, decoder


class SupervisedState(NamedTuple):
    """What supervised learning changes."""

    policy: decoder.Params
    optimizer: optax.OptState


class SupervisedLearner:
    """loss = −Σ wₜ log π(t) / Σ wₜ over the tokens that the mask calls the policy's."""

    def __init__(self, model: model_config.ModelConfig, settings: settings_lib.Settings, *, total_steps: int):
        self._optimizer = optimizer.AdamW(settings.sft.optimizer, total_steps)
        self._graph, _ = decoder.abstract(decoder.Policy, model)
        compute, vocab_chunk = decoder.Compute.of(settings.model), settings.learner.vocab_chunk
        self._options = {"compute": compute, "temperature": 1.0, "vocab_chunk": vocab_chunk}
        self._update = jax.jit(self._update_program, donate_argnums=0)

    def init(self, policy: decoder.Params) -> SupervisedState:
        return SupervisedState(policy, jax.jit(self._optimizer.transformation().init)(policy))

    def update(self, state: SupervisedState, batch: types.Batch, step: int):
        """The next state and statistics; `state` is donated. `step` counts updates from 0."""
        return self._update(state, batch, np.int32(step))

    def _update_program(self, state: SupervisedState, batch: types.Batch, step):
        total = losses.masked_sum(batch.weight, batch.policy_mask)

        def loss(params, b: types.Batch):
            policy = decoder.bind(self._graph, params)
            logp, _ = policy.token_statistics(b.tokens, b.position, b.segment, **self._options)
            value = -losses.masked_sum(b.weight * logp, b.policy_mask) / total
            return value, {"loss": value}

        gradient, statistics = optimizer.accumulate(loss, state.policy, batch)
        statistics["gradient_norm"] = optax.tree.norm(gradient)
        statistics["learning_rate"] = self._optimizer.learning_rate_at(step)
        return SupervisedState(*self._optimizer.apply(gradient, state.optimizer, state.policy, step)), statistics
