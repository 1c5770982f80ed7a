"""The jitted programs of acting, over one donated state.

    extend   append a chunk of known tokens (a prompt, passages, a correction) to some slots
    decode   sample up to N tokens in every running slot, until a stop is reached

A slot is one sequence: its KV cache, its pending last token, and why it is not running. Both programs have one
shape each (extend one per chunk size), and everything that varies is traced, so nothing is compiled twice. A
slot's arithmetic depends on no other slot. An extend row may write several slots: the samples of a question share
the row that appends their prompt, which is how a prompt's cache is forked to its group.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel, settings
from searchr1_jax.models import config as model_config, decoder
from searchr1_jax.rollout import kv_cache, sampling
from searchr1_jax.text import stop_table

# Why a slot is not decoding.
RUNNING, IDLE, TAG, EOS, TURN_FULL, CONTEXT_FULL, NOT_FINITE = range(7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the compiled programs depend on; constant over a run, or sampled tokens would change in last bits."""

    slots: int  # sequences that decode together
    context: int  # C, tokens of an episode at most, prompt included
    decode_tokens: int  # sampled in one call at most
    extend_rows: int  # sequences that one extend call appends to
    extend_chunks: tuple[int, ...]  # tokens of one extend call, ascending
    group: int  # slots that one extend row can write, the samples of a question

    @classmethod
    def of(cls, rollout: settings.Rollout) -> Self:
        return cls(
            slots=rollout.slots,
            context=rollout.context_tokens,
            decode_tokens=rollout.decode_tokens,
            extend_rows=rollout.extend_rows,
            extend_chunks=rollout.extend_chunks,
            group=rollout.samples,
        )


Array = Any  # a jax.Array, numpy before it is sent, or what stands for its shape or layout


class State(NamedTuple):
    """Everything that lives on the device between calls. All arrays but the cache are [S]."""

    cache: kv_cache.KVCache
    length: Array  # int32, tokens in the cache
    pending: Array  # int32, the token after them
    status: Array  # int32, RUNNING or why not
    automaton: Array  # int32, state of the stop table
    turn_tokens: Array  # int32, sampled since the turn began
    key: Array  # uint32[S, 2], folded from everything but the position


class Append(NamedTuple):
    """The rows of an extend call, R of them with up to T tokens for up to G slots each."""

    tokens: Array  # int32[R, T]
    start: Array  # int32[R], tokens that the slots already hold
    count: Array  # int32[R], tokens of the row
    pending: Array  # int32[R], the token after them, from which the slots then run; -1: more is to come
    slots: Array  # int32[R, G], local to the row's shard; beyond it: none
    begin: Array  # int32[R, G], 1 where an episode begins, with
    identity: Array  # uint32[R, G, 4], its (seed, step, question, sample)


class Stops(NamedTuple):
    """Which tokens end a turn."""

    table: Array  # int32[states, V], of the stop automaton
    eos: Array  # bool[V]


class Written(NamedTuple):
    """What one decode call wrote."""

    tokens: Array  # int32[S, decode_tokens]
    logp: Array  # float32[S, decode_tokens], of the tempered distribution, before any truncation
    count: Array  # int32[S], tokens written
    status: Array  # int32[S]
    steps: Array  # int32[], tokens that every running slot was given time for


