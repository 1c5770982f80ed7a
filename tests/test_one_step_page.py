"""The arithmetic that docs/one_step.md explains, by hand; what its tables show is compared in test_pages.py."""

import numpy as np
import one_step_page
import pytest


@pytest.fixture(scope="module")
def step():
    return one_step_page.step()


@pytest.fixture
def mask(step):
    return step.batch.policy_mask[0, 0]


def test_the_policy_wrote_ten_tokens_and_the_first_sample_was_rewarded(step, mask):
    assert mask.sum() == len(one_step_page.OLD) and step.rewards == [1, 0]
    assert step.batch.reward[0, 0].nonzero()[0].tolist() == [len(step.trajectories[0].tokens) - 1]


def test_what_the_program_estimates_is_the_whitened_gae_and_its_sum_with_the_values(step, mask):
    a = step.ppo.advantage[mask]
    whitened = (a - a.mean()) / np.sqrt(a.var() + 1e-8)
    np.testing.assert_allclose(step.ppo.targets.advantage[mask], whitened, rtol=1e-5)
    np.testing.assert_allclose(step.ppo.targets.returns[mask], a + one_step_page.VALUE, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_gradient_of_the_whole_loss_is_the_formula_of_the_page(step, mask, name):
    x, now, reference = getattr(step, name), np.array(one_step_page.NOW), np.array(one_step_page.REFERENCE)
    of_kl = 0.1 * (1 - np.exp(reference - now)) if name == "grpo" else 0.0
    of_reward = np.where(x.clipped[mask], 0.0, -x.ratio[mask] * x.targets.advantage[mask])
    np.testing.assert_allclose(x.gradient[mask], (of_reward + of_kl) / 10, rtol=1e-4, atol=1e-7)
    assert not x.gradient[~mask].any()
    assert x.loss == pytest.approx((x.surrogate + 0.1 * x.kl * (name == "grpo"))[mask].sum() / 10, rel=1e-5)


def test_what_models_say_where_the_policy_wrote_nothing_changes_nothing(step, monkeypatch):
    shown = one_step_page.tables(step)
    monkeypatch.setattr(one_step_page, "UNREAD", -3.0)
    assert one_step_page.tables(one_step_page.step()) == shown
