"""One step of reinforcement learning: score, estimate, update — three jitted programs over packed batches.

    batches ─ score ─▶ log-probs of policy and reference, values
            ─ estimate ─▶ advantages and returns, whitened over the whole rollout
            ─ update ─▶ the next TrainState (donated), once a mini-batch

One mask decides everywhere: losses, KL, entropy, GAE, whitening and statistics see `batch.policy_mask` only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from searchr1_jax import types
from searchr1_jax.learning import advantages
from searchr1_jax.learning import losses
from searchr1_jax.learning import optimizer
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder

ADVANTAGES = ("gae", "group_standardised")
KL_PLACES = ("reward", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """The algorithm and its constants."""

    advantage: str  # of ADVANTAGES; "gae" brings a value model
    discount: float  # γ
    trace_decay: float  # λ
    whiten: bool  # advantages, once a rollout (GAE only; group advantages are standardised already)
    clip: float  # ε of the policy's ratio
    value_clip: float
    kl_coefficient: float  # β
    kl_in: str  # of KL_PLACES: "reward" (estimator k1) or "loss" (k3)
    entropy_coefficient: float
    value_warmup_steps: int  # first rollouts that train the value model only
    temperature: float  # of the distribution that log-probs are of; the rollout's
    vocab_chunk: int
    compute: decoder.Compute
    policy_optimizer: optimizer.OptimizerConfig
    value_optimizer: optimizer.OptimizerConfig

    def __post_init__(self):
        for name, value, choices in (
            ("advantage", self.advantage, ADVANTAGES),
            ("kl_in", self.kl_in, KL_PLACES),
        ):
            if value not in choices:
                raise ValueError(f"algorithm.{name} is {value!r}; choose from {list(choices)}")

    @property
    def has_value_model(self) -> bool:
        return self.advantage == "gae"


class TrainState(NamedTuple):
    """Everything that learning changes; pure dictionaries of sharded arrays."""

    policy: decoder.Params
    policy_optimizer: optax.OptState
    value: decoder.Params | None
    value_optimizer: optax.OptState | None


class Scores(NamedTuple):
    """What the models say of a batch before it is learned from; all float32[M, B, T]."""

    logp: jax.Array  # of the policy that is about to change: π_old
    reference_logp: jax.Array
    value: jax.Array  # 0 without a value model


class Targets(NamedTuple):
    """What a batch is learned towards; float32[M, B, T], zero outside the mask."""

    advantage: jax.Array
    returns: jax.Array


class Learner:
    """The three programs for one model and one algorithm."""

    def __init__(self, model: model_config.ModelConfig, config: UpdateConfig):
        self.config = config
        self._policy_graph, _ = decoder.abstract(decoder.Policy, model)
        self._value_graph, _ = decoder.abstract(decoder.Value, model)
        self._score = jax.jit(self._score_program)
        self._estimate = jax.jit(self._estimate_program)
        self._update = jax.jit(self._update_program, donate_argnums=0)

    @property
    def compiled(self) -> int:
        """Programs compiled so far; constant after the first step."""
        return self._score._cache_size() + self._estimate._cache_size() + self._update._cache_size()

    def init(self, policy: decoder.Params, value: decoder.Params | None) -> TrainState:
        """A state around these weights, with fresh optimizers; `value` is None without a value model."""
        start = lambda config, params: (
            None if params is None else jax.jit(config.transformation().init)(params)
        )
        c = self.config
        return TrainState(policy, start(c.policy_optimizer, policy), value, start(c.value_optimizer, value))

    def score(self, state: TrainState, reference: decoder.Params, batch: types.Batch) -> Scores:
        return self._score(state.policy, reference, state.value, batch)

    def estimate(
        self, batches: Sequence[types.Batch], scores: Sequence[Scores], group_advantages: Sequence[Any] | None
    ) -> tuple[list[Targets], dict[str, jax.Array]]:
        """Targets of all mini-batches of a rollout together, and statistics of the rollout.

        Args:
          group_advantages: float32[M, B, T] for each mini-batch, where the advantage is not GAE.
        """
        return self._estimate(list(batches), list(scores), group_advantages)

    def update(self, state, batch: types.Batch, scores: Scores, targets: Targets, step: int):
        """The next state and statistics of the update; `state` is donated. `step` counts rollouts from 0."""
        return self._update(state, batch, scores, targets, np.int32(step))

    # The programs.

    def _policy_statistics(self, params, b: types.Batch):
        c = self.config
        return decoder.bind(self._policy_graph, params).token_statistics(
            b.tokens, b.position, b.segment,
            c.compute, temperature=c.temperature, vocab_chunk=c.vocab_chunk,
        )  # fmt: skip

    def _values(self, params, b: types.Batch):
        c = self.config
        model = decoder.bind(self._value_graph, params)
        return model(b.tokens, b.position, b.segment, c.compute)

    def _score_program(self, policy, reference, value, batch: types.Batch) -> Scores:
        arrays = dataclasses.replace(batch, micro_batches=batch.tokens)
        zeros = jnp.zeros_like(batch.reward)

        def one(i, scores):
            b = optimizer.micro_batch(arrays, i)
            logp, _ = self._policy_statistics(policy, b)
            reference_logp, _ = self._policy_statistics(reference, b)
            values = self._values(value, b) if value is not None else jnp.zeros_like(logp)
            new = Scores(logp, reference_logp, values)
            put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0)
            return jax.tree.map(put, scores, new)

        return jax.lax.fori_loop(0, batch.micro_batches, one, Scores(zeros, zeros, zeros))

    def _estimate_program(self, batches, scores, group_advantages):
        c = self.config
        stack = lambda field, records: jnp.stack([getattr(r, field) for r in records])  # [U, M, B, T]
        mask, reward = stack("policy_mask", batches), stack("reward", batches)
        logp, value = stack("logp", scores), stack("value", scores)
        kl = losses.kl_k1(logp, stack("reference_logp", scores))
        sampled = stack("sampled", batches)
        gap = jnp.where(sampled, jnp.abs(logp - stack("behaviour_logp", batches)), 0.0)
        count = jnp.sum(mask)
        mean = lambda x: losses.masked_sum(x, mask) / count
        if c.advantage == "gae":
            if c.kl_in == "reward":
                reward = reward - c.kl_coefficient * kl
            estimates = functools.partial(advantages.gae, discount=c.discount, trace_decay=c.trace_decay)
            advantage = jax.vmap(jax.vmap(estimates))(reward, value, mask, stack("segment", batches))
            returns = jnp.where(mask, advantage + value, 0.0)
            residual = mean(jnp.square(returns - value))
            spread = mean(jnp.square(returns - mean(returns)))
            extra = {
                "value/explained_variance": 1 - residual / jnp.maximum(spread, 1e-8),
                "value/mean": mean(value),
            }
            if c.whiten:
                advantage = advantages.whiten(advantage, mask)
        else:
            advantage = jnp.where(mask, jnp.stack(group_advantages), 0.0)
            returns, extra = jnp.zeros_like(advantage), {}
        statistics = {
            "kl_to_reference": mean(kl),
            "sampler_gap/max": jnp.max(gap),
            "sampler_gap/mean": jnp.sum(gap) / jnp.sum(sampled),
            "policy_tokens": count,
            **extra,
        }
        return [Targets(advantage[u], returns[u]) for u in range(len(batches))], statistics

    def _update_program(self, state: TrainState, batch, scores, targets, step):
        c = self.config
        count = jnp.maximum(jnp.sum(batch.policy_mask), 1)

        def within(b, tree):
            """Zeros outside the mask *before* any loss: a ratio that overflows there has a gradient of inf · 0."""
            return jax.tree.map(lambda x: jnp.where(b.policy_mask, x, 0.0), tree)

        def policy_loss(params, b, s: Scores, t: Targets):
            mean = lambda x: losses.masked_sum(x, b.policy_mask) / count
            (logp, entropy), s, t = within(b, (self._policy_statistics(params, b), s, t))
            surrogate, clipped = losses.ppo_clip(logp, s.logp, t.advantage, clip=c.clip)
            statistics = {
                "policy/loss": mean(surrogate),
                "policy/entropy": mean(entropy),
                "policy/clipped": mean(clipped.astype(jnp.float32)),
                "policy/approximate_kl": mean(losses.kl_k3(s.logp, logp)),
            }
            loss = statistics["policy/loss"] - c.entropy_coefficient * statistics["policy/entropy"]
            if c.kl_in == "loss":
                loss += c.kl_coefficient * mean(losses.kl_k3(logp, s.reference_logp))
            return loss, statistics

        def value_loss(params, b, s: Scores, t: Targets):
            value, s, t = within(b, (self._values(params, b), s, t))
            error = losses.clipped_value(value, s.value, t.returns, clip=c.value_clip)
            loss = losses.masked_sum(error, b.policy_mask) / count
            return loss, {"value/loss": loss}

        gradient, statistics = optimizer.accumulate(policy_loss, state.policy, batch, scores, targets)
        statistics["policy/gradient_norm"] = optax.tree.norm(gradient)
        statistics["policy/learning_rate"] = c.policy_optimizer.learning_rate_at(step)
        new = c.policy_optimizer.apply(gradient, state.policy_optimizer, state.policy, step)
        learn = step >= (c.value_warmup_steps if c.has_value_model else 0)
        old = state.policy, state.policy_optimizer
        policy, policy_optimizer = jax.tree.map(lambda n, o: jnp.where(learn, n, o), new, old)
        state = state._replace(policy=policy, policy_optimizer=policy_optimizer)
        if c.has_value_model:
            gradient, value_statistics = optimizer.accumulate(value_loss, state.value, batch, scores, targets)
            statistics |= value_statistics | {"value/gradient_norm": optax.tree.norm(gradient)}
            value, value_optimizer = c.value_optimizer.apply(
                gradient, state.value_optimizer, state.value, step
            )
            state = state._replace(value=value, value_optimizer=value_optimizer)
        return state, statistics
