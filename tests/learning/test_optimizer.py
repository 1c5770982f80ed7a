"""The optimizer against AdamW in numpy, its schedule by hand."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from searchr1_jax.core import settings
from searchr1_jax.learning import optimizer


def _adam(total_steps=100, **changes):
    fields = dict(learning_rate=0.5, warmup_steps=1, b2=0.99, weight_decay=0.1)
    return optimizer.AdamW(settings.Optimizer(**fields | changes), total_steps)


@pytest.mark.parametrize(
    "changes, rates",
    [
        (dict(warmup_steps=0), {0: 0.5, 99: 0.5}),
        (dict(warmup_steps=1), {0: 0.5, 1: 0.5}),
        (dict(warmup_steps=4), {0: 0.125, 1: 0.25, 3: 0.5, 4: 0.5, 99: 0.5}),
        (dict(warmup_steps=0, final_lr_fraction=0.2, total_steps=11), {0: 0.5, 5: 0.3, 10: 0.1}),
        (dict(warmup_steps=4, final_lr_fraction=0.0, total_steps=11), {1: 0.225, 5: 0.25}),
    ],
)
def test_learning_rate(changes, rates):
    adam = _adam(**changes)
    for step, rate in rates.items():
        np.testing.assert_allclose(adam.learning_rate_at(step), rate, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 100.0], ids=["gradient inside the clip", "gradient clipped"])
def test_three_steps_are_those_of_adamw_with_a_clipped_gradient(scale):
    rng = np.random.default_rng(0)
    draw = lambda: {"a": rng.standard_normal((3, 2)).astype(np.float32), "b": rng.standard_normal(4).astype(np.float32)}
    adam, params = _adam(warmup_steps=3, learning_rate=0.03), jax.tree.map(jnp.asarray, draw())
    slow, state = by_hand.AdamW(params, adam.settings), adam.transformation().init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda x: scale * x, draw())
        params, state = adam.apply(gradient, state, params, step)
        slow.step(gradient, learning_rate=0.01 * (step + 1))
    by_hand.assert_close(params, slow.params, relative=1e-6)
    by_hand.assert_close(by_hand.adam_mean(state), slow.mean, relative=1e-6)


def test_the_gradient_is_clipped_by_the_norm_of_all_parameters_together():
    adam = _adam(b1=0.0, max_gradient_norm=2.0)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}  # norm 13
    _, state = adam.apply(gradient, adam.transformation().init(params), params, 0)
    by_hand.assert_close(
        by_hand.adam_mean(state), {"a": np.array([6, 8]) / 13, "b": np.array([24]) / 13}, relative=1e-6
    )


def test_weights_keep_their_dtype():
    adam, params = _adam(), {"a": jnp.ones(3, jnp.bfloat16)}
    new, _ = adam.apply({"a": jnp.ones(3, jnp.bfloat16)}, adam.transformation().init(params), params, 0)
    assert new["a"].dtype == jnp.bfloat16 and new["a"][0] < 1
