"""Norm, rotary positions and attention over packed rows, against loops over single numbers."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from searchr1_jax.core import parallel
from searchr1_jax.models import attention, layers

H, THETA = 6, 50.0


def slow_attention(q, keys, values):
    """One query over the keys it may see."""
    scores = [sum(a * b for a, b in zip(q, k, strict=True)) / len(q) ** 0.5 for k in keys]
    weights = [np.exp(s - max(scores)) for s in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def test_rms_norm_by_hand(laptop):
    x = jnp.array([[[3.0, -4.0]]])  # rms = √((9 + 16) / 2) = √12.5
    expected = np.array([3.0 * 2, -4.0 * 10]) / 12.5**0.5
    np.testing.assert_allclose(layers.rms_norm(x, jnp.array([2.0, 10.0]), 0.0)[0, 0], expected, rtol=1e-6)


def test_rms_norm_of_small_numbers_feels_epsilon(laptop):
    x = jnp.full((1, 1, 4), 1e-3)  # mean square 1e-6, plus 3e-6: half as large as without it
    np.testing.assert_allclose(layers.rms_norm(x, jnp.ones(4), 3e-6), np.full((1, 1, 4), 0.5), rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32(laptop):
    """300 squared elements of 1 + 2⁻⁷ sum exactly to 304.7; a bfloat16 sum would stop growing at 256."""
    x = jnp.full((1, 1, 300), 1.0078125, jnp.bfloat16)
    y = layers.rms_norm(x, jnp.ones(300), 0.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)


def test_rotation_turns_complex_pairs_by_position_times_frequency(laptop):
    rng = np.random.default_rng(0)
    x, position = rng.standard_normal((1, 3, 2, H)).astype(np.float32), np.array([[0, 1, 7]])
    got = layers.rotate(jnp.asarray(x), *layers.rotary_tables(jnp.asarray(position), H, THETA))
    for t in range(3):
        for i in range(H // 2):
            pair = x[0, t, :, i] + 1j * x[0, t, :, i + H // 2]
            pair = pair * np.exp(1j * position[0, t] * THETA ** (-2 * i / H))
            np.testing.assert_allclose(got[0, t, :, i], pair.real, atol=1e-6)
            np.testing.assert_allclose(got[0, t, :, i + H // 2], pair.imag, atol=1e-6)


def test_rotated_products_depend_on_distance_only(laptop):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, H)).astype(np.float32)

    def product(i, j):
        turned = [
            layers.rotate(jnp.asarray(x)[None, None, None], *layers.rotary_tables(jnp.array([[p]]), H, THETA))
            for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


def test_packed_attention_sees_the_past_of_its_own_segment(laptop):
    rng = np.random.default_rng(2)
    segment = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]])
    q = rng.standard_normal((2, 7, 4, H)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 7, 2, H)).astype(np.float32)
    heads = parallel.to_mesh((q, k, v), "batch", None, "heads", None)
    got = np.asarray(layers.packed_attention(attention.xla, *heads, parallel.to_mesh(segment, "batch", None)))
    assert np.isfinite(got).all()  # empty places too: their gradient is multiplied by zero, not by NaN
    for b, t in np.argwhere(segment > 0):
        past = [s for s in range(t + 1) if segment[b, s] == segment[b, t]]
        for n in range(4):
            expected = slow_attention(q[b, t, n], k[b, past, n // 2], v[b, past, n // 2])
            np.testing.assert_allclose(got[b, t, n], expected, atol=1e-6)


def test_fewer_heads_than_tensor_shards_are_repeated_in_their_order():
    with jax.set_mesh(meshes.make(1, 2, 4)):
        kv = parallel.to_mesh(np.arange(2 * 1 * 2 * 1, dtype=np.float32).reshape(2, 1, 2, 1), "batch")
        np.testing.assert_array_equal(layers.split_kv_heads(kv, 2)[:, 0, :, 0], [[0, 0, 1, 1], [2, 2, 3, 3]])
