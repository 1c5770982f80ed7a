"""Causal attention within the segments of packed rows, by the kernel that fits the machine.

    xla      plain JAX: any machine
    cudnn    cuDNN's fused kernel: NVIDIA GPUs, bf16 or f16
    splash   the Pallas kernel for TPUs (interpreted elsewhere, for tests)

Each function sees one shard: whole heads, whole rows, N a multiple of K.

        segment  1 1 2 2 0        token 3 (the second 2) sees  0 0 1 1 0
"""

from collections.abc import Callable
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_LANES = 128  # splash works on blocks of this many positions
_BLOCK = 512  # at most


def xla(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, implementation: Literal["cudnn"] | None = None) -> jax.Array:
    """An empty place sees the empty places before it and itself, so no softmax is over nothing."""
    time = segment_BT.shape[1]
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    visible = (same & jnp.tril(jnp.ones((time, time), bool)))[:, None]  # bool[B, 1, T, S]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=visible, implementation=implementation)


def splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, *, interpret: bool = False) -> jax.Array:
    """Rows are padded to whole blocks; padding is a segment of its own that nothing looks at."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    batch, time, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    padded = -(-time // _LANES) * _LANES
    block = next(size for size in (_BLOCK, 384, 256, _LANES) if padded % size == 0)
    # Of the forward and the two backward kernels.
    blocks: dict[str, Any] = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    mask = splash_attention_mask.CausalMask((padded, padded))
    # Any: as declared, a kernel returns statistics too, and a size may be a layout.
    kernel: Any = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([mask] * (heads // kv_heads)),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        interpret=interpret,
    )
    pad = [(0, 0), (0, padded - time)]
    q, k, v = (jnp.pad(x, [*pad, (0, 0), (0, 0)]).swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    q = (q * width**-0.5).reshape(batch, kv_heads, heads // kv_heads, padded, width)
    segment = jnp.pad(segment_BT, pad, constant_values=-1)

    def row(q, k, v, segment):
        ids = splash_attention_kernel.SegmentIds(q=segment, kv=segment)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v)

    out = jax.vmap(row)(q, k, v, segment)
    return out.reshape(batch, heads, padded, width).swapaxes(1, 2)[:, :time]


KERNELS: dict[str, Kernel] = {
    "xla": xla,
    "cudnn": functools.partial(xla, implementation="cudnn"),
    "splash": splash,
    "splash-interpreted": functools.partial(splash, interpret=True),
}


def choose(name: str, dtype: jnp.dtype) -> Kernel:
    """The kernel of that name, "auto" the fastest for the backend in use; ValueError for a name that is no kernel's."""
    if name == "auto":
        backend = jax.default_backend()
        name = "splash" if backend == "tpu" else "xla"
        if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
            name = "cudnn"
    if name not in KERNELS:
        raise ValueError(f"model.attention is {name!r}; choose auto or one of {list(KERNELS)}")
    return KERNELS[name]
