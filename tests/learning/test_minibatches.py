"""How a rollout is cut, what is left out of it, and what its tokens weigh."""

import dataclasses

import numpy as np
import pytest

from searchr1_jax.core import types
from searchr1_jax.learning import minibatches

RECIPE = minibatches.Recipe(
    samples=2, updates=2, minibatch_by="questions", drop_equal_groups=False, advantage="group_mean",
    aggregation="token_mean", constant_tokens=8, mask_environment=True, row_tokens=(8, 16), micro_batch_rows=2,
)  # fmt: skip
SCORES = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # of two samples of a, b, c and d: b and d don't vary


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


def make(scores=SCORES, longest=4, **changes):
    return minibatches.make(eight(longest), scores, dataclasses.replace(RECIPE, **changes))


def weights(made):
    """The loss weights of the masked tokens of each trajectory, by its index in the rollout."""
    found = {}
    for batch, learned in zip(made.batches, made.learned, strict=True):
        for place, i in enumerate(learned):
            found[i] = batch.weight[(batch.trajectory == place) & batch.policy_mask].tolist()
    return found


def test_the_samples_of_a_question_stay_in_one_minibatch():
    assert make().learned == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make(updates=3).learned == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_cut_by_trajectories_groups_may_be_torn():
    assert make(updates=8, minibatch_by="trajectories").learned == [[i] for i in range(8)]


def test_a_batch_holds_its_trajectories_and_their_advantages():
    made = make()
    for batch, learned, values in zip(made.batches, made.learned, made.advantages, strict=True):
        for place, i in enumerate(learned):
            tokens = batch.trajectory == place
            assert set(batch.tokens[tokens]) == {ord("abcd"[i // 2])}
            expected = SCORES[i] - np.mean(SCORES[i // 2 * 2 : i // 2 * 2 + 2])
            assert set(values[tokens & batch.policy_mask]) == {expected}
        assert not values[~batch.policy_mask].any()


def test_groups_without_variance_are_counted_and_left_out_on_demand():
    assert make().statistics["groups_without_variance"] == 0.5
    made = make(drop_equal_groups=True)
    assert made.learned == [[0, 1], [4, 5]] and made.statistics["groups_without_variance"] == 0.5


def test_what_is_left_out_changes_no_shape():
    full = make()
    for scores, learned in ((SCORES, [[0, 1], [4, 5]]), ([1.0, 0.0] + [0.0] * 6, [[0, 1], []]), ([1.0] * 8, [[], []])):
        made = make(scores, drop_equal_groups=True)
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


@pytest.mark.parametrize("key, value", [("minibatch_by", "tokens"), ("aggregation", "mean")])
def test_an_unknown_choice_is_refused_with_those_that_there_are(key, value):
    with pytest.raises(ValueError, match=f"{key} is '{value}'; choose from"):
        dataclasses.replace(RECIPE, **{key: value})
