"""The jitted programs of acting, over one donated state.

    extend   append a chunk of known tokens (a prompt, passages, a correction) to some slots
    decode   sample up to N tokens in every running slot, until a stop is reached

A slot is one sequence: its KV cache, its pending last token, and why it is not running. The device knows
no texts and no episodes; `episodes` does, and keeps the tokens. Both programs have one shape each (extend
one per chunk size), and everything that varies is traced, so nothing is compiled twice.

A sampling key is folded from (seed, rollout step, question, sample, position) and a slot's arithmetic depends
on no other slot, so the same seed gives the same tokens whatever slot, order or delay they met.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax import parallel
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.rollout import kv_cache
from searchr1_jax.text import stop_table

# Why a slot is not decoding.
RUNNING, IDLE, TAG, EOS, TURN_FULL, CONTEXT_FULL = range(6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the compiled programs depend on; constant over a run, or sampled tokens would change in last bits."""

    slots: int  # sequences that decode together
    context: int  # C, tokens of an episode at most, prompt included
    decode_tokens: int  # sampled in one call at most
    extend_rows: int  # sequences that one extend call appends to
    extend_chunks: tuple[int, ...]  # tokens of one extend call, ascending
    group: int  # slots that one extend row can write, the samples of a question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. All values are traced: changing them compiles nothing."""

    temperature: float = 1.0  # 0 is greedy; log-probs are then those of temperature 1
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the likeliest tokens that together have this much probability, at least one

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p of {self.top_p} is no share of the probability; set it above 0 and up to 1 (all)"
            )


class State(NamedTuple):
    """Everything that lives on the device between calls. All arrays but the cache are [S]."""

    cache: kv_cache.KVCache
    length: jax.Array  # int32, tokens in the cache
    pending: jax.Array  # int32, the token after them
    status: jax.Array  # int32, RUNNING or why not
    automaton: jax.Array  # int32, state of the stop table
    turn_tokens: jax.Array  # int32, sampled since the turn began
    key: jax.Array  # uint32[S, 2], folded from everything but the position


class Decoded(NamedTuple):
    """What one decode call wrote, on the host."""

    tokens: np.ndarray  # int32[S, decode_tokens]
    logp: np.ndarray  # float32[S, decode_tokens], of the tempered distribution, before any truncation
    count: np.ndarray  # int32[S], tokens written
    status: np.ndarray  # int32[S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an extend call: tokens to append after the `start` that the slots already hold."""

    slots: tuple[int, ...]
    tokens: list[int]  # at most the chunk; the last chunk of an append leaves out the sequence's last token
    start: int
    pending: int | None = None  # with the last chunk: the sequence's last token; the slots then run
    identities: tuple[
        tuple[int, int, int, int], ...
    ] = ()  # (seed, step, question, sample) where episodes begin


