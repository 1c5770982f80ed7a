"""Weights from the learner to the actors of every host.

    learner   [data, fsdp, tensor] over all devices      weights split over fsdp and tensor
        │ cast, and exchanged so that tensor splits them as it does for the actors; still in as many parts
    hosts     [hosts, data, 1, tensor], the same devices
        │ gathered, a layer at a time: each host has a whole copy
    actor     [data, 1, tensor], one host's devices      its own shards of that; nothing moves

Gathering at once what is split otherwise would hold several copies of the weights on the way: 9.7 GB beside the
3.8 GB of a 7B model's share, on each of the 16 chips of a v5e slice, as `tests/test_tpu_compile.py` sees it. All
processes call it together; acting itself then needs no other host.
"""

import jax
import jax.numpy as jnp

from searchr1_jax.core import parallel
from searchr1_jax.models import config as model_config, decoder


class HandOver:
    """The programs for one model; `hosts` is the mesh of all actors (`parallel.hosts_mesh`), `actor` this host's."""

    def __init__(
        self, config: model_config.ModelConfig, *, hosts: jax.sharding.Mesh, actor: jax.sharding.Mesh, dtype: jnp.dtype
    ):
        with jax.set_mesh(actor):
            _, self.params = decoder.abstract(decoder.Policy, config, dtype, gathered=True)
            _, split = decoder.abstract(decoder.Policy, config, dtype)
        self.hosts, self._replicas = hosts, parallel.replicas(hosts)
        on_hosts = lambda spec: jax.sharding.NamedSharding(hosts, spec)
        whole = jax.tree.map(lambda x: x.sharding.spec, self.params)
        parts = jax.tree.map(lambda x: parallel.over_hosts(x.sharding.spec, x.shape, hosts), split)
        cast = lambda params: jax.tree.map(lambda x: x.astype(dtype), params)
        self.parts = jax.tree.map(on_hosts, parts)
        self.exchange = jax.jit(cast, out_shardings=self.parts)
        gather = lambda params: jax.tree.map(_gather, params, whole)
        self.gather = jax.jit(gather, out_shardings=jax.tree.map(on_hosts, whole))

    def __call__(self, params: decoder.Params) -> decoder.Params:
        """The actor's weights of the learner's; called under the learner's mesh."""
        params = self.exchange(params)
        if self._replicas > 1:
            with jax.set_mesh(self.hosts):
                params = self.gather(params)

        place = jax.make_array_from_single_device_arrays
        mine = lambda array: [shard.data for shard in array.addressable_shards]
        return jax.tree.map(lambda array, to: place(array.shape, to.sharding, mine(array)), params, self.params)


def _gather(weight: jax.Array, spec: jax.P) -> jax.Array:
    """The weight as `spec` has it; stacked ones a layer at a time, so that no second copy is held."""
    if weight.ndim < 3:
        return jax.sharding.reshard(weight, spec)
    return jax.lax.map(lambda layer: jax.sharding.reshard(layer, jax.P(*spec[1:])), weight)
