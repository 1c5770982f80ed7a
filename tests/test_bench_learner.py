"""The learner's benchmark at tiny sizes: what is compared does the same work, and every figure is there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.bench import learner, measuring
from searchr1_jax.core import parallel
from searchr1_jax.models import decoder

MODEL = slow_decoder.tiny_config(width=32)
PACKING = learner.Packing(
    model=MODEL, trajectories=12, mean_tokens=20, prompt_tokens=(3, 6), turn_tokens=(2, 4), passage_tokens=(3, 6),
    row_tokens=64, vocab_chunk=8, rows_run=2,
)  # fmt: skip
PROJECTION = learner.Projection(vocab_size=64, width=16, rows=4, row_tokens=32, vocab_chunk=2, tokens_run=32)
STEP = learner.Step(model=MODEL, questions=2, samples=2, prompt=4, new=6, micro_batch_rows=2)
KEYS = {
    "packed_over_padded", "row_utilisation", "chunked_memory_ratio", "chunked_time_ratio", "grpo_rollout_s",
    "grpo_update_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    with measuring.one_device() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def grpo(mesh):
    return learner.GRPO(STEP, seed=0)


@pytest.fixture(scope="module")
def drawn():
    return learner.trajectories(PACKING, seed=1)


def _runs(sampled):
    """Lengths of the runs of equal values."""
    return np.diff(np.flatnonzero(np.diff(sampled, prepend=~sampled[0], append=~sampled[-1]))).tolist()


def test_trajectories_begin_with_a_prompt_end_with_the_policy_and_have_passages_between(drawn):
    assert any(len(_runs(t.sampled)) > 3 for t in drawn)
    for t in drawn:
        prompt, *rest = _runs(t.sampled)
        assert not t.sampled[0] and t.sampled[-1]
        assert prompt == t.prompt_tokens <= min(6, len(t.tokens) // 2)
        assert max(rest[1::2], default=0) <= 6  # passages
        assert len(t.tokens) <= PACKING.row_tokens


def test_lengths_are_log_normal_of_the_given_mean():
    many = dataclasses.replace(PACKING, trajectories=4_000, mean_tokens=600, row_tokens=4_096)
    logs = np.log([len(t.tokens) for t in learner.trajectories(many, seed=0)])
    # exp(μ + σ²/2) is the mean; the limit moves both by less than the error of 4,000 draws.
    np.testing.assert_allclose(np.exp(logs.mean() + many.sigma**2 / 2), 600, rtol=0.05)
    np.testing.assert_allclose(logs.std(), many.sigma, rtol=0.05)


def test_packed_and_padded_rows_hold_the_same_tokens_to_learn(drawn):
    packed, padded = learner.packed(PACKING, drawn), learner.padded(PACKING, drawn)
    learned = sum(int(t.sampled.sum()) for t in drawn)
    assert packed.policy_mask.sum() == padded.policy_mask.sum() == learned
    for t, row, mask in zip(drawn, padded.tokens[:, 0], padded.policy_mask[:, 0], strict=True):
        np.testing.assert_array_equal(row[: len(t.tokens)], t.tokens)
        np.testing.assert_array_equal(mask[: len(t.tokens)], t.sampled)
    longest = max(len(t.tokens) for t in drawn)
    assert 0 <= padded.tokens.shape[2] - longest < PACKING.vocab_chunk
    assert packed.micro_batches < padded.micro_batches == len(padded.tokens) == len(drawn)
    assert not packed.policy_mask[packed.micro_batches :].any()
    assert packed.tokens.shape[2] == PACKING.row_tokens


def test_the_dense_projection_and_the_learners_have_one_gradient(mesh):
    params = decoder.init(decoder.Policy, PROJECTION.model, seed=0)
    rng = np.random.default_rng(0)
    host = rng.integers(64, size=(4, 32), dtype=np.int32), rng.random((4, 32), np.float32)
    arguments = params, *parallel.to_mesh(host, "batch", None)
    dense, chunked = (learner.gradient(PROJECTION.model, chunk)(*arguments) for chunk in (None, 2))
    assert np.abs(dense["head"]).max() > 0.1 and np.abs(dense["norm"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dense, chunked)


def test_a_step_learns_from_what_the_policy_wrote(grpo):
    trajectories = grpo.roll_out()
    assert [(t.example.id, t.sample) for t in trajectories] == [("q0", 0), ("q0", 1), ("q1", 0), ("q1", 1)]
    for first, second in (trajectories[:2], trajectories[2:]):
        np.testing.assert_array_equal(first.tokens[:4], second.tokens[:4])
        assert first.tokens.tolist() != second.tokens.tolist()
    values = grpo.learn(trajectories)
    assert values["policy_tokens"] == 4 * 6
    assert values["sampler_gap/max"] < 1e-4  # these weights wrote these tokens
    assert values["policy/gradient_norm"] > 0


def test_every_figure_is_there_and_fits_one_line_of_json(grpo, monkeypatch):
    monkeypatch.setattr(learner, "GRPO", lambda step, *, seed: grpo)  # compiled already
    one_shape = dataclasses.replace(PACKING, vocab_chunk=64)  # padded rows, too, are of 64 tokens: compiled once
    figures = learner.measure(one_shape, PROJECTION, STEP, repeats=1, seed=0)
    assert KEYS <= json.loads(json.dumps(figures)).keys()
    assert figures["chunked_memory_ratio"] < 1
    assert 0.5 < figures["row_utilisation"] <= 1
    assert all(value > 0 for value in figures.values())
