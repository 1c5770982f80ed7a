"""How a rollout is cut, what is left out of it, and what its tokens weigh."""

import by_hand
import numpy as np
import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.learning import minibatches

SETTINGS = settings.Settings().replace({
    "seed": 1,  # at step 0 it leaves four questions in their order
    "rollout.samples": 2, "algorithm.advantage": "group_mean", "algorithm.constant_tokens": 8,
    "learner.row_tokens": (8, 16), "learner.micro_batch_rows": 2,
})  # fmt: skip
REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # of two samples of a, b, c and d: b and d don't vary


def trajectory(question, sample, written):
    """A prompt of one token, and `written` of the policy after it."""
    tokens = 1 + written
    return types.Trajectory(
        example=types.QAExample(id=question, question="", golden_answers=()), sample=sample,
        tokens=np.full(tokens, ord(question), np.int32), sampled=np.arange(tokens) > 0,
        behaviour_logp=np.zeros(tokens, np.float32), prompt_tokens=1, turns=(), stop_reason="answered", answer=None,
    )  # fmt: skip


def eight(longest=4):
    lengths = iter([2, longest, 3, 1, 2, 2, 4, 3])
    return [trajectory(question, sample, next(lengths)) for question in "abcd" for sample in (0, 1)]


def make(rewards=REWARDS, longest=4, **algorithm):
    changes = {f"algorithm.{name}": value for name, value in algorithm.items()}
    return minibatches.make(eight(longest), rewards, SETTINGS.replace(changes))


def learned(**learner):
    """The trajectories of each mini-batch."""
    changes = {f"learner.{name}": value for name, value in learner.items()}
    return minibatches.make(eight(), REWARDS, SETTINGS.replace(changes)).learned


def weights(made):
    """The loss weights of the masked tokens of each trajectory, by its index in the rollout."""
    found = {}
    for batch, learned in zip(made.batches, made.learned, strict=True):
        for place, i in enumerate(learned):
            found[i] = batch.weight[(batch.trajectory == place) & batch.policy_mask].tolist()
    return found


