"""Faults that would cost a run: each is refused by name before more is lost, or warned of."""

import dataclasses
import math

import jax
from learning import by_hand
import meshes
import miniature
import numpy as np
import pytest
import slow_decoder

from searchr1_jax import train
from searchr1_jax.core import parallel
from searchr1_jax.learning import guards
from searchr1_jax.learning import minibatches
from searchr1_jax.run import setup

MODEL = slow_decoder.tiny_config(width=32)
SCORES = [1.0, 0.0, 0.5, 0.0, 1.0, 0.2, 0.0, 1.0]


@pytest.fixture(scope="module")
def parts():
    """A recipe of two samples a question, and a learner with its first state."""
    with jax.set_mesh(meshes.make()):
        c = miniature.config(**{"learner.row_tokens": (32,), "learner.vocab_chunk": 32})
        recipe = dataclasses.replace(setup.recipe(c), updates=2)
        return recipe, setup.learner(c, MODEL), slow_decoder.random_params(MODEL, 0)


@pytest.fixture
def learn(laptop, parts, tmp_path):
    """learn(…) is one step of learning; the state goes on from one to the next."""
    recipe, learner, host = parts
    policy = lambda: slow_decoder.on_mesh(MODEL, host)
    state = learner.init(policy(), None)

    def learn(scores=SCORES, *, trajectories=None, rate_scale=1.0, step=6, **changes):
        nonlocal state
        state, values = train.learn(
            dataclasses.replace(recipe, **changes), learner, state, policy(),
            trajectories or by_hand.trajectories(seed=1), scores, step,
            kl_coefficient=0.001, rate_scale=rate_scale, failed=tmp_path / "failed",
        )  # fmt: skip
        return values, jax.device_get(state)

    return learn


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_before_anything_is_learned_and_names_the_question(learn, reward):
    with pytest.raises(FloatingPointError, match=f"question 'q5', sample 0, is {reward}; .* config.reward"):
        learn([*SCORES[:5], reward, *SCORES[6:]])


def test_an_exploding_learning_rate_stops_at_the_step_and_keeps_its_batch(learn, parts, tmp_path):
    with pytest.raises(FloatingPointError, match=r"(loss|norm) is (nan|inf) at step 7; its batch is in .*q4.*q7") as e:
        learn(rate_scale=1e36)
    (path,) = (tmp_path / "failed").iterdir()
    assert str(path) in str(e.value) and path.name == "step000007.npz"

    # The second mini-batch, on the mesh as the update took it.
    batch, ids = guards.load_batch(path)
    assert ids == ["q4", "q5", "q6", "q7"]
    made = minibatches.make(by_hand.trajectories(seed=1), SCORES, parts[0])
    for name, array in vars(made.batches[1]).items():
        np.testing.assert_array_equal(getattr(batch, name), array, err_msg=name)
    _, learner, host = parts
    on_mesh = parallel.to_mesh(batch, None, "batch", None)
    state = learner.init(slow_decoder.on_mesh(MODEL, host), None)
    assert np.isfinite(learner.score(state, state.policy, on_mesh).logp).all()


def test_a_rollout_without_variance_changes_nothing_where_such_groups_are_left_out(learn):
    _, before = learn()
    values, after = learn([1.0] * 8, drop_equal_groups=True)
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


LIMITS = guards.Limits(kl=0.5, entropy_low=0.1, entropy_high=3.0, gradient_norm=10.0)
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
    assert LIMITS.exceeded(CALM) == []
    assert LIMITS.exceeded(CALM | {figure: value}) == [words]
    assert guards.Limits(kl=0, entropy_low=0, entropy_high=0, gradient_norm=0).exceeded(CALM | {figure: value}) == []
