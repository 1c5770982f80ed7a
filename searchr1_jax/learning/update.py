"""One step of reinforcement learning: score, estimate, update — three jitted programs over packed batches.

    batches ─ score ─▶ log-probs of policy and reference, values
            ─ estimate ─▶ advantages and returns, whitened over the whole rollout
            ─ update ─▶ the next TrainState (donated), once a mini-batch

One mask decides everywhere: losses, KL, entropy, GAE, whitening and statistics see `batch.policy_mask` only. (A
switch of the config gives GAE, whitening and the value loss what the published code gives them, for comparison.)
Losses are sums weighted by `batch.weight`, so nothing depends on how a mini-batch is cut into micro-batches.
"""

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from searchr1_jax.core import parallel, settings as settings_lib, types
from searchr1_jax.learning import advantages, losses, optimizer
from searchr1_jax.models import config as model_config, decoder


class TrainState(NamedTuple):
    """Everything that learning changes; pure dictionaries of sharded arrays."""

    policy: decoder.Params
    policy_optimizer: Any  # of optax
    value: decoder.Params | None
    value_optimizer: Any


class Scores(NamedTuple):
    """What the models say of a batch before it is learned from; all float32[M, B, T]."""

    logp: jax.Array  # of the policy that is about to change: π_old
    reference_logp: jax.Array  # 0 without a reference
    value: jax.Array  # 0 without a value model


class Targets(NamedTuple):
    """What a batch is learned towards; float32[M, B, T], zero where nothing is learned."""

    advantage: jax.Array
    returns: jax.Array