def test_the_samples_of_a_question_stay_in_one_minibatch():
    assert learned() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert learned(updates_per_rollout=3) == [[0, 1, 2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("by, updates", [("questions", 2), ("trajectories", 10)])
def test_each_update_sees_the_data_sets_in_the_shares_of_the_rollout(by, updates):
    """512 questions, 45% of one set, which the order of ids puts in front."""
    questions, samples = 512, 2 if by == "questions" else 5
    first = int(0.45 * questions) * samples
    changes = {"rollout.samples": samples, "learner.updates_per_rollout": updates, "learner.minibatch_by": by}
    chosen, rewards = SETTINGS.replace(changes), np.arange(questions * samples) % 2
    trajectories = [trajectory("a", 0, 1)] * len(rewards)
    seen = []
    for step in range(3):
        parts = minibatches.make(trajectories, rewards.tolist(), chosen, step).learned
        assert sorted(sum(parts, [])) == list(range(len(rewards)))
        again = minibatches.make(trajectories, rewards.tolist(), chosen, step).learned
        assert parts == again and parts not in seen  # by seed and step alone, and each step anew
        seen.append(parts)
        for part in parts:
            deviation = np.sqrt(0.45 * 0.55 / (len(part) / samples))  # of a share among that many questions
            assert abs(np.mean(np.array(part) < first) - 0.45) < 4 * deviation


def test_cut_by_trajectories_groups_may_be_torn():
    assert learned(updates_per_rollout=8, minibatch_by="trajectories") == [[i] for i in range(8)]


def test_a_batch_holds_its_trajectories_and_their_advantages():
    made = make()
    for batch, learned, values in zip(made.batches, made.learned, made.advantages, strict=True):
        for place, i in enumerate(learned):
            tokens = batch.trajectory == place
            assert set(batch.tokens[tokens]) == {ord("abcd"[i // 2])}
            expected = REWARDS[i] - np.mean(REWARDS[i // 2 * 2 : i // 2 * 2 + 2])
            assert set(values[tokens & batch.policy_mask]) == {expected}
        assert not values[~batch.policy_mask].any()


def test_groups_without_variance_are_counted_and_left_out_on_demand():
    assert make().statistics["groups_without_variance"] == 0.5
    made = make(drop_equal_groups=True)
    assert made.learned == [[0, 1], [4, 5]] and made.statistics["groups_without_variance"] == 0.5


def test_what_is_left_out_changes_no_shape():
    full = make()
    for rewards, learned in (
        (REWARDS, [[0, 1], [4, 5]]),
        ([1.0, 0.0] + [0.0] * 6, [[0, 1], []]),
        ([1.0] * 8, [[], []]),
    ):
        made = make(rewards, drop_equal_groups=True)
        assert made.learned == learned and made.statistics["updates"] == sum(map(bool, learned))
        for batch, like in zip(made.batches, full.batches, strict=True):
            assert batch.tokens.shape == like.tokens.shape
        for batch, part in zip(made.batches, learned, strict=True):
            assert (batch.micro_batches == 0) == (not part)


def test_tokens_weigh_what_the_formula_says():
    """Written tokens of the first mini-batch: 2, 4, 3, 1, together 10 of 4 trajectories."""
    assert weights(make())[0] == pytest.approx([1 / 10] * 2)
    by_sequence = weights(make(aggregation="sequence_mean"))
    assert by_sequence[1] == pytest.approx([1 / 16] * 4) and by_sequence[3] == pytest.approx([1 / 4])
    assert weights(make(aggregation="constant"))[1] == pytest.approx([1 / 32] * 4)
    for aggregation in ("token_mean", "sequence_mean"):
        made = make(aggregation=aggregation)
        for learned in made.learned:
            assert sum(sum(weights(made)[i]) for i in learned) == pytest.approx(1)


def test_rows_are_as_short_as_the_longest_trajectory_allows():
    short, long = make(), make(longest=9)
    assert short.batches[0].tokens.shape[-1] == 8 and long.batches[1].tokens.shape[-1] == 16
    assert short.statistics["row_tokens"] == 8
    assert make(longest=7).statistics["row_tokens"] == 8  # eight tokens with the prompt


def test_utilisation_is_the_share_of_places_with_a_token():
    """Mini-batches of 3 + 5 + 4 + 2 and 3 + 3 + 5 + 4 tokens: two rows of 8 each, one micro-batch each."""
    assert make().statistics["row_utilisation"] == pytest.approx((14 + 15) / 32)


# Rewards of turns. Samples of one question: three turns, one turn, two turns, two turns.

TURNS = [by_hand.trajectory("q", layout, np.random.default_rng(0), sample=sample) for sample, layout in enumerate(
    [(2, 1, 1, 2, 1, 1), (2, 3), (1, 2, 2, 1), (2, 2, 1, 2)]
)]  # fmt: skip
OF_TURNS = [[0.0, 0.5, 1.0], 0.25, [1.0, -1.0], 1.0]  # a number is the last turn's


def of_turns(advantage, rewards=OF_TURNS, **algorithm):
    changes = {"rollout.samples": 4, "rollout.questions": 1, "learner.updates_per_rollout": 1}
    changes |= {"algorithm.advantage": advantage} | {f"algorithm.{name}": value for name, value in algorithm.items()}
    return minibatches.make(TURNS, rewards, SETTINGS.replace(changes))


def by_turn(made):
    """The advantages of each trajectory's turns."""
    (batch,), (values,) = made.batches, made.advantages
    of = lambda i, k: set(values[(batch.trajectory == i) & (batch.turn == k)].tolist())
    assert not values[~batch.policy_mask].any()
    return [[value for k in range(t.turn_count) for value in of(i, k)] for i, t in enumerate(TURNS)]


def test_a_turns_tokens_have_the_turns_advantage():
    """The rewards that there are: 0, ½, 1, ¼, 1, −1, 1."""
    given = np.array([0, 0.5, 1, 0.25, 1, -1, 1])
    unit = lambda reward: (reward - given.mean()) / (given.std(ddof=1) + 1e-6)
    a, b, c, d, e, f, g = map(unit, given)
    expected = [[a + b / 2 + c / 4, b + c / 2, c], [d], [e + f / 2, f], [g / 2, g]]
    for mine, slow in zip(by_turn(of_turns("turn_returns", discount=0.5)), expected, strict=True):
        np.testing.assert_allclose(mine, slow, rtol=1e-5)


def test_where_trajectories_are_compared_the_rewards_of_turns_are_added_up():
    sums = np.array([1.5, 0.25, 0.0, 1.0])
    expected = [[advantage] * t.turn_count for advantage, t in zip(sums - sums.mean(), TURNS, strict=True)]
    for mine, slow in zip(by_turn(of_turns("group_mean")), expected, strict=True):
        np.testing.assert_allclose(mine, slow, rtol=1e-6)


def test_a_group_is_left_out_where_all_that_is_compared_is_alike():
    alike = [[0.0, 0.5, 0.5], 1.0, [1.0, 0.0], [0.5, 0.5]]
    assert of_turns("group_mean", alike, drop_equal_groups=True).learned == [[]]
    assert of_turns("turn_returns", alike, drop_equal_groups=True).learned == [[0, 1, 2, 3]]
    assert of_turns("turn_returns", [0.5, 0.5, [0.5, 0.5], 0.5], drop_equal_groups=True).learned == [[]]


def test_the_rewards_of_turns_stand_on_their_last_tokens():
    (batch,) = of_turns("turn_returns").batches
    # Prompt 2, then turns of one, two (after one token of the environment) and one (after one more).
    np.testing.assert_array_equal(batch.reward[batch.trajectory == 0], [0, 0, 0, 0, 0, 0.5, 0, 1])
    np.testing.assert_array_equal(batch.turn[batch.trajectory == 0], [-1, -1, 0, -1, 1, 1, -1, 2])
    np.testing.assert_array_equal(batch.reward[batch.trajectory == 1], [0, 0, 0, 0, 0.25])
