"""All that is asked in a step is answered once and rewarded once, whoever does it."""

from __future__ import annotations

import collections
import types as python_types

import jax
import miniature
import numpy as np
import pytest
from rollout import scripted

from searchr1_jax.core import settings, types
from searchr1_jax.learning import step as learning
from searchr1_jax.rollout import episodes
from searchr1_jax.run import acting
from searchr1_jax.text import rewards

# A question that comes twice in a step.

PROTOCOL = settings.Protocol(prompt="{question}\n")
A, B, C = (types.QAExample(id=f"nq/{name}", question=name, golden_answers=("x",)) for name in "abc")


def test_a_question_that_comes_again_goes_on_counting_its_samples(byte_tokenizer):
    tasks = episodes.make_tasks([A, B, A, A], byte_tokenizer, PROTOCOL, samples=2, room=9)
    assert [(task.example, task.first_sample) for task in tasks] == [(A, 0), (B, 0), (A, 2), (A, 4)]
    assert {task.samples for task in tasks} == {2}


@pytest.mark.parametrize("shapes", [dict(slots=2, group=2), dict(slots=5, group=3, extend_rows=1)], ids=str)
def test_a_question_asked_twice_plays_every_sample_once(tagged_tokenizer, shapes):
    scripts = {
        example: [scripted.script(tagged_tokenizer, f"<answer>{example.id} {n}</answer>") for n in range(6)]
        for example in (A, B)
    }
    library = scripted.Library(lambda query: [])
    trajectories, _ = scripted.play(tagged_tokenizer, scripts, library, protocol=PROTOCOL, times=2, **shapes)
    answers = {key: trajectory.answer for key, trajectory in trajectories.items()}
    assert answers == {(e.id, n): f"{e.id} {n}" for e in (A, B) for n in range(6)}


def _trajectory(example, sample):
    return types.Trajectory(
        example=example, sample=sample, tokens=np.int32([5, 6, 7]), sampled=np.array([False, True, True]),
        behaviour_logp=np.zeros(3, np.float32), prompt_tokens=1, turns=(), stop_reason="no_action", answer=None,
    )  # fmt: skip


class _Listener:
    """A learner that notes the advantage of each trajectory it is given, mini-batch by mini-batch."""

    settings = miniature.settings(seed=1)  # at step 0 it leaves four groups in their order

    def __init__(self):
        self.heard = []

    def score(self, state, reference, batch):
        pass

    def estimate(self, batches, scores, group_advantages, *, kl_coefficient):
        for batch, advantage in zip(jax.device_get(batches), jax.device_get(group_advantages), strict=True):
            of = {int(i): set(advantage[(batch.trajectory == i) & batch.policy_mask].tolist()) for i in range(4)}
            self.heard.append([advantage for i in range(4) for advantage in of[i]])
        return [None] * len(batches), {}

    def update(self, state, batch, score, target, step, **scalars):
        return state, {"policy/loss": 0.0}


REWARDS = {"nq/a": (0.0, 1.0, 5.0, 5.0), "nq/b": (3.0, 1.0), "nq/c": (0.0, 0.0)}


def _answer(reward):
    """All episodes, as they arrive in some order, rewarded in three threads."""
    arriving = [_trajectory(e, n) for e, n in ((C, 1), (A, 2), (A, 0), (B, 1), (A, 3), (C, 0), (B, 0), (A, 1))]
    rollout = python_types.SimpleNamespace(run=lambda *_, **__: iter(arriving), counts=episodes.Counts())
    summed = rewards.WeightedSum(rewards={"table": reward}, weights={"table": 1.0})
    return acting.answer(rollout, [], None, reward=summed, reward_threads=3, seed=0, step=0, what="rollout")


def _worth(trajectory):
    return REWARDS[trajectory.example.id][trajectory.sample]


def test_each_episode_is_rewarded_once_and_keeps_its_reward_when_it_is_sorted():
    asked = collections.Counter()

    def reward(trajectory):
        asked[trajectory.key] += 1
        return _worth(trajectory)

    answered = _answer(reward)
    assert answered.failure is None and set(asked.values()) == {1} and len(asked) == 8
    assert [t.key for t in answered.trajectories] == sorted(asked)
    assert [worth.reward for worth in answered.rewards] == [*REWARDS["nq/a"], *REWARDS["nq/b"], *REWARDS["nq/c"]]


def test_a_reward_that_raises_is_a_failure_that_names_the_episode_and_the_others_keep_theirs():
    def reward(trajectory):
        return 1 / 0 if trajectory.key == ("nq/b", 1) else _worth(trajectory)

    answered = _answer(reward)
    assert str(answered.failure).startswith("the reward of question 'nq/b', sample 1, failed: ZeroDivisionError")
    worths = {t.key: worth for t, worth in zip(answered.trajectories, answered.rewards, strict=True)}
    assert worths.pop(("nq/b", 1)) is None and None not in worths.values() and len(worths) == 7


def test_groups_of_a_question_asked_twice_stay_whole(laptop, tmp_path):
    """Each group of G = 2 has its own mean; the first mini-batch holds a's two groups, the second b's and c's."""
    answered, learner = _answer(_worth), _Listener()
    given = [worth.reward for worth in answered.rewards]
    learning.learn(learner, None, None, answered.trajectories, given, 0, kl_coefficient=0.0, failed=tmp_path)
    half = 0.5**0.5  # (1 - ½) / the unbiased standard deviation of (0, 1); also that of (3, 1)
    np.testing.assert_allclose(learner.heard, [[-half, half, 0, 0], [half, -half, 0, 0]], atol=1e-5)
