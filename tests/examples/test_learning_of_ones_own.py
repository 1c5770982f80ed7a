"""The examples of a reward of turns, an advantage and a policy loss: what they compute, and a step that learns."""

import dataclasses

import jax
from learning import by_hand
import numpy as np
import pytest
import slow_decoder

from configs import base
from configs import presets
from examples import advantage
from examples import policy_loss
from searchr1_jax.core import settings
from searchr1_jax.core import types
from searchr1_jax.learning import checks
from searchr1_jax.learning import losses
from searchr1_jax.learning import step as learning
from searchr1_jax.learning import update
from searchr1_jax.text import rewards

MODEL = slow_decoder.tiny_config(width=32)
SMALL = {
    "rollout.questions": 2, "rollout.samples": 2, "rollout.context_tokens": 32, "learner.row_tokens": (32,),
    "learner.vocab_chunk": 32, "learner.micro_batch_rows": 2, "learner.updates_per_rollout": 1,
    "policy.warmup_steps": 0,
}  # fmt: skip


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


@pytest.fixture
def learn(laptop, tmp_path):
    """learn(rewards, preset, …) learns one step; the clipped gradient, and the step's figures."""
    host = slow_decoder.random_params(MODEL, 0)

    def learn(worth, preset, **algorithm):
        config = base.get_config()
        presets.ALGORITHMS[preset](config)
        chosen = settings.Settings.of(config).replace(SMALL | {f"algorithm.{k}": v for k, v in algorithm.items()})
        checks.check(chosen)
        learner, place = update.Learner(MODEL, chosen), lambda: slow_decoder.on_mesh(MODEL, host)
        state, values = learning.learn(
            learner, learner.init(place(), None), place(), trajectories(), worth, 0,
            kl_coefficient=0.001, failed=tmp_path,
        )  # fmt: skip
        assert all(map(np.isfinite, values.values())) and values["policy/gradient_norm"] > 0
        return by_hand.adam_mean(state.policy_optimizer), values

    return learn


def test_a_search_that_shows_the_answer_is_rewarded_once_and_the_answer_at_the_end(learn):
    reward = rewards.resolve("examples.turn_reward:found_then_answered", extra=("searches=0", "exact_match=0.5"))
    parts = [reward.parts(t) for t in trajectories()]
    assert [list(part["examples.turn_reward:found_then_answered"]) for part in parts] == list(map(list, OF_TURNS))
    worth = [reward.total(part) for part in parts]
    assert worth == [(0.2, 0.0, 1.5), (0.0, 0.0), (1.5,), (0.0, 0.2, 0.0)]
    by_turn, _ = learn(worth, "turn_grpo", discount=0.9)
    by_trajectory, _ = learn(worth, "grpo")
    assert np.abs(by_turn["decoder"]["norm"] - by_trajectory["decoder"]["norm"]).max() > 1e-4


def test_an_advantage_of_ones_own_is_learned_from(learn):
    reward = np.float32([[1, 0], [0.5, 0.5]])
    slow = np.array([[0.5, -0.5], [0, 0]]) / np.sqrt(0.125)  # the rollout's variance is (¼ + ¼) / 4
    np.testing.assert_allclose(advantage.standardise(reward), slow, rtol=1e-5)
    hardly_differing = [1.0, 0.0, 0.5, 0.4]  # in the second question, of which GRPO makes as much as of the first
    own, _ = learn(hardly_differing, "grpo", advantage="examples.advantage:batch_standardised")
    grpo, _ = learn(hardly_differing, "grpo")
    assert np.abs(own["decoder"]["norm"] - grpo["decoder"]["norm"]).max() > 1e-4


def test_a_policy_loss_of_ones_own_is_learned_from(learn):
    """A token twice as likely as before, beyond 1 + ε, still has a gradient: that of its bounded weight."""
    loss = lambda logp: policy_loss.clipped_weight(
        losses.Written(logp, np.float32(-2), None, np.float32(3), None, None, None), by_hand.algorithm(clip_high=0.5)
    )
    doubled = np.float32(-2 + np.log(2))
    np.testing.assert_allclose(loss(doubled)[0], -1.5 * 3 * doubled, rtol=1e-6)
    assert loss(doubled)[1] and jax.grad(lambda x: loss(x)[0])(doubled) == -1.5 * 3
    # In the first update of a rollout no ratio differs from 1, and the gradient is PPO's.
    own, _ = learn([1.0, 0.0, 1.0, 0.0], "grpo", policy_loss="examples.policy_loss:cispo", clip_high=4.0)
    ppo, _ = learn([1.0, 0.0, 1.0, 0.0], "grpo")
    by_hand.assert_close(own, ppo, relative=1e-5)


def test_what_a_policy_loss_of_ones_own_ignores_is_refused(learn):
    with pytest.raises(
        ValueError, match="algorithm.dual_clip of 3.0 has no effect with .* 'examples.policy_loss:cispo'"
    ):
        learn([1.0, 0.0, 1.0, 0.0], "grpo", policy_loss="examples.policy_loss:cispo", dual_clip=3.0)
