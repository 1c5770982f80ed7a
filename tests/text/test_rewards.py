import numpy as np
import pytest

from searchr1_jax import types
from searchr1_jax.text import rewards


def trajectory(answer, golden):
    return types.Trajectory(
        example=types.QAExample(id="q", question="?", golden_answers=golden),
        sample=0,
        tokens=np.zeros(1, np.int32),
        sampled=np.ones(1, bool),
        behaviour_logp=np.zeros(1, np.float32),
        prompt_tokens=0,
        turns=(),
        stop_reason="answered" if answer is not None else "no_action",
        answer=answer,
    )


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The Beatles", "beatles"),
        ("  An  apple,\ta\nday! ", "apple day"),
        ("U.S.A.", "usa"),
        ("A.", ""),  # punctuation goes first, and what is left is an article
        ("a-ha", "aha"),
        ("Theatre and anthem", "theatre and anthem"),  # articles are whole words
        ("1,234.5", "12345"),
        ("Jay-Z's", "jayzs"),
        ("ZÜRICH", "zürich"),
        ("O’Neill – Tokyo", "o’neill – tokyo"),  # only ASCII punctuation is dropped
        ("north\u00a0pole", "north pole"),  # a no-break space is white space
        ("東京", "東京"),
        ("The A An", ""),
        ("", ""),
    ],
)
def test_normalisation_drops_case_punctuation_articles_and_spaces(text, normalised):
    assert rewards.normalize_answer(text) == normalised


@pytest.mark.parametrize(
    "prediction, golden, exact, sub",
    [
        ("the Beatles!", ("Beatles", "Fab Four"), 1, 1),
        ("fab  four", ("Beatles", "The Fab Four"), 1, 1),
        ("The Beatles, from Liverpool", ("Beatles",), 0, 1),
        ("Beat", ("Beatles",), 0, 0),
        ("Beatlesque", ("Beatles",), 0, 1),  # a substring need not be whole words
        ("Paris", (), 0, 0),
        ("", ("Beatles",), 0, 0),
        ("The The", ("The The",), 1, 1),
        ("Matt Johnson", ("The The",), 0, 0),  # a golden answer without words is in no answer with some
        (None, ("Beatles",), 0, 0),
        (None, ("The The",), 0, 0),
        ("None", ("none",), 1, 1),
    ],
)
def test_exact_and_sub_exact_match(prediction, golden, exact, sub):
    assert rewards.exact_match(prediction, golden) == exact
    assert rewards.sub_exact_match(prediction, golden) == sub


@pytest.mark.parametrize(
    "prediction, golden, f1",
    [
        ("the cat sat", ("a cat sat",), 1),
        ("cat sat mat", ("cat ran",), 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # 0.4
        ("cat cat cat", ("cat cat dog",), 2 / 3),  # two of three on either side
        ("Barack Obama", ("Joe Biden", "Obama", "President Obama Junior"), 2 / 3),  # the best of 0, 2/3, 0.4
        ("dog", ("cat",), 0),
        ("", ("cat",), 0),
        ("The", ("An",), 1),  # neither has a word
        ("cat", (), 0),
        (None, ("cat",), 0),
        (None, ("The The",), 0),
    ],
)
def test_f1_counts_common_words(prediction, golden, f1):
    assert rewards.token_f1(prediction, golden) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    "name, worth", [("exact_match", (0, 1, 0)), ("sub_exact_match", (1, 1, 0)), ("f1", (2 / 3, 1, 0))]
)
def test_a_reward_scores_the_answer_of_a_trajectory(name, worth):
    reward = rewards.resolve(name)
    assert reward is rewards.REWARDS[name]
    scores = [reward(trajectory(answer, ("Beijing",))) for answer in ("Beijing, China", "beijing", None)]
    assert scores == pytest.approx(worth, abs=1e-12)
    assert all(type(score) is float for score in scores)


def test_every_reward_is_tested_here():
    assert set(rewards.REWARDS) == {"exact_match", "sub_exact_match", "f1"}


def test_a_users_own_reward_is_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def short(trajectory):\n    return 1 / len(trajectory.answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.resolve("own_rewards:short")(trajectory("four", ())) == 0.25


@pytest.mark.parametrize(
    "name", ["", "em", "exact-match", "json", "json:", ":dumps", "json:no_such", "no_such:f"]
)
def test_an_unknown_reward_is_refused_with_the_choices(name):
    with pytest.raises(
        ValueError, match=f"reward '{name}'.*exact_match, sub_exact_match, f1.*package.module:function"
    ):
        rewards.resolve(name)


def test_a_name_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="reward 'string:punctuation' is .* not a function"):
        rewards.resolve("string:punctuation")
