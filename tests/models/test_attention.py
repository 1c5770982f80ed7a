"""The kernels of packed attention: splash, interpreted, computes what XLA does, alone and inside a decoder.

    segment  0 0 0 1 1 … 1 2 2 … 2 3 3 … 3 0 0 0 0

Rows of T tokens are padded to whole blocks inside the kernel.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.models import attention, decoder

INTERPRETED = "splash-interpreted"
# float32 keeps 2⁻²⁴ = 6e-8 of every number. A logit of up to 10 is a sum of H = 16 products and so off by some 4e-7,
# its weight by that share of itself; sums over T weights of values of up to 5 add √T roundings more: 1e-6 to 5e-6.
EXACT = dict(atol=1e-5, rtol=0)


def segments(batch, time):
    """int32[B, T]: three segments and empty places, before them and after, elsewhere in each row."""
    rows = np.zeros((batch, time), np.int32)
    for row in range(batch):
        ends = [3 + row, time // 4, time // 2 + 17 * row, time - 9 + 9 * row]
        for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
            rows[row, start:end] = number
    return rows


@functools.partial(jax.jit, static_argnames="name")
def attended(name, q, k, v, segment, weight):
    """What a kernel makes of q, k and v, and the gradients with respect to them of its weighted sum."""
    kernel = attention.choose(name, q.dtype)
    out, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, segment), q, k, v)
    return dict(zip(("out", "q", "k", "v"), (out, *backward(weight)), strict=True))


# 200 tokens: a block of 256. 600 tokens: five blocks of 128, of which ten pairs are never visited.
@pytest.mark.parametrize("batch, time, heads, kv_heads", [(2, 200, 4, 2), (1, 600, 3, 1)])
def test_splash_attends_as_xla_does_forward_and_backward(batch, time, heads, kv_heads):
    rng = np.random.default_rng(0)
    shapes = [(batch, time, n, 16) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    arguments = q, k, v, segments(batch, time), weight
    splash, xla = (jax.device_get(attended(name, *arguments)) for name in (INTERPRETED, "xla"))
    for name, expected in xla.items():
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(splash[name], expected, err_msg=name, **EXACT)


def test_splash_sees_neither_the_next_token_nor_another_segment():
    """Other keys and values there change nothing, not even the last bit; in the past they do."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 200, n, 16)).astype(np.float32) for n in (2, 1, 1))
    segment = np.repeat([[1, 2, 0]], [60, 100, 40], 1).astype(np.int32)
    splash = lambda k, v: np.asarray(attended(INTERPRETED, q, k, v, segment, q)["out"])
    before = splash(k, v)

    def changes(place):
        keys, values = k.copy(), v.copy()
        keys[:, place], values[:, place] = 3.0, -3.0
        return np.flatnonzero((splash(keys, values) != before).any((0, 2, 3))).tolist()

    assert changes(130) == list(range(130, 160))
    assert changes(slice(0, 60)) == list(range(60))
    assert changes(slice(160, 200)) == list(range(160, 200))


# A whole decoder.

CONFIG = slow_decoder.tiny_config(width=32, head_dim=16, mlp_width=32)
B, T = 4, 24


@functools.cache
def learned(kernel, shape):
    """Log-probs of the tokens of packed rows on a mesh of this shape, and the gradient of their weighted sum."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(CONFIG.vocab_size, size=(B, T)).astype(np.int32)
    segment = segments(B, T)
    position = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    first = np.diff(segment, axis=1, prepend=0) != 0  # no policy writes it
    weight = np.where((segment > 0) & ~first, rng.standard_normal((B, T)), 0).astype(np.float32)
    compute = decoder.Compute(dtype=jnp.float32, remat=True, attention=kernel)
    with jax.set_mesh(meshes.make(*shape)):
        graph, _ = decoder.abstract(decoder.Policy, CONFIG)

        @functools.partial(jax.jit, compiler_options=slow_decoder.COMPILER_OPTIONS)
        @functools.partial(jax.grad, has_aux=True)
        def gradient(params, tokens, position, segment, weight):
            rows = tokens, position, segment
            policy = decoder.bind(graph, params)
            logp, _ = policy.token_statistics(*rows, compute, temperature=1.0, vocab_chunk=8)
            return jnp.sum(weight * logp), jnp.where(weight != 0, logp, 0)

        params = slow_decoder.on_mesh(CONFIG, slow_decoder.random_params(CONFIG, 3))
        arrays = parallel.to_mesh((tokens, position, segment, weight), "batch", None)
        return jax.device_get(gradient(params, *arrays))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_decoder_with_splash_has_the_log_probs_and_gradients_of_one_with_xla(shape):
    gradient, logp = learned(INTERPRETED, shape)
    expected_gradient, expected = learned("xla", (1, 1, 1))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logp, expected, **EXACT)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected_gradient), strict=True):
        distance = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert distance <= 1e-5, (jax.tree_util.keystr(path), distance)


# Which kernel.


@pytest.mark.parametrize(
    "backend, dtype, name",
    [
        ("cpu", jnp.float32, "xla"),
        ("cpu", jnp.bfloat16, "xla"),
        ("gpu", jnp.bfloat16, "cudnn"),
        ("gpu", jnp.float16, "cudnn"),
        ("gpu", jnp.float32, "xla"),  # cuDNN's kernel has no float32
        ("tpu", jnp.bfloat16, "splash"),
        ("tpu", jnp.float32, "splash"),
    ],
)
def test_auto_is_the_kernel_of_the_backend(monkeypatch, backend, dtype, name):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert attention.choose("auto", dtype) is attention.KERNELS[name]


def test_a_name_overrides_the_backend_and_here_auto_is_xla():
    assert attention.choose("auto", jnp.float32) is attention.xla
    assert all(attention.choose(name, jnp.float32) is kernel for name, kernel in attention.KERNELS.items())


def test_an_unknown_kernel_is_refused_by_its_key():
    with pytest.raises(ValueError, match="model.attention is 'flash'; choose auto or one of .*'splash'"):
        attention.choose("flash", jnp.bfloat16)
