"""The mesh, and the one table that maps logical axes of arrays to its axes.

Every parameter and activation names its dimensions logically ("embed", "heads", "batch", …); this file alone
knows which mesh axis that is. The mesh is always explicit (`jax.sharding.AxisType.Explicit`), also 1x1x1 on a
laptop: shardings are part of types, so what would silently lose its layout is an error instead.

    data    replicas of the model, each with its own rows
    fsdp    rows too, and the width of every weight, gathered layer by layer where it is used
    tensor  heads, feed-forward width and vocabulary

Learning is global: every process issues the same programs over the mesh of all devices. Acting is local: each
process has a mesh of its own devices, and what they made is exchanged between steps (`gather`).
"""

import math
import pickle
from typing import Any, Sequence

import jax
from jax.experimental import multihost_utils
import numpy as np

from searchr1_jax.core import cluster

AXES = ("data", "fsdp", "tensor")
HOST_MEMORY = "pinned_host"
_EXCHANGED = 1 << 26  # bytes of all processes that a device holds at once while they exchange something

Device = Any  # jax.Device, which type checkers take for a variable

# Logical axis -> mesh axes. Axes not named here are never split.
LOGICAL_AXES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of a batch, slots of the rollout engine
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Device] | None = None):
    """Mesh of shape (data, fsdp, tensor); at most one of them may be -1, "what remains".

    On several hosts the devices of one lie together, so that the inner axes stay within a host.

    Raises:
      ValueError: where the product is not the number of devices.
    """
    devices = list(devices or jax.devices())
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = max(1, len(devices) // math.prod(n for n in shape if n != -1))
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices;"
            " set mesh.* to factors of that number (one of them may be -1, what remains)"
        )
    if len({device.process_index for device in devices}) > 1:
        ordered = sorted(devices, key=lambda device: device.process_index)
        return _explicit(np.array(ordered).reshape(shape), AXES)
    axis_types = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=axis_types, devices=devices)


def hosts_mesh(mesh: jax.sharding.Mesh, *, tensor: int) -> jax.sharding.Mesh:
    """The devices of a mesh, host by host: (hosts, data, 1, tensor), `tensor` shards within each host.

    Raises:
      ValueError: where a host's devices do not divide by `tensor`.
    """
    devices = mesh.devices.ravel()
    hosts = len({device.process_index for device in devices})
    local = len(devices) // hosts
    if tensor < 1 or local % tensor:
        raise ValueError(
            f"mesh.actor_tensor of {tensor} does not divide the {local} devices of a host; use a divisor of them"
        )
    return _explicit(devices.reshape(hosts, local // tensor, 1, tensor), ("hosts", *AXES))


def over_hosts(spec: jax.P, shape: Sequence[int], hosts: jax.sharding.Mesh) -> jax.P:
    """The spec with what is split over fsdp split over the actors' replicas instead, where it divides."""
    parts = lambda size: ("hosts", "data") if size % replicas(hosts) == 0 else None
    names = zip(spec, shape[: len(spec)], strict=True)
    return jax.P(*(parts(size) if name == "fsdp" else name for name, size in names))


def replicas(hosts: jax.sharding.Mesh) -> int:
    """Copies of the weights that the actors of a `hosts_mesh` hold together."""
    return hosts.shape["hosts"] * hosts.shape["data"]


def host_mesh(hosts: jax.sharding.Mesh, process: int) -> jax.sharding.Mesh:
    """The part of a `hosts_mesh` that is one process's own, with the axes of every mesh."""
    (mine,) = (part for part in hosts.devices if part.flat[0].process_index == process)
    return _explicit(mine, AXES)


def _explicit(devices: np.ndarray, axes: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices, axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes))


def axis_size(logical: str) -> int:
    """Number of shards that a logical axis is split into on the mesh in use."""
    mesh_axes = LOGICAL_AXES[logical]
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[a] for a in ((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes))


def spec(*logical: str | None) -> jax.P:
    """PartitionSpec of an array whose dimensions carry these logical names (None: not split)."""
    return jax.P(*(LOGICAL_AXES.get(name) if name else None for name in logical))


def param_spec(axes: Sequence[str | None], shape: Sequence[int], *, gathered: bool = False) -> jax.P:
    """PartitionSpec of a weight; `gathered` leaves out fsdp, the layout in which it is used.

    Key/value heads of which several tensor shards share one are replicated: splitting a head's width instead
    would cost a reduction in every attention.

    Raises:
      ValueError: where a dimension does not divide otherwise.
    """
    names: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        shards = axis_size(name) if name in LOGICAL_AXES else 1
        shared = name == "kv_heads" and size < shards and shards % size == 0
        if shared or gathered and name == "embed":
            names.append(None)
            continue
        if name is not None and size % shards:
            raise ValueError(
                f"{name} of {size} does not divide over {shards} shards (mesh axis {LOGICAL_AXES[name]});"
                " choose a mesh whose axis divides it"
            )
        names.append(name)
    return spec(*names)


def gather_weight(weight: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """The weight in the layout in which it is used: whole over fsdp, split over tensor."""
    return jax.sharding.reshard(weight, param_spec(axes, weight.shape, gathered=True))


def to_mesh(tree: Any, *logical: str | None) -> Any:
    """Host arrays (the same on every process) as global arrays, dimensions split as the logical names say.

    Names beyond an array's rank are left out, so that scalars travel with the rest.
    """
    mesh = jax.sharding.get_mesh()

    def put(x):
        x = np.asarray(x)
        sharding = jax.sharding.NamedSharding(mesh, spec(*logical[: x.ndim]))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def in_host_memory(tree: Any) -> Any:
    """The arrays in the memory of their hosts, split as they are; no device holds them any more.

    Raises:
      ValueError: where the devices cannot reach such a memory.
    """
    device = jax.sharding.get_mesh().local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"learner.offload needs a {HOST_MEMORY} memory, and {device.device_kind} has {kinds}; leave it empty"
        )
    return _in_memory(tree, HOST_MEMORY)


def in_device_memory(tree: Any) -> Any:
    """The inverse of `in_host_memory`; arrays already there stay."""
    return _in_memory(tree, jax.sharding.get_mesh().local_devices[0].default_memory().kind)


def _in_memory(tree: Any, kind: str) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)


