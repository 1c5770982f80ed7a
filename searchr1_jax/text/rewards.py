"""What an episode is worth: pure measures of an answer, and the rewards made of them.

    answer, golden answers ─ exact_match, sub_exact_match, token_f1 ─▶ float
    Trajectory ─ a reward of REWARDS, or the user's own ─▶ float

A reward is any function `types.Trajectory -> float`. The config names it: a key of `REWARDS` or
`package.module:function`, which `resolve` turns into the function once, in the entry point.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
import importlib
import re
import string

from searchr1_jax import types

Reward = Callable[[types.Trajectory], float]
Measure = Callable[[str | None, Sequence[str]], float]

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The text in lower case without punctuation and articles, single-spaced (Rajpurkar et al., 2016).

    Punctuation is ASCII's, as in the evaluation scripts that published figures come from: `’` and `–` stay.
    It goes before the articles do, so "A." is an article and "a-ha" is the word "aha".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised golden answer, else 0; no answer is worth 0."""
    if prediction is None:
        return 0.0
    return float(normalize_answer(prediction) in map(normalize_answer, golden_answers))


def sub_exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1 if some normalised golden answer stands in the normalised prediction, else 0; no answer is worth 0.

    A golden answer that normalises to nothing ("The The") stands only in a prediction that does so too.
    """
    if prediction is None:
        return 0.0
    predicted = normalize_answer(prediction)
    golden = map(normalize_answer, golden_answers)
    return float(any(answer in predicted if answer else not predicted for answer in golden))


def token_f1(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """The best F1 of the prediction's words against a golden answer's, both normalised; no answer is worth 0.

    F1 = 2PR / (P + R), P = common / predicted words, R = common / golden words, common counted with
    multiplicity (Rajpurkar et al., 2016). If either side has no words, 1 when neither has, else 0.
    """
    if prediction is None:
        return 0.0
    predicted = normalize_answer(prediction).split()
    return max((_f1(predicted, normalize_answer(answer).split()) for answer in golden_answers), default=0.0)


def _f1(predicted: list[str], golden: list[str]) -> float:
    if not predicted or not golden:
        return float(predicted == golden)
    common = (collections.Counter(predicted) & collections.Counter(golden)).total()
    return 2 * common / (len(predicted) + len(golden))


def of_answer(measure: Measure) -> Reward:
    """The reward that gives a trajectory what `measure` gives its answer."""

    def reward(trajectory: types.Trajectory) -> float:
        return measure(trajectory.answer, trajectory.example.golden_answers)

    return reward


REWARDS: dict[str, Reward] = {
    "exact_match": of_answer(exact_match),
    "sub_exact_match": of_answer(sub_exact_match),
    "f1": of_answer(token_f1),
}


def resolve(name: str) -> Reward:
    """The reward that a config names: a key of `REWARDS`, or `package.module:function` for a user's own.

    Raises:
      ValueError: for any other name, a module that cannot be imported, or one without such a function.
    """
    if name in REWARDS:
        return REWARDS[name]
    choices = f"one of {', '.join(REWARDS)}, or package.module:function"
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"unknown reward {name!r}; it is {choices}")
    try:
        reward = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} could not be imported ({error}); it is {choices}") from error
    if not callable(reward):
        raise ValueError(f"reward {name!r} is {reward!r}, not a function; it is {choices}")
    return reward
