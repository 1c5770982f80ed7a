"""The policy and the value model on packed rows, against the slow decoder run on each trajectory alone.

The rows, "b" once after another trajectory and once alone:

    row 0   a a a a a a a a a b b b b b b b b b b b · · · ·
    row 1   b b b b b b b b b b b · · · · · · · · · · · · ·
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel, settings
from searchr1_jax.models import decoder

CONFIG = slow_decoder.tiny_config(vocab_size=50)
T, SEED = 24, 0
RNG = np.random.default_rng(0)
A, B = RNG.integers(CONFIG.vocab_size, size=9), RNG.integers(CONFIG.vocab_size, size=11)
PLACES = {"a": (0, slice(0, 9)), "b": (0, slice(9, 20)), "b alone": (1, slice(0, 11))}
TEXTS = {"a": A, "b": B, "b alone": B}
EXACT = dict(atol=1e-5, rtol=0)  # float32 against float64, values of a few units


def rows():
    """tokens, position, segment"""
    arrays = np.zeros((3, 2, T), np.int32)
    for name, (row, place) in PLACES.items():
        text = TEXTS[name]
        segment = np.full(len(text), 2 if name == "b" else 1)
        arrays[:, row, place] = text, np.arange(len(text)), segment
    return arrays


@pytest.fixture(scope="module")
def host_params():
    with jax.set_mesh(meshes.make()):
        return slow_decoder.random_params(CONFIG, SEED)


@functools.cache
def policy_graph():
    return decoder.abstract(decoder.Policy, CONFIG)[0]


@functools.partial(jax.jit, static_argnames=("graph", "vocab_chunk", "remat", "dtype"))
def _statistics(graph, params, arrays, temperature, vocab_chunk, remat, dtype=jnp.float32):
    compute = decoder.Compute(dtype=dtype, remat=remat, attention="xla")
    return decoder.bind(graph, params).token_statistics(
        *arrays, compute, temperature=temperature, vocab_chunk=vocab_chunk
    )


def statistics(params, *, temperature=1.0, vocab_chunk=8, remat=False, dtype=jnp.float32):
    placed = slow_decoder.on_mesh(CONFIG, params), parallel.to_mesh(tuple(rows()), "batch", None)
    return jax.device_get(_statistics(policy_graph(), *placed, temperature, vocab_chunk, remat, dtype))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entry_t_is_the_log_prob_of_token_t_given_the_tokens_before_it(laptop, host_params, temperature):
    logp, _ = statistics(host_params, temperature=temperature)
    for name, place in PLACES.items():
        slow = slow_decoder.token_logp(host_params, CONFIG, TEXTS[name], temperature)
        np.testing.assert_allclose(logp[place][1:], slow[1:], err_msg=name, **EXACT)


def test_the_gate_has_the_activation_that_the_config_names(laptop):
    config = slow_decoder.tiny_config(vocab_size=50, activation="gelu_pytorch_tanh")
    graph, params = decoder.abstract(decoder.Policy, config)[0], slow_decoder.random_params(config, SEED)
    placed = slow_decoder.on_mesh(config, params), parallel.to_mesh(tuple(rows()), "batch", None)
    logp, _ = jax.device_get(_statistics(graph, *placed, 1.0, 8, False))
    slow = slow_decoder.token_logp(params, config, A)
    np.testing.assert_allclose(logp[PLACES["a"]][1:], slow[1:], **EXACT)
    assert np.abs(slow - slow_decoder.token_logp(params, CONFIG, A))[1:].max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_t_is_that_of_the_distribution_token_t_came_from(laptop, host_params, temperature):
    _, entropy = statistics(host_params, temperature=temperature)
    for name, place in PLACES.items():
        logp = slow_decoder.log_softmax(slow_decoder.logits(host_params, CONFIG, TEXTS[name]) / temperature)
        slow = -(np.exp(logp) * logp).sum(-1)  # after each token; that of the next one
        np.testing.assert_allclose(entropy[place][1:], slow[:-1], err_msg=name, **EXACT)


def test_a_trajectory_packed_after_another_has_the_log_probs_it_has_alone(laptop, host_params):
    logp, entropy = statistics(host_params)
    for array in (logp, entropy):  # only rounding differs: masked keys weigh exactly 0
        np.testing.assert_allclose(array[PLACES["b"]][1:], array[PLACES["b alone"]][1:], atol=2e-6, rtol=0)


def test_log_probs_hang_on_distances_and_not_on_where_a_segment_starts(laptop, host_params):
    def with_positions(change):
        tokens, position, segment = rows()
        arrays = parallel.to_mesh((tokens, change(position).astype(np.int32), segment), "batch", None)
        params = slow_decoder.on_mesh(CONFIG, host_params)
        return jax.device_get(_statistics(policy_graph(), params, arrays, 1.0, 8, False))[0][PLACES["b"]][1:]

    restarting = with_positions(lambda p: p)
    np.testing.assert_allclose(with_positions(lambda p: p + 9), restarting, **EXACT)
    torn = with_positions(lambda p: p + 5 * (p % 2))  # neighbours are 6 or 4 apart
    assert np.abs(torn - restarting).max() > 1e-2


@pytest.mark.parametrize("vocab_chunk", [1, T])
def test_the_size_of_vocabulary_chunks_changes_nothing(laptop, host_params, vocab_chunk):
    got, reference = statistics(host_params, vocab_chunk=vocab_chunk), statistics(host_params, vocab_chunk=8)
    for a, b in zip(got, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)


def test_rows_that_are_not_whole_chunks_are_refused(laptop, host_params):
    with pytest.raises(ValueError, match="24 tokens are not whole chunks of 7.*learner.vocab_chunk"):
        statistics(host_params, vocab_chunk=7)


def weighted(statistics_of):
    """A number that hangs on every log-prob and entropy of "a" and "b", each with its own weight."""
    weight = np.zeros((2, 2, T), np.float32)
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        row, place = PLACES[name]
        weight[:, row, place] = rng.standard_normal((2, len(TEXTS[name])))
        weight[:, row, place.start] = 0
    return sum((w * s).sum() for w, s in zip(weight, statistics_of, strict=True))


@functools.cache
def gradient(*, vocab_chunk, remat):
    host = slow_decoder.random_params(CONFIG, SEED)
    params, graph = slow_decoder.on_mesh(CONFIG, host), policy_graph()
    arrays = parallel.to_mesh(tuple(rows()), "batch", None)
    loss = lambda params: weighted(_statistics(graph, params, arrays, 0.8, vocab_chunk, remat))
    return jax.device_get(jax.jit(jax.grad(loss))(params))


def test_remat_and_vocabulary_chunks_leave_values_and_gradients_as_they_are(laptop, host_params):
    for a, b in zip(statistics(host_params, remat=True), statistics(host_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)
    thrifty, plain = gradient(vocab_chunk=4, remat=True), gradient(vocab_chunk=T, remat=False)
    for a, b in zip(jax.tree.leaves(thrifty), jax.tree.leaves(plain), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_the_gradient_is_the_slope_of_the_slow_decoder(laptop, host_params):
    """Central differences in float64 along one random direction through all parameters."""
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), host_params)

    def slow(step):
        params = jax.tree.map(lambda x, d: x + step * d, host_params, direction)
        logp, entropy = np.zeros((2, 2, T))
        for name in ("a", "b"):
            tempered = slow_decoder.log_softmax(slow_decoder.logits(params, CONFIG, TEXTS[name])[:-1] / 0.8)
            row, place = PLACES[name]
            logp[row, place][1:] = tempered[np.arange(len(tempered)), TEXTS[name][1:]]
            entropy[row, place][1:] = -(np.exp(tempered) * tempered).sum(-1)
        return weighted((logp, entropy))

    slope = (slow(1e-5) - slow(-1e-5)) / 2e-5
    got = gradient(vocab_chunk=4, remat=True)
    dots = jax.tree.map(lambda g, d: float((g * d).sum()), got, direction)
    assert sum(jax.tree.leaves(dots)) == pytest.approx(slope, rel=1e-4)


def test_the_value_before_a_token_knows_only_what_came_before_it(laptop):
    host = slow_decoder.random_params(CONFIG, 3, decoder.Value)
    graph, _ = decoder.abstract(decoder.Value, CONFIG)

    @jax.jit
    def values(params, *arrays):
        return decoder.bind(graph, params)(*arrays, slow_decoder.COMPUTE)

    params = slow_decoder.on_mesh(CONFIG, host, decoder.Value)
    got = np.asarray(values(params, *parallel.to_mesh(tuple(rows()), "batch", None)))
    for name, place in PLACES.items():
        slow = slow_decoder.run(host, CONFIG, TEXTS[name])[0] @ host["head"]
        np.testing.assert_allclose(got[place][1:], slow[:-1], err_msg=name, **EXACT)


def test_a_fresh_value_model_expects_nothing(laptop):
    head = jax.jit(lambda: decoder.Value(CONFIG, nnx.Rngs(0)).head.get_value())  # nothing else is computed
    np.testing.assert_array_equal(head(), 0)


def test_bfloat16_arithmetic_stays_near_float32(laptop, host_params):
    """Eight bits of mantissa: errors near 2⁻⁸ of values of a few units, and float32 log-probs all the same."""
    logp, _ = statistics(host_params, dtype=jnp.bfloat16)
    assert logp.dtype == np.float32
    for place in PLACES.values():
        error = np.abs(logp[place] - statistics(host_params)[0][place])[1:]
        assert 0 < error.max() < 0.2


def test_a_misspelt_attention_is_refused_before_there_is_work_to_lose():
    with pytest.raises(ValueError, match="model.attention is 'flash'; choose auto or one of"):
        decoder.Compute.of(settings.Model(attention="flash"))