class Engine:
    """The state on the device and the programs over it. Weights come with `load`."""

    def __init__(
        self,
        config: model_config.ModelConfig,
        shapes: Shapes,
        stops: stop_table.StopTable,
        *,
        eos_ids: frozenset[int],
        max_turn_tokens: int,
        dtype: jnp.dtype,
    ):
        self.config, self.shapes = config, shapes
        self.shards = parallel.axis_size("batch")
        for name, value in (("slots", shapes.slots), ("extend_rows", shapes.extend_rows)):
            if value % self.shards:
                raise ValueError(
                    f"rollout.{name} of {value} does not divide over {self.shards} shards; use a multiple of it"
                )
        self.slots_per_shard = shapes.slots // self.shards
        self.rows_per_shard = shapes.extend_rows // self.shards
        self._graph, _ = decoder.abstract(decoder.Policy, config)
        self._dtype, self._max_turn_tokens, self._stops = dtype, max_turn_tokens, stops
        self._table = parallel.to_mesh(stops.table.astype(np.int32))
        eos = np.zeros(config.vocab_size, bool)
        eos[[i for i in eos_ids if i < config.vocab_size]] = True
        self._is_eos = parallel.to_mesh(eos)
        self._params = None
        self._hand_over = _hand_over(config, dtype)
        self._extend = jax.jit(self._extend_program, donate_argnums=0)
        self._decode = jax.jit(self._decode_program, donate_argnums=0)
        self.reset()

    def reset(self) -> None:
        """Empties all slots."""
        s = self.shapes
        cache = kv_cache.make(self.config, slots=s.slots, context=s.context, dtype=self._dtype)
        zeros = lambda: parallel.to_mesh(np.zeros(s.slots, np.int32), "batch")
        idle = parallel.to_mesh(np.full(s.slots, IDLE, np.int32), "batch")
        keys = parallel.to_mesh(np.zeros((s.slots, 2), np.uint32), "batch", None)
        self._state = State(cache, zeros(), zeros(), idle, zeros(), zeros(), keys)

    def load(self, params: decoder.Params) -> None:
        """Takes a policy's weights over, cast to the engine's dtype and laid out as decoding uses them."""
        self._params = self._hand_over(params)

    @property
    def compiled(self) -> int:
        """Programs compiled so far; constant after warm-up."""
        return self._extend._cache_size() + self._decode._cache_size()

    def shard_of(self, slot: int) -> int:
        """Which shard holds a slot; a row's slots must be of one shard."""
        return slot // self.slots_per_shard

    def extend(self, rows: list[Row], chunk: int) -> None:
        """Appends to slots; at most `rows_per_shard` rows a shard. Returns as soon as it is dispatched."""
        r, g = self.shapes.extend_rows, self.shapes.group
        tokens, start = np.zeros((r, chunk), np.int32), np.zeros(r, np.int32)
        # Rows and slots that mean nothing point beyond the shard, where writes are dropped.
        row_slots = np.full((r, g), self.slots_per_shard, np.int32)
        begin = np.zeros((r, g), np.int32)
        count, pending = np.zeros(r, np.int32), np.full(r, -1, np.int32)
        identity = np.zeros((r, g, 4), np.uint32)
        used = [0] * self.shards
        for row in rows:
            shard = self.shard_of(row.slots[0])
            i = shard * self.rows_per_shard + used[shard]
            used[shard] += 1
            n = len(row.tokens)
            tokens[i, :n], start[i], count[i] = row.tokens, row.start, n
            row_slots[i, : len(row.slots)] = [s % self.slots_per_shard for s in row.slots]
            if row.pending is not None:
                pending[i] = row.pending
            if row.identities:
                identity[i, : len(row.slots)], begin[i, : len(row.slots)] = row.identities, 1
        args = parallel.to_mesh(
            (tokens, start, count, pending, row_slots, begin, identity), "batch", None, None
        )
        self._state = self._extend(self._state, self._params, *args)

    def decode(self, decoding: Decoding, *, leave_at: int) -> jax.Array:
        """Samples in all running slots, until `decode_tokens` or until `leave_at` slots have stopped.

        Returns the call's output still on the device; `read` waits for it.
        """
        scalars = np.float32(decoding.temperature), np.int32(decoding.top_k), np.float32(decoding.top_p)
        arguments = parallel.to_mesh((*scalars, np.int32(leave_at)))
        self._state, output = self._decode(self._state, self._params, self._table, self._is_eos, *arguments)
        return output

    def read(self, output) -> Decoded:
        """Waits for a decode call and fetches what it wrote."""
        return Decoded(*parallel.to_host(output))

    # The programs.

    def _extend_program(
        self, state, params, tokens_RT, start_R, count_R, pending_R, row_slots_RG, begin_RG, identity_RG4
    ):
        policy = decoder.bind(self._graph, params)
        position_RT = start_R[:, None] + jnp.arange(tokens_RT.shape[1])
        # Padding takes no part: its writes are sent beyond the context, where they are dropped.
        padding = jnp.arange(tokens_RT.shape[1]) >= count_R[:, None]
        position_RT = jnp.where(padding, self.shapes.context, position_RT)

        def attend(layer, cache, q, k, v):
            return kv_cache.attention(cache, layer, row_slots_RG, position_RT, q, k, v)

        _, cache = policy.decoder(tokens_RT, position_RT, attend, state.cache, dtype=self._dtype)
        slots, rows = parallel.spec("batch"), parallel.spec("batch", None)

        @functools.partial(
            jax.shard_map,
            in_specs=(slots,) * 5 + (rows,) + (slots,) * 3 + (rows, rows, parallel.spec("batch", None, None)),
            out_specs=(slots,) * 5 + (rows,),
        )
        def place(
            length, pending, status, automaton, turn, key, start, count, last, row_slots, begin, identity
        ):
            set_ = lambda array, value: array.at[row_slots].set(value, mode="drop")
            ready = jnp.where(last[:, None] >= 0, row_slots, self.slots_per_shard)
            run = lambda array, value: array.at[ready].set(value, mode="drop")
            begun = jnp.where(begin == 1, row_slots, self.slots_per_shard)
            return (
                set_(length, (start + count)[:, None]),
                run(pending, last[:, None]),
                run(set_(status, IDLE), RUNNING),
                run(automaton, self._stops.start),
                run(turn, 0),
                key.at[begun].set(jax.vmap(jax.vmap(episode_key))(identity), mode="drop"),
            )

        return State(
            cache, *place(*state[1:], start_R, count_R, pending_R, row_slots_RG, begin_RG, identity_RG4)
        )

    def _decode_program(self, state, params, table, is_eos, temperature, top_k, top_p, leave_at):
        policy = decoder.bind(self._graph, params)
        slots, steps = self.shapes.slots, self.shapes.decode_tokens
        vector = parallel.spec("batch")
        local = np.arange(slots, dtype=np.int32) % self.slots_per_shard
        local_slots_S1 = jax.sharding.reshard(jnp.asarray(local)[:, None], parallel.spec("batch", None))
        waiting_before = jnp.sum(state.status != RUNNING)

        def going(loop):
            step, state, *_ = loop
            stopped = jnp.sum(state.status != RUNNING)
            return (step < steps) & (stopped < slots) & (stopped - waiting_before < leave_at)

        def step(loop):
            step, state, tokens_SN, logp_SN, count = loop
            position_S1 = state.length[:, None]

            def attend(layer, cache, q, k, v):
                return kv_cache.attention(cache, layer, local_slots_S1, position_S1, q, k, v)

            pending_S1 = state.pending[:, None]
            hidden, cache = policy.decoder(pending_S1, position_S1, attend, state.cache, dtype=self._dtype)
            logits_SV = policy.logits(hidden)[:, 0]
            logits_SV = jax.sharding.reshard(logits_SV, parallel.spec("batch", None))
            token, logp = sample(logits_SV, state.key, state.length + 1, temperature, top_k, top_p)

            running = state.status == RUNNING
            ended = is_eos.at[token].get(out_sharding=vector)
            writes = running & ~ended  # an end-of-sequence token ends the turn and is dropped
            automaton = table.at[state.automaton, token].get(out_sharding=vector)
            length = state.length + writes
            turn_tokens = state.turn_tokens + writes
            reason = jnp.select(
                [
                    ended,
                    automaton == self._stops.stop,
                    length + 1 >= self.shapes.context,
                    turn_tokens >= self._max_turn_tokens,
                ],
                [EOS, TAG, CONTEXT_FULL, TURN_FULL],
                RUNNING,
            )
            here = writes[:, None] & (jnp.arange(steps) == count[:, None])
            state = State(
                cache=cache,
                length=length,
                pending=jnp.where(writes, token, state.pending),
                status=jnp.where(running, reason, state.status),
                automaton=jnp.where(writes, automaton, state.automaton),
                turn_tokens=turn_tokens,
                key=state.key,
            )
            tokens_SN = jnp.where(here, token[:, None], tokens_SN)
            logp_SN = jnp.where(here, logp[:, None], logp_SN)
            return step + 1, state, tokens_SN, logp_SN, count + writes

        zeros = lambda dtype: jnp.zeros((slots, steps), dtype, out_sharding=parallel.spec("batch", None))
        loop = (0, state, zeros(jnp.int32), zeros(jnp.float32), jnp.zeros_like(state.length))
        _, state, tokens, logp, count = jax.lax.while_loop(going, step, loop)
        return state, (tokens, logp, count, state.status)


