"""How one token is chosen for each slot, and with which random numbers.

A sampling key is folded from (seed, rollout step, question, sample, position): the same token is drawn whatever
slot, order or delay its episode met.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. All values are traced: changing them compiles nothing."""

    temperature: float = 1.0  # 0 is greedy; log-probs are then those of temperature 1
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the likeliest tokens that together have this much probability, at least one


def sample(logits_SV, key_S2, position_S, temperature, top_k, top_p) -> tuple[jax.Array, jax.Array]:
    """One token for each slot, int32[S], and its log-prob under the tempered, not truncated, distribution.

    Args:
      logits_SV: float32[S, V]; the vocabulary whole on every shard.
      key_S2: uint32[S, 2], folded here with the position that the token takes.
      temperature, top_k, top_p: scalars, traced, as in `Decoding`.
    """
    vocabulary = logits_SV.shape[-1]
    greedy = temperature <= 0
    logits_SV = logits_SV / jnp.where(greedy, 1.0, temperature)

    def truncated():
        ordered = -jnp.sort(-logits_SV, axis=-1)
        kept = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
        inside = (before < top_p) & (jnp.arange(vocabulary) < kept)
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits_SV >= least, logits_SV, -jnp.inf)

    allowed = jax.lax.cond((top_k > 0) | (top_p < 1), truncated, lambda: logits_SV)

    def gumbel(key, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key), position), (vocabulary,))

    noise = jax.vmap(gumbel)(key_S2, position_S)
    scores = jnp.where(greedy, logits_SV, allowed + noise)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1, out_sharding=jax.typeof(scores).sharding.spec)
    # The first of the highest; XLA's argmax takes ten times as long on a CPU.
    highest = jnp.max(scores, axis=-1, keepdims=True)
    token = jnp.min(jnp.where(scores == highest, index, vocabulary - 1), axis=-1)
    chosen = jnp.sum(jnp.where(index == token[:, None], logits_SV, 0.0), axis=-1)
    return token, chosen - jax.nn.logsumexp(logits_SV, axis=-1)


def episode_key(identity_4: jax.Array) -> jax.Array:
    """uint32[2]: the key of one episode, of (seed, rollout step, question, sample) as uint32[4]."""
    key = jax.random.key(0)
    for i in range(4):
        key = jax.random.fold_in(key, identity_4[i])
    return jax.random.key_data(key)
