"""Faults that would cost a run: each is refused by name before more is lost, or warned of."""

import dataclasses
import json
import math

import jax
from learning import by_hand
import meshes
import miniature
import numpy as np
import pytest
import slow_decoder

from searchr1_jax.core import parallel, settings, types
from searchr1_jax.learning import guards, minibatches, step as learning, update

MODEL = slow_decoder.tiny_config(width=32)
REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 0.2, 0.0, 1.0]


@pytest.fixture(scope="module")
def parts():
    """A learner from two samples a question, and its first weights."""
    with jax.set_mesh(meshes.make()):
        c = miniature.settings(**{"learner.row_tokens": (32,), "learner.vocab_chunk": 32})
        return update.Learner(MODEL, c), slow_decoder.random_params(MODEL, 0)


@pytest.fixture
def learn(laptop, parts, tmp_path):
    """learn(…) is one step of learning; the state goes on from one to the next."""
    learner, host = parts
    policy = lambda: slow_decoder.on_mesh(MODEL, host)
    state = learner.init(policy(), None)

    def learn(rewards=REWARDS, *, trajectories=None, rate_scale=1.0, step=6):
        nonlocal state
        state, values = learning.learn(
            learner, state, policy(), trajectories or by_hand.trajectories(seed=1), rewards, step,
            kl_coefficient=0.001, rate_scale=rate_scale, failed=tmp_path / "failed",
        )  # fmt: skip
        return values, jax.device_get(state)

    return learn


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_before_anything_is_learned_and_names_the_question(learn, reward):
    with pytest.raises(FloatingPointError, match=f"question 'q5', sample 0, is {reward}; .* config.reward"):
        learn([*REWARDS[:5], reward, *REWARDS[6:]])
    with pytest.raises(FloatingPointError, match=r"question 'q5', sample 0, is \[0, (nan|inf)\]"):
        learn([*REWARDS[:5], [0, reward], *REWARDS[6:]])


def test_an_exploding_learning_rate_stops_at_the_step_and_keeps_its_batch(learn, parts, tmp_path):
    learner, host = parts
    trajectories = by_hand.trajectories(seed=1)
    made = minibatches.make(trajectories, REWARDS, learner.settings, step=6)
    second = [trajectories[i].example.id for i in made.learned[1]]
    told = rf"(loss|norm) is (nan|inf) at step 7; its batch is in .* begin with {', '.join(second)}\."
    with pytest.raises(FloatingPointError, match=told) as e:
        learn(rate_scale=1e36)
    (path,) = (tmp_path / "failed").iterdir()
    assert str(path) in str(e.value) and path.name == "step000007.npz"

    # The second mini-batch, on the mesh as the update took it.
    with np.load(path) as file:
        fields = dict(file)
    assert json.loads(str(fields.pop("ids"))) == second
    batch = types.Batch(**fields)
    for name, array in vars(made.batches[1]).items():
        np.testing.assert_array_equal(getattr(batch, name), array, err_msg=name)
    on_mesh = parallel.to_mesh(batch, None, "batch", None)
    state = learner.init(slow_decoder.on_mesh(MODEL, host), None)
    assert np.isfinite(learner.score(state, state.policy, on_mesh).logp).all()


def test_a_rollout_without_variance_changes_nothing_where_such_groups_are_left_out(learn, parts, monkeypatch):
    _, before = learn()
    monkeypatch.setattr(parts[0], "settings", parts[0].settings.replace({"algorithm.drop_equal_groups": True}))
    values, after = learn([1.0] * 8)
    assert values["groups_without_variance"] == 1.0 and values["updates"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_trajectories_in_which_the_policy_wrote_nothing_are_no_division_by_zero(learn):
    silent = [
        dataclasses.replace(t, sampled=np.zeros_like(t.sampled), behaviour_logp=np.zeros_like(t.behaviour_logp))
        for t in by_hand.trajectories(seed=1)
    ]
    values, state = learn(trajectories=silent)
    assert values["policy_tokens"] == values["policy/loss"] == values["policy/gradient_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


LIMITS = settings.Guard(kl=0.5, entropy_low=0.1, entropy_high=3.0, gradient_norm=10.0)
CALM = {"kl_to_reference": 0.5, "policy/entropy": 1.0, "policy/gradient_norm": 10.0}


@pytest.mark.parametrize(
    "figure, value, words",
    [
        ("kl_to_reference", 0.51, "kl_to_reference of 0.51 is above guard.kl of 0.5"),
        ("policy/entropy", 0.09, "policy/entropy of 0.09 is below guard.entropy_low of 0.1"),
        ("policy/entropy", 3.1, "policy/entropy of 3.1 is above guard.entropy_high of 3"),
        ("policy/gradient_norm", 11.0, "policy/gradient_norm of 11 is above guard.gradient_norm of 10"),
    ],
)
def test_a_figure_beyond_its_limit_is_told(figure, value, words):
    assert guards.exceeded(CALM, LIMITS) == []
    assert guards.exceeded(CALM | {figure: value}, LIMITS) == [words]
    assert guards.exceeded(CALM | {figure: value}, settings.Guard()) == []
    assert guards.exceeded(CALM | {figure: math.nan}, settings.Guard()) == [f"{figure} is nan"]


def test_a_gap_that_is_no_number_is_told():
    assert guards.exceeded(CALM | {"sampler_gap/max": math.nan}, LIMITS) == ["sampler_gap/max is nan"]
