"""AdamW with a clipped gradient, and the one way gradients are accumulated over micro-batches."""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from searchr1_jax.core import settings as settings_lib, types
from searchr1_jax.data import packing  # noqa: F401 - makes types.Batch a pytree


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter, 2019) and its schedule, which counts steps: rollouts, or updates of `sft`."""

    settings: settings_lib.Optimizer
    total_steps: int

    def transformation(self) -> optax.GradientTransformation:
        """Gradient to step of size 1; `learning_rate_at` scales it."""
        c = self.settings
        return optax.chain(
            optax.clip_by_global_norm(c.max_gradient_norm),
            optax.scale_by_adam(b1=c.b1, b2=c.b2),
            optax.add_decayed_weights(c.weight_decay),
        )

    def learning_rate_at(self, step: jax.Array) -> jax.Array:
        """float32[], the learning rate of a step counted from 0."""
        c = self.settings
        warm = jnp.minimum(1.0, (step + 1) / max(1, c.warmup_steps))
        cooled = 1.0 - (1.0 - c.final_lr_fraction) * step / max(1, self.total_steps - 1)
        return c.learning_rate * warm * cooled

    def apply(self, gradient: Any, state: Any, params: Any, step: jax.Array, scale: Any = 1.0) -> tuple[Any, Any]:
        """The next parameters and optimizer state; `scale` is of the learning rate."""
        direction, state = self.transformation().update(gradient, state, params)
        rate = scale * self.learning_rate_at(step)
        return jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), params, direction), state


def micro_batch(tree: Any, i: jax.Array) -> Any:
    """Micro-batch i of [M, B, T] arrays."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def accumulate(loss: Callable[..., tuple[jax.Array, Any]], params: Any, batch: types.Batch, *others: Any):
    """Gradient and statistics of a loss summed over the micro-batches in use.

    The loss of a micro-batch must be normalised by a count over the whole batch, so that the sum does not depend
    on how the batch is cut.

    Args:
      loss: (params, micro-batch, *micro-batches of others) -> (scalar, dict of scalars to be summed).
      others: pytrees of [M, B, T] arrays.
    """
    arrays = dataclasses.replace(batch, micro_batches=batch.tokens), others

    def one(i):
        mine, rest = micro_batch(arrays, i)
        (_, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params, mine, *rest)
        return gradient, statistics

    shapes = jax.eval_shape(lambda: one(0)[1])
    start = jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda i, total: jax.tree.map(jnp.add, total, one(i))
    return jax.lax.fori_loop(0, batch.micro_batches, add, start)
