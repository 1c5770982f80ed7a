"""The examples of a reward of turns, an advantage and a policy loss, by hand; a run is in test_together.py."""

import dataclasses

import jax
from learning import by_hand
import numpy as np
import pytest

from configs import base, presets
from examples import advantage, policy_loss
from searchr1_jax.core import settings, types
from searchr1_jax.learning import checks, losses, minibatches
from searchr1_jax.text import rewards


def search(reply):
    return types.Turn(text="", event="search", content="query", reply=reply)


def answer(text):
    return types.Turn(text="", event="answer", content=text)


# Two samples of each of two questions; "Kelu" is right.
EPISODES = (
    (search("Mira is from Kelu."), search("Kelu is a town."), answer("Kelu")),
    (search("Mira is a name."), answer("Talon")),
    (answer("Kelu"),),
    (search("Mira is a name."), search("Mira is from Kelu."), answer("Talon")),
)
OF_TURNS = ([0.2, 0.0, 1.0], [0.0, 0.0], [1.0], [0.0, 0.2, 0.0])


def trajectories():
    """Turns of two tokens, replies of three."""
    made, rng = [], np.random.default_rng(0)
    for i, turns in enumerate(EPISODES):
        plain = by_hand.trajectory(f"q{i // 2}", (4, *([2, 3] * len(turns))[:-1]), rng, sample=i % 2)
        example = dataclasses.replace(plain.example, golden_answers=("Kelu",))
        turns = tuple(dataclasses.replace(turn, tokens=2) for turn in turns)
        made.append(dataclasses.replace(plain, example=example, turns=turns, answer=turns[-1].content))
    return made


def chosen(preset, **algorithm):
    """The settings of a preset, checked, with `algorithm` changed."""
    config = base.get_config()
    presets.ALGORITHMS[preset](config)
    changes = {f"algorithm.{key}": value for key, value in algorithm.items()}
    changes |= {"rollout.questions": 2, "rollout.samples": 2, "learner.updates_per_rollout": 1}
    made = settings.Settings.of(config).replace(changes)
    checks.check(made)
    return made


def test_a_search_that_shows_the_answer_is_rewarded_once_and_the_answer_at_the_end():
    name = "examples.turn_reward:found_then_answered"
    reward = rewards.resolve(settings.Reward(name=name, extra=("searches=0", "exact_match=0.5")))
    parts = [reward.parts(t) for t in trajectories()]
    assert [list(part[name]) for part in parts] == list(OF_TURNS)
    assert [reward.total(part) for part in parts] == [(0.2, 0.0, 1.5), (0.0, 0.0), (1.5,), (0.0, 0.2, 0.0)]


def test_turns_are_credited_with_their_own_reward_and_those_after_it():
    made = minibatches.make(trajectories(), OF_TURNS, chosen("turn_grpo", discount=0.9))
    [batch], [advantage_MBT] = made.batches, made.advantages
    expected = sum((by_hand.turn_returns(list(OF_TURNS[i : i + 2]), discount=0.9) for i in (0, 2)), [])
    for i, of_turns in enumerate(expected):
        mine = (batch.trajectory == i) & batch.policy_mask
        np.testing.assert_allclose(advantage_MBT[mine], np.repeat(of_turns, 2), rtol=1e-6)


def test_an_advantage_of_ones_own_makes_little_of_a_question_whose_samples_hardly_differ():
    reward = np.float32([[1, 0], [0.5, 0.5]])
    slow = np.array([[0.5, -0.5], [0, 0]]) / np.sqrt(0.125)  # the rollout's variance is (¼ + ¼) / 4
    np.testing.assert_allclose(advantage.standardise(reward), slow, rtol=1e-5)


def test_a_policy_loss_of_ones_own_still_has_a_gradient_beyond_its_clip():
    """A token twice as likely as before, beyond 1 + ε, has the gradient of its bounded weight."""
    loss = lambda logp: policy_loss.clipped_weight(
        losses.Written(logp, np.float32(-2), None, np.float32(3), None, None, None), by_hand.algorithm(clip_high=0.5)
    )
    doubled = np.float32(-2 + np.log(2))
    np.testing.assert_allclose(loss(doubled)[0], -1.5 * 3 * doubled, rtol=1e-6)
    assert loss(doubled)[1] and jax.grad(lambda x: loss(x)[0])(doubled) == -1.5 * 3


def test_what_a_policy_loss_of_ones_own_ignores_is_refused():
    name = "examples.policy_loss:cispo"
    assert chosen("grpo", policy_loss=name, clip_high=4.0).algorithm.policy_loss == name
    with pytest.raises(ValueError, match=f"algorithm.dual_clip of 3.0 has no effect with .* '{name}'"):
        chosen("grpo", policy_loss=name, dual_clip=3.0)
