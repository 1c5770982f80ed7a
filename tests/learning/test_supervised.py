"""Supervised updates against weighted log-probs in numpy and AdamW in numpy."""

import by_hand
import jax
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel, settings
from searchr1_jax.data import packing
from searchr1_jax.learning import supervised
from searchr1_jax.models import decoder

MODEL = slow_decoder.tiny_config(width=32)
ROW_TOKENS, STEP, RATE = 32, 1, 0.004
SETTINGS = settings.Settings().replace({
    "sft.optimizer.learning_rate": 0.01, "sft.optimizer.warmup_steps": 5, "sft.optimizer.b2": 0.99,
    "sft.optimizer.weight_decay": 0.1, "sft.optimizer.max_gradient_norm": 0.5, "learner.vocab_chunk": 16,
    "model.attention": "xla",
})  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def learner(mesh):
    return supervised.SupervisedLearner(MODEL, SETTINGS, total_steps=50)


@pytest.fixture(scope="module")
def params(mesh):
    return slow_decoder.random_params(MODEL, 0)


@pytest.fixture(scope="module")
def demonstrations():
    """Trajectories, and weights of 0, 1 and 5, also where they are to be ignored: at others' tokens."""
    rng, trajectories = np.random.default_rng(3), by_hand.trajectories(seed=2)[:5]
    return trajectories, [rng.choice([0.0, 1.0, 5.0], len(t.tokens)).astype(np.float32) for t in trajectories]


def _update(learner, params, trajectories, weights, **packed):
    packed = dict(row_tokens=ROW_TOKENS, micro_batch_rows=1, max_rows=5) | packed
    batch = packing.pack(trajectories, [0.0] * len(trajectories), weights=weights, **packed)
    state = learner.init(slow_decoder.on_mesh(MODEL, params))
    return learner.update(state, parallel.to_mesh(batch, None, "batch", None), STEP)


def test_the_loss_is_the_mean_of_negative_log_probs_weighted_by_token(learner, params, demonstrations):
    numerator = denominator = 0.0
    for t, weight in zip(*demonstrations, strict=True):
        logp = slow_decoder.token_logp(params, MODEL, t.tokens)
        numerator -= (weight * logp)[t.sampled].sum()
        denominator += weight[t.sampled].sum()
    _, statistics = _update(learner, params, *demonstrations)
    np.testing.assert_allclose(statistics["loss"], numerator / denominator, rtol=1e-5)
    np.testing.assert_allclose(statistics["learning_rate"], RATE, rtol=1e-6)


def test_the_weights_change_as_that_losss_gradient_and_adamw_say(learner, params, demonstrations):
    total = sum(weight[t.sampled].sum() for t, weight in zip(*demonstrations, strict=True))
    slow = by_hand.AdamW(params, SETTINGS.sft.optimizer)
    graph = decoder.abstract(decoder.Policy, MODEL)[0]
    of_one = jax.jit(
        jax.grad(lambda p, tokens, weight: by_hand.weighted_loss(decoder.bind(graph, p), tokens, weight) / total)
    )
    pad = lambda x: np.pad(x, (0, ROW_TOKENS - len(x)))
    pieces = [of_one(params, pad(t.tokens), pad(w * t.sampled)) for t, w in zip(*demonstrations, strict=True)]
    slow.step(jax.tree.map(lambda *parts: sum(parts), *jax.device_get(pieces)), RATE)
    state, _ = _update(learner, params, *demonstrations)
    by_hand.assert_close(by_hand.adam_mean(state.optimizer), slow.mean, relative=1e-5)
    by_hand.assert_close(state.policy, slow.params, relative=1e-4)


def test_twice_the_weight_everywhere_changes_nothing(learner, params, demonstrations):
    trajectories, weights = demonstrations
    once, _ = _update(learner, params, trajectories, weights)
    twice, _ = _update(learner, params, trajectories, [2 * weight for weight in weights])
    by_hand.assert_close(by_hand.adam_mean(twice.optimizer), by_hand.adam_mean(once.optimizer), relative=1e-6)
