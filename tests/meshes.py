"""Meshes of the first virtual devices."""

import jax

from searchr1_jax.core import parallel


def make(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """As many devices as the shape asks for; without arguments a laptop's."""
    devices = jax.devices()[: data * fsdp * tensor]
    return parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