class Programs:
    """Both programs for a model, shapes and the mesh in use; ValueError where slots or rows do not divide over it."""

    def __init__(
        self,
        config: model_config.ModelConfig,
        shapes: Shapes,
        stops: stop_table.StopTable,
        *,
        max_turn_tokens: int,
        dtype: jnp.dtype,
    ):
        self.config, self.shapes, self.dtype = config, shapes, dtype
        self.shards = parallel.axis_size("batch")
        for name, value in (("slots", shapes.slots), ("extend_rows", shapes.extend_rows)):
            if value % (n := self.shards):
                raise ValueError(f"rollout.{name} of {value} does not divide over {n} shards; use a multiple of it")
        self.slots_per_shard = shapes.slots // self.shards
        self.rows_per_shard = shapes.extend_rows // self.shards
        self._graph, _ = decoder.abstract(decoder.Policy, config)
        self._stops, self._max_turn_tokens = stops, max_turn_tokens
        self.extend = jax.jit(self._extend, donate_argnums=0)
        self.decode = jax.jit(self._decode, donate_argnums=0)
        empty = functools.partial(self._empty, state := self.abstract_state())
        self.empty_state = jax.jit(empty, out_shardings=jax.tree.map(lambda x: x.sharding, state))

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        mesh, slots = jax.sharding.get_mesh(), self.shapes.slots

        def vector(*shape, dtype=jnp.int32):
            spec = parallel.spec("batch", *[None] * (len(shape) - 1))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        cache = kv_cache.abstract(self.config, slots=slots, context=self.shapes.context, dtype=self.dtype)
        ints = vector(slots)
        return State(cache, ints, ints, ints, ints, ints, vector(slots, 2, dtype=jnp.uint32))

    def _empty(self, abstract: State) -> State:
        """All of its slots are idle."""
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        return state._replace(status=jnp.full_like(state.status, IDLE))

    def stops(self, eos_ids: frozenset[int]) -> Stops:
        eos = np.zeros(self.config.vocab_size, bool)
        eos[[i for i in eos_ids if i < self.config.vocab_size]] = True
        return parallel.to_mesh(Stops(self._stops.table.astype(np.int32), eos))

    def _extend(self, state: State, params: decoder.Params, a: Append) -> State:
        policy, context = decoder.bind(self._graph, params), self.shapes.context
        place_T = jnp.arange(a.tokens.shape[1])
        # Padding takes no part: its writes are sent beyond the context, where they are dropped.
        position_RT = jnp.where(place_T >= a.count[:, None], context, a.start[:, None] + place_T)

        def attend(layer, cache, q, k, v):
            return kv_cache.attention(cache, layer, a.slots, position_RT, q, k, v)

        _, cache = policy.decoder(a.tokens, position_RT, attend, state.cache, dtype=self.dtype)
        slots, rows = parallel.spec("batch"), parallel.spec("batch", None)
        of_slots = (slots,) * 5 + (rows,)
        of_rows = Append(rows, slots, slots, slots, rows, rows, parallel.spec("batch", None, None))

        @functools.partial(jax.shard_map, in_specs=(of_slots, of_rows), out_specs=of_slots)
        def place(of_slots, a: Append):
            length, pending, status, automaton, turn, key = of_slots
            # Slots that mean nothing lie beyond the shard, where writes are dropped.
            ready = jnp.where(a.pending[:, None] >= 0, a.slots, self.slots_per_shard)
            begun = jnp.where(a.begin == 1, a.slots, self.slots_per_shard)
            set_ = lambda array, where, value: array.at[where].set(value, mode="drop")
            return (
                set_(length, a.slots, (a.start + a.count)[:, None]),
                set_(pending, ready, a.pending[:, None]),
                set_(set_(status, a.slots, IDLE), ready, RUNNING),
                set_(automaton, ready, self._stops.start),
                set_(turn, ready, 0),
                set_(key, begun, jax.vmap(jax.vmap(sampling.episode_key))(a.identity)),
            )

        return State(cache, *place(tuple(state[1:]), a))

    def _decode(
        self, state: State, params: decoder.Params, stops: Stops, temperature, top_k, top_p, leave_at
    ) -> tuple[State, Written]:
        policy = decoder.bind(self._graph, params)
        slots, steps, context = self.shapes.slots, self.shapes.decode_tokens, self.shapes.context
        vector = parallel.spec("batch")
        waiting_before = jnp.sum(state.status != RUNNING)

        def going(loop):
            step, state, _ = loop
            stopped = jnp.sum(state.status != RUNNING)
            return (step < steps) & (stopped < slots) & (stopped - waiting_before < leave_at)

        def step(loop):
            step, state, (tokens_SN, logp_SN, count) = loop
            running = state.status == RUNNING
            # Who does not run writes nothing, and its length costs nothing.
            position_S1 = jnp.where(running, state.length, context)[:, None]

            def attend(layer, cache, q, k, v):
                return kv_cache.attention(cache, layer, None, position_S1, q, k, v)

            pending_S1 = state.pending[:, None]
            hidden, cache = policy.decoder(pending_S1, position_S1, attend, state.cache, dtype=self.dtype)
            logits_SV = policy.logits(hidden)[:, 0]
            logits_SV = jax.sharding.reshard(logits_SV, parallel.spec("batch", None))
            token, logp = sampling.sample(logits_SV, state.key, state.length + 1, temperature, top_k, top_p)

            ended = stops.eos.at[token].get(out_sharding=vector)
            broken = ~jnp.isfinite(logp)  # NaN: no token was sampled
            writes = running & ~ended & ~broken  # an end-of-sequence token ends the turn and is dropped
            automaton = stops.table.at[state.automaton, token].get(out_sharding=vector)
            length = state.length + writes
            turn_tokens = state.turn_tokens + writes
            tag, turn_full = automaton == self._stops.stop, turn_tokens >= self._max_turn_tokens
            reason = jnp.select(
                [broken, ended, tag, length + 1 >= context, turn_full],
                [NOT_FINITE, EOS, TAG, CONTEXT_FULL, TURN_FULL],
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
            return step + 1, state, (tokens_SN, logp_SN, count + writes)

        zeros = lambda dtype: jnp.zeros((slots, steps), dtype, out_sharding=parallel.spec("batch", None))
        nothing = zeros(jnp.int32), zeros(jnp.float32), jnp.zeros_like(state.length)
        steps, state, written = jax.lax.while_loop(going, step, (jnp.int32(0), state, nothing))
        return state, Written(*written, state.status, steps)