def sample(logits_SV, key_S2, position_S, temperature, top_k, top_p) -> tuple[jax.Array, jax.Array]:
    """One token for each slot, and its log-prob under the tempered, not truncated, distribution.

    Args:
      logits_SV: float32[S, V]; the vocabulary whole on every shard.
      key_S2: uint32[S, 2], folded here with the position that the token takes.
      temperature, top_k, top_p: scalars, traced; temperature 0 takes the likeliest token.
    Returns: int32[S] and float32[S].
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
    token = jnp.argmax(jnp.where(greedy, logits_SV, allowed + noise), axis=-1).astype(jnp.int32)
    chosen = jax.lax.broadcasted_iota(
        jnp.int32, logits_SV.shape, 1, out_sharding=jax.typeof(logits_SV).sharding.spec
    )
    chosen = jnp.sum(jnp.where(chosen == token[:, None], logits_SV, 0.0), axis=-1)
    return token, chosen - jax.nn.logsumexp(logits_SV, axis=-1)


def episode_key(identity_4: jax.Array) -> jax.Array:
    """uint32[2]: the key of one episode, of (seed, rollout step, question, sample) as uint32[4]."""
    key = jax.random.key(0)
    for i in range(4):
        key = jax.random.fold_in(key, identity_4[i])
    return jax.random.key_data(key)


def _hand_over(config: model_config.ModelConfig, dtype: jnp.dtype):
    """The program that turns the learner's weights into the actor's: cast, and whole over fsdp."""
    _, target = decoder.abstract(decoder.Policy, config, gathered=True)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params), out_shardings=shardings)
