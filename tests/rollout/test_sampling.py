"""How one token is chosen: which may be, how often each is, and what log-prob it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.rollout import sampling

DRAWS = 8192
LOGITS = np.log([0.30, 0.05, 0.22, 0.01, 0.02, 0.18, 0.12, 0.10]).astype(np.float32)
# Chi-square that chance exceeds once in 1000, by degrees of freedom (Abramowitz and Stegun, table 26.8).
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


@pytest.fixture(scope="module")
def draw():
    """(logits[S, V], samples[S], positions[S], decoding) -> tokens, log-probs, by one compiled program."""

    @jax.jit
    def program(logits_SV, sample_S, position_S, temperature, top_k, top_p):
        identity_S4 = jnp.stack([jnp.ones_like(sample_S)] * 3 + [sample_S], axis=1)
        keys = jax.vmap(sampling.episode_key)(identity_S4)
        return sampling.sample(logits_SV, keys, position_S, temperature, top_k, top_p)

    def draw(logits, samples, positions, decoding):
        rows = parallel.to_mesh((np.broadcast_to(logits, (len(samples), 8)), samples, positions), "batch", None)
        scalars = np.float32(decoding.temperature), np.int32(decoding.top_k), np.float32(decoding.top_p)
        return jax.device_get(program(*rows, *scalars))

    return draw


def many(draw, decoding, *, over="samples"):
    """One distribution, drawn from by many samples of a question, or at many positions of one."""
    varied, constant = np.arange(DRAWS, dtype=np.uint32), np.full(DRAWS, 3, np.uint32)
    samples, positions = (varied, constant) if over == "samples" else (constant, varied)
    return draw(LOGITS, samples, positions.astype(np.int32), decoding)


def slow_support(decoding):
    """Tokens from the likeliest on: at most top_k, until those already in hold top_p."""
    probability = np.exp(slow_decoder.log_softmax(LOGITS.astype(np.float64) / decoding.temperature))
    inside, mass = [], 0.0
    for token in np.argsort(-probability):
        if mass >= decoding.top_p or decoding.top_k and len(inside) == decoding.top_k:
            break
        inside.append(token)
        mass += probability[token]
    return np.sort(inside), probability


@pytest.mark.parametrize("over", ["samples", "positions"])
@pytest.mark.parametrize(
    "settings, support",
    [
        ({}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 2.0}, range(8)),
        ({"top_k": 3}, [0, 2, 5]),
        ({"top_k": 100}, range(8)),
        ({"top_p": 0.6}, [0, 2, 5]),  # .30 + .22 are not enough
        ({"top_p": 0.93}, [0, 1, 2, 5, 6, 7]),
        ({"top_p": 0.6, "top_k": 2}, [0, 2]),
        ({"top_p": 0.6, "top_k": 5}, [0, 2, 5]),
        ({"top_p": 0.6, "temperature": 0.5}, [0, 2]),  # squared and normalised: .467, .251, …
    ],
)
def test_exactly_the_allowed_tokens_are_drawn_as_often_as_they_are_likely(laptop, draw, settings, support, over):
    decoding = sampling.Decoding(**settings)
    slow, probability = slow_support(decoding)
    assert slow.tolist() == list(support)
    tokens, _ = many(draw, decoding, over=over)
    counts = np.bincount(tokens, minlength=8)
    assert np.flatnonzero(counts).tolist() == list(support)  # the rarest is expected 3 times at temperature ½
    expected = DRAWS * probability[slow] / probability[slow].sum()
    chi_square = ((counts[slow] - expected) ** 2 / expected).sum()
    assert chi_square < CRITICAL[len(slow) - 1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 0.7, "top_k": 3, "top_p": 0.6}])
def test_log_probs_are_of_the_tempered_distribution_before_truncation(laptop, draw, settings):
    decoding = sampling.Decoding(**settings)
    tokens, logp = many(draw, decoding)
    expected = slow_decoder.log_softmax(LOGITS.astype(np.float64) / decoding.temperature)[tokens]
    np.testing.assert_allclose(logp, expected, atol=1e-6, rtol=0)


def test_temperature_0_takes_the_likeliest_and_calls_it_as_likely_as_at_temperature_1(laptop, draw):
    tokens, logp = many(draw, sampling.Decoding(temperature=0.0))
    assert (tokens == 0).all()
    np.testing.assert_allclose(logp, np.log(0.3), atol=1e-6)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_each_row_is_truncated_by_its_own_logits(laptop, draw, settings):
    logits = np.random.default_rng(0).standard_normal((DRAWS, 8)).astype(np.float32)
    numbers = np.arange(DRAWS, dtype=np.uint32)
    tokens, _ = draw(logits, numbers, numbers.astype(np.int32), sampling.Decoding(**settings))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_truncation_does_not_move_draws_that_it_allows(laptop, draw):
    """The same noise chooses: whoever drew an allowed token draws it again."""
    free, _ = many(draw, sampling.Decoding())
    cut, _ = many(draw, sampling.Decoding(top_k=3))
    allowed = np.isin(free, [0, 2, 5])
    assert 0.6 < allowed.mean() < 0.8  # .70
    np.testing.assert_array_equal(cut[allowed], free[allowed])