def to_host(tree: Any) -> Any:
    """Arrays as numpy arrays, whole, on every process."""
    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def device_bytes(tree: Any) -> int:
    """What each device holds of arrays, or will of `ShapeDtypeStruct`s with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a device of the mesh may use; None where the backend does not tell (a CPU's)."""
    statistics = mesh.devices.flat[0].memory_stats() or {}
    return statistics.get("bytes_limit")


def compiled(*jitted: Any) -> int:
    """Programs that these jitted functions have been compiled to so far."""
    return sum(function._cache_size() for function in jitted)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def mine(items: Sequence[Any]) -> Sequence[Any]:
    """This process's share of what all processes were given."""
    return items[jax.process_index() :: jax.process_count()]


def agree(what: str, value: Any) -> None:
    """Raises ValueError, on all processes, where one has another value than the first, and names it."""
    found = gather((cluster.name(), value))
    if others := [name for name, theirs in found if theirs != found[0][1]]:
        raise ValueError(f"{what} is not the same on {', '.join(others)} as on {found[0][0]}; start all of them alike")


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of processes, on every process; anything that can be pickled."""
    with cluster.waiting():
        return [value] if jax.process_count() == 1 else _exchanged(value)


def _exchanged(value: Any) -> list[Any]:
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(data)))
    # In rounds, so that no device ever holds more than _EXCHANGED; few sizes, as each is a program of its own.
    most = max(1, _EXCHANGED // jax.process_count())
    length = min(most, 1 << int(sizes.max()).bit_length())
    rounds = []
    for begin in range(0, int(sizes.max()), length):
        part = data[begin : begin + length]
        rounds.append(multihost_utils.process_allgather(np.pad(part, (0, length - len(part)))))
    rows = np.concatenate(rounds, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def sum_over(logical: str, x: jax.Array) -> jax.Array:
    """The sum over the shards of a logical axis, on each of them, inside a `shard_map`."""
    return jax.lax.psum(x, LOGICAL_AXES[logical])


def shard_index(logical: str) -> jax.Array:
    """Which shard of a logical axis this is, inside a `shard_map`; for axes that are one mesh axis."""
    return jax.lax.axis_index(LOGICAL_AXES[logical])