class Learner:
    """The three programs for one model and one algorithm.

    Of the settings, sections algorithm, learner, model, policy and value are heeded, and rollout.temperature.
    ValueError where a name of theirs is unknown, or a micro-batch's rows do not divide over the mesh.
    """

    def __init__(self, model: model_config.ModelConfig, settings: settings_lib.Settings):
        rows, shards = settings.learner.micro_batch_rows, parallel.axis_size("batch")
        if rows % shards:
            raise ValueError(
                f"learner.micro_batch_rows of {rows} does not divide over {shards} shards (mesh.data x mesh.fsdp); use"
                " a multiple of it"
            )
        self.settings, a = settings, settings.algorithm
        self._advantage, self._policy_loss = advantages.find(a.advantage), losses.find_policy_loss(a.policy_loss)
        self._kl = losses.find_kl(a.kl_estimator)
        self.has_reference, self.has_value_model = a.kl_coefficient > 0, self._advantage.needs_value
        self.policy_optimizer = optimizer.AdamW(settings.policy, settings.learner.steps)  # steps are rollouts
        self.value_optimizer = optimizer.AdamW(settings.value, settings.learner.steps)
        self._compute = decoder.Compute.of(settings.model)
        self._policy_graph, _ = decoder.abstract(decoder.Policy, model)
        self._value_graph, _ = decoder.abstract(decoder.Value, model)
        self._score: Any = jax.jit(self._score_program)
        self._estimate: Any = jax.jit(self._estimate_program)
        self._update: Any = jax.jit(self._update_program, donate_argnums=0)

    @property
    def compiled(self) -> int:
        """Programs compiled so far; constant after the first step."""
        return parallel.compiled(self._score, self._estimate, self._update)

    def resident_bytes(self, model: model_config.ModelConfig) -> int:
        """Of each device, what stays there between updates: weights, the optimizers' moments, the reference."""
        waits = self.settings.learner.offload
        of = lambda kind, dtype: parallel.device_bytes(decoder.abstract(kind, model, jnp.dtype(dtype))[1])
        kinds = (decoder.Policy, decoder.Value) if self.has_value_model else (decoder.Policy,)
        learned = (1 if "optimizer" in waits else 3) * sum(of(kind, self.settings.model.param_dtype) for kind in kinds)
        kept = self.has_reference and "reference" not in waits
        return learned + (of(decoder.Policy, self.settings.model.reference_dtype) if kept else 0)

    def init(self, policy: decoder.Params, value: decoder.Params | None) -> TrainState:
        """A state around these weights, with fresh optimizers; `value` is None without a value model.

        ValueError where an optimizer is to wait in a host memory that there is not.
        """
        start = lambda adam, params: jax.jit(adam.transformation().init)(params)
        of_value = None if value is None else start(self.value_optimizer, value)
        state = TrainState(policy, start(self.policy_optimizer, policy), value, of_value)
        return self._move_optimizers(state, parallel.in_host_memory)

    def keep(self, reference: decoder.Params) -> decoder.Params:
        """The reference where it waits for `score`."""
        return parallel.in_host_memory(reference) if "reference" in self.settings.learner.offload else reference

    def score(self, state: TrainState, reference: decoder.Params | None, batch: types.Batch) -> Scores:
        if "reference" in self.settings.learner.offload:
            reference = parallel.in_device_memory(reference)
        return self._score(state.policy, reference, state.value, batch)

    def estimate(
        self, batches: list[types.Batch], scores: list[Scores], group_advantages: list | None, *, kl_coefficient: float
    ) -> tuple[list[Targets], dict[str, jax.Array]]:
        """Targets of all mini-batches of a rollout together, and statistics of the rollout.

        `group_advantages` are float32[M, B, T] for each mini-batch, where they are estimated within groups.
        """
        return self._estimate(batches, scores, group_advantages, np.float32(kl_coefficient))

    def update(
        self,
        state: TrainState,
        batch: types.Batch,
        scores: Scores,
        targets: Targets,
        step: int,
        *,
        kl_coefficient: float,
        rate_scale: float = 1.0,
    ):
        """The next state (`state` is donated) and statistics of the update; `step` counts rollouts from 0.

        β and `rate_scale`, of both learning rates, are traced.
        """
        scalars = np.int32(step), np.float32(kl_coefficient), np.float32(rate_scale)
        state = self._move_optimizers(state, parallel.in_device_memory)
        state, statistics = self._update(state, batch, scores, targets, *scalars)
        return self._move_optimizers(state, parallel.in_host_memory), statistics

    def _move_optimizers(self, state: TrainState, move: Callable[[Any], Any]) -> TrainState:
        """Where they wait in the hosts' memory between updates."""
        if "optimizer" not in self.settings.learner.offload:
            return state
        moved = {"policy_optimizer": move(state.policy_optimizer), "value_optimizer": move(state.value_optimizer)}
        return state._replace(**moved)

    # The programs.

    def _policy_statistics(self, params, b: types.Batch):
        options = {"temperature": self.settings.rollout.temperature, "vocab_chunk": self.settings.learner.vocab_chunk}
        policy = decoder.bind(self._policy_graph, params)
        return policy.token_statistics(b.tokens, b.position, b.segment, self._compute, **options)

    def _values(self, params, b: types.Batch):
        return decoder.bind(self._value_graph, params)(b.tokens, b.position, b.segment, self._compute)

    def _score_program(self, policy, reference, value, batch: types.Batch) -> Scores:
        arrays = dataclasses.replace(batch, micro_batches=batch.tokens)
        zeros = jnp.zeros_like(batch.reward)

        def one(i, scores):
            b = optimizer.micro_batch(arrays, i)
            logp, _ = self._policy_statistics(policy, b)
            reference_logp = jnp.zeros_like(logp)
            if reference is not None:
                reference_logp, _ = self._policy_statistics(reference, b)
            values = self._values(value, b) if value is not None else jnp.zeros_like(logp)
            new = Scores(logp, reference_logp, values)
            put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0)
            return jax.tree.map(put, scores, new)

        return jax.lax.fori_loop(0, batch.micro_batches, one, Scores(zeros, zeros, zeros))

    def _estimate_program(self, batches, scores, group_advantages, kl_coefficient):
        a = self.settings.algorithm
        stack = lambda field, records: jnp.stack([getattr(r, field) for r in records])  # [U, M, B, T]
        mask, reward = stack("policy_mask", batches), stack("reward", batches)
        estimated = mask if a.mask_estimates else stack("response", batches)
        logp, value = stack("logp", scores), stack("value", scores)
        sampled = stack("sampled", batches)
        gap = jnp.where(sampled, jnp.abs(logp - stack("behaviour_logp", batches)), 0.0)
        count = jnp.sum(mask)
        mean = lambda x, of=mask: losses.masked_sum(x, of) / jnp.maximum(jnp.sum(of), 1)
        statistics = {
            "sampler_gap/max": jnp.max(gap),
            "sampler_gap/mean": jnp.sum(gap) / jnp.maximum(jnp.sum(sampled), 1),
            "policy_tokens": count,
        }
        if self.has_reference:
            reference_logp = stack("reference_logp", scores)
            statistics["kl_to_reference"] = mean(losses.kl_k1(logp, reference_logp))
            if a.kl_in == "reward":
                reward = reward - kl_coefficient * jnp.where(mask, self._kl(logp, reference_logp), 0.0)
        returns = jnp.zeros_like(reward)
        if (of_tokens := self._advantage.of_tokens) is None:
            advantage = jnp.stack(group_advantages)
        else:
            estimate = lambda *arrays: of_tokens(*arrays, a)
            advantage = jax.vmap(jax.vmap(estimate))(reward, value, estimated, stack("segment", batches))
            if self.has_value_model:
                returns = jnp.where(estimated, advantage + value, 0.0)
                residual = mean(jnp.square(returns - value), estimated)
                spread = mean(jnp.square(returns - mean(returns, estimated)), estimated)
                statistics["value/explained_variance"] = 1 - residual / jnp.maximum(spread, 1e-8)
                statistics["value/mean"] = mean(value)
            if a.whiten:
                advantage = advantages.whiten(advantage, estimated)
        advantage = jnp.where(mask, advantage, 0.0)
        return [Targets(advantage[u], returns[u]) for u in range(len(batches))], statistics

    def _loss_of_policy(self, params, b: types.Batch, s: Scores, t: Targets, count, kl_coefficient):
        """The loss of a micro-batch, and statistics that add up to means over the mini-batch's tokens."""
        a = self.settings.algorithm
        mean = lambda x: losses.masked_sum(x, b.policy_mask) / count
        weighted = lambda x: losses.masked_sum(b.weight * x, b.policy_mask)
        behaviour = jnp.where(b.sampled, b.behaviour_logp, s.logp)  # nobody sampled the environment's tokens
        logp, entropy = self._policy_statistics(params, b)
        (logp, entropy), s, t, behaviour = _within(b.policy_mask, ((logp, entropy), s, t, behaviour))
        written = losses.Written(logp, s.logp, behaviour, t.advantage, b.policy_mask, b.segment, b.turn)
        surrogate, clipped = self._policy_loss.of_tokens(written, a)
        statistics = {
            "policy/entropy": mean(entropy),
            "policy/clipped": mean(clipped.astype(jnp.float32)),
            "policy/approximate_kl": mean(losses.kl_k3(s.logp, logp)),
            "policy/ratio_beyond_2": mean((jnp.abs(logp - s.logp) > np.log(2)).astype(jnp.float32)),
        }
        if a.importance_cap:
            weight = losses.truncated_importance(s.logp, behaviour, cap=a.importance_cap)
            surrogate = weight * surrogate
            statistics["policy/importance"] = mean(weight)
        statistics["policy/loss"] = weighted(surrogate)
        loss = statistics["policy/loss"] - a.entropy_coefficient * weighted(entropy)
        if self.has_reference and a.kl_in == "loss":
            loss += kl_coefficient * weighted(self._kl(logp, s.reference_logp))
        return loss, statistics

    def _loss_of_value(self, params, b: types.Batch, s: Scores, t: Targets, mask, count):
        value, s, t = _within(mask, (self._values(params, b), s, t))
        error = losses.clipped_value(value, s.value, t.returns, clip=self.settings.algorithm.value_clip)
        loss = losses.masked_sum(error, mask) / count
        return loss, {"value/loss": loss}

    def _update_program(self, state: TrainState, batch, scores, targets, step, kl_coefficient, rate_scale):
        count_in = lambda mask: jnp.maximum(jnp.sum(mask), 1)
        count = count_in(batch.policy_mask)

        def policy_loss(params, b, s: Scores, t: Targets):
            return self._loss_of_policy(params, b, s, t, count, kl_coefficient)

        gradient, statistics = optimizer.accumulate(policy_loss, state.policy, batch, scores, targets)
        statistics["policy/gradient_norm"] = optax.tree.norm(gradient)
        statistics["policy/learning_rate"] = rate_scale * self.policy_optimizer.learning_rate_at(step)
        new = self.policy_optimizer.apply(gradient, state.policy_optimizer, state.policy, step, rate_scale)
        learn = step >= (self.settings.learner.value_warmup_steps if self.has_value_model else 0)
        old = state.policy, state.policy_optimizer
        policy, policy_optimizer = jax.tree.map(lambda n, o: jnp.where(learn, n, o), new, old)
        state = state._replace(policy=policy, policy_optimizer=policy_optimizer)
        if self.has_value_model:
            estimated = lambda b: b.policy_mask if self.settings.algorithm.mask_estimates else b.response
            value_count = count_in(estimated(batch))

            def value_loss(params, b, s: Scores, t: Targets):
                return self._loss_of_value(params, b, s, t, estimated(b), value_count)

            gradient, value_statistics = optimizer.accumulate(value_loss, state.value, batch, scores, targets)
            statistics |= value_statistics | {"value/gradient_norm": optax.tree.norm(gradient)}
            new = self.value_optimizer.apply(gradient, state.value_optimizer, state.value, step, rate_scale)
            state = state._replace(value=new[0], value_optimizer=new[1])
        return state, statistics


def _within(mask, tree):
    """Zeros outside the mask *before* any loss: a ratio that overflows there has a gradient of inf · 0."""
    return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), tree)
