"""The actor of one host: a state on the host's devices, and what the host loop may do with it.

    load     take a policy's weights over from the learner
    extend   append known tokens to some slots      decode   sample in all running ones      read   fetch what came

The device knows no texts and no episodes; `episodes` does, and keeps the tokens. Calls return as soon as they are
dispatched, but for `load` and `read`.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config, decoder
from searchr1_jax.rollout import hand_over, programs, sampling
from searchr1_jax.text import stop_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an extend call: tokens to append after the `start` that the slots already hold."""

    slots: tuple[int, ...]
    tokens: list[int]  # at most the chunk; the last chunk of an append leaves out the sequence's last token
    start: int
    pending: int | None = None  # with the last chunk: the sequence's last token; the slots then run
    identities: tuple[tuple[int, int, int, int], ...] = ()  # (seed, step, question, sample) where episodes begin


class Engine:
    """State and programs on this process's part of the mesh of all actors, `hosts`. Weights come with `load`.

    ValueError where slots or rows do not divide over the mesh, or the model and the caches do not fit its devices with
    the bytes that lie on each `beside` them, the learner's.
    """

    def __init__(
        self,
        config: model_config.ModelConfig,
        shapes: programs.Shapes,
        stops: stop_table.StopTable,
        *,
        hosts: jax.sharding.Mesh,
        eos_ids: frozenset[int],
        max_turn_tokens: int,
        dtype: jnp.dtype,
        beside: int = 0,
    ):
        self.shapes, self.dtype = shapes, dtype
        self.mesh = parallel.host_mesh(hosts, jax.process_index())
        self._hand_over = hand_over.HandOver(config, hosts=hosts, actor=self.mesh, dtype=dtype)
        weights = parallel.device_bytes(self._hand_over.params)
        with jax.set_mesh(self.mesh):
            self._programs = programs.Programs(config, shapes, stops, max_turn_tokens=max_turn_tokens, dtype=dtype)
            state = parallel.device_bytes(self._programs.abstract_state())
            what = f"{config.family.name} {config.width}x{config.layers} in {jnp.dtype(dtype).name}"
            check_memory(weights, state, parallel.device_memory(self.mesh), beside=beside, what=what)
            self._stops = self._programs.stops(eos_ids)
        self.shards, self.rows_per_shard = self._programs.shards, self._programs.rows_per_shard
        self._params: Any = None
        self._state: Any = None
        self.hand_over_bytes = weights * self.mesh.devices.size  # of this host
        self.hand_over_s = 0.0  # of the last one

    def reset(self) -> None:
        """Empties all slots."""
        self._state = None  # the new one takes its place in memory
        with jax.set_mesh(self.mesh):
            self._state = self._programs.empty_state()

    def load(self, params: decoder.Params) -> None:
        """Takes a policy's weights over; all processes together, under the learner's mesh. All slots are empty then."""
        began = time.perf_counter()
        self.release()
        self._params = jax.block_until_ready(self._hand_over(params))
        self.hand_over_s = time.perf_counter() - began
        self.reset()

    def release(self) -> None:
        """Lets weights and caches go, so that learning has their memory."""
        self._params = self._state = None

    @property
    def compiled(self) -> int:
        """Programs compiled so far; constant after warm-up."""
        return parallel.compiled(self._programs.extend, self._programs.decode)

    def shard_of(self, slot: int) -> int:
        """Which shard holds a slot; a row's slots must be of one shard."""
        return slot // self._programs.slots_per_shard

    def extend(self, rows: list[Row], chunk: int) -> None:
        """Appends to slots; at most `rows_per_shard` rows a shard."""
        (r, g), slots_per_shard = (self.shapes.extend_rows, self.shapes.group), self._programs.slots_per_shard
        ints = lambda *shape: np.zeros(shape, np.int32)
        a = programs.Append(
            tokens=ints(r, chunk), start=ints(r), count=ints(r), pending=ints(r) - 1,
            slots=ints(r, g) + slots_per_shard, begin=ints(r, g), identity=np.zeros((r, g, 4), np.uint32),
        )  # fmt: skip
        used = [0] * self.shards
        for row in rows:
            shard = self.shard_of(row.slots[0])
            i = shard * self.rows_per_shard + used[shard]
            used[shard] += 1
            a.tokens[i, : len(row.tokens)], a.start[i], a.count[i] = row.tokens, row.start, len(row.tokens)
            a.slots[i, : len(row.slots)] = [s % slots_per_shard for s in row.slots]
            if row.pending is not None:
                a.pending[i] = row.pending
            if row.identities:
                a.identity[i, : len(row.slots)], a.begin[i, : len(row.slots)] = row.identities, 1
        with jax.set_mesh(self.mesh):
            append = parallel.to_mesh(a, "batch", None, None)
            self._state = self._programs.extend(self._state, self._params, append)

    def decode(self, decoding: sampling.Decoding, *, leave_at: int) -> programs.Written:
        """Samples in all running slots, until `decode_tokens` or until `leave_at` slots have stopped.

        Returns what the call writes, still on the device; `read` waits for it.
        """
        scalars = np.float32(decoding.temperature), np.int32(decoding.top_k), np.float32(decoding.top_p)
        with jax.set_mesh(self.mesh):
            arguments = parallel.to_mesh((*scalars, np.int32(leave_at)))
            self._state, written = self._programs.decode(self._state, self._params, self._stops, *arguments)
        return written

    def read(self, written: programs.Written) -> programs.Written:
        """Waits for a decode call and fetches what it wrote, as numpy arrays."""
        return parallel.to_host(written)


def check_memory(weights: int, state: int, memory: int | None, *, beside: int = 0, what: str) -> None:
    """Refuses an actor that a device cannot hold; bytes of one device, `memory` None where it does not tell."""
    if memory is not None and weights + state + beside > memory:
        learner = f" beside {beside / 1e9:.2f} GB of the learner" if beside else ""
        raise ValueError(
            f"acting with {what} takes {weights / 1e9:.2f} GB of weights and {state / 1e9:.2f} GB of KV caches on each"
            f" device{learner}, which has {memory / 1e9:.2f} GB; raise mesh.actor_tensor, choose a smaller"
            " model.actor_dtype, lower rollout.slots or rollout.context_tokens"
            + (", or name more in learner.offload" if beside else "")
        )
