"""What an episode is worth: pure measures of an answer, and the rewards made of them.

    answer, golden answers ─ exact_match, sub_exact_match, token_f1 ─▶ float
    Trajectory ─ a reward of REWARDS, or the user's own ─▶ a number, or one for each turn
    names and weights of a config ─ resolve ─▶ WeightedSum, the reward of a run and its parts

A reward is any function of a `types.Trajectory` that returns a number, which is what the whole is worth and counts for
its last turn, or a sequence of numbers, one for each turn. Settings name it: a key of `REWARDS` or
`package.module:function`, which `resolve` turns into the function once.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import math
import operator
import re
import string

import numpy as np

from searchr1_jax.core import names, settings, types
from searchr1_jax.text import protocol

Reward = Callable[[types.Trajectory], types.Worth]
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
    predicted, golden = normalize_answer(prediction), map(normalize_answer, golden_answers)
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


def amount(worth: types.Worth) -> float:
    """What a reward comes to: the number itself, or the sum over the turns."""
    return float(np.sum(worth))


def by_turn(worth: types.Worth) -> tuple[float, ...] | None:
    """What a reward gives each turn; None where it is a number."""
    return tuple(np.asarray(worth, np.float64).tolist()) if np.ndim(worth) else None


def of_answer(measure: Measure) -> Reward:
    """The reward that gives a trajectory what `measure` gives its answer."""

    def reward(trajectory: types.Trajectory) -> float:
        return measure(trajectory.answer, trajectory.example.golden_answers)

    return reward


def well_formed(trajectory: types.Trajectory) -> bool:
    """Whether the episode is think (call information think)* answer, with white space alone between its blocks.

        <think> … </think> <search> … </search>      every turn but the last, or the tags of another tool
        <think> … </think> <answer> … </answer>      the last one

    Judged on what the policy wrote, turn by turn. What the environment appended after a call is the information,
    whatever its template and passages look like; an invalid turn, and so every correction, is malformed. A tag of the
    protocol or of a tool inside a block is malformed, and so is text that the token completing the last tag carries
    beyond it. Where the prompt ends in <think> already, that is the first turn's.
    """
    *calls, last = [turn.event for turn in trajectory.turns] or [protocol.INVALID]
    in_order = last == protocol.ANSWER and set(calls) <= set(trajectory.tools)
    known_tags, openings = protocol.tags(trajectory.tools), ["<think>" * trajectory.thinking, *("" for _ in calls)]
    pairs = zip(trajectory.turns, openings, strict=True)
    return in_order and all(_thinks_then_acts(turn, opening, known_tags) for turn, opening in pairs)


def _thinks_then_acts(turn: types.Turn, opening: str, known_tags: Sequence[str]) -> bool:
    texts_and_tags = re.split(f"({'|'.join(known_tags)})", opening + turn.text)
    texts, tags = texts_and_tags[::2], texts_and_tags[1::2]
    expected = ["<think>", "</think>", f"<{turn.event}>", f"</{turn.event}>"]
    return tags == expected and not "".join(texts[::2]).strip()  # texts[1] and texts[3] are in the blocks


def retrieved(trajectory: types.Trajectory) -> bool:
    """Whether some golden answer stands in a retrieved passage and in the reply that showed it.

    "Stands in" is that of `sub_exact_match`. The reply alone would not do, because what wraps the passages may hold
    an answer too ("information", "1"); nor would the passage, because passages are cut to fit their budget.
    """
    golden = trajectory.example.golden_answers
    for turn in trajectory.turns:
        shown = [answer for answer in golden if sub_exact_match(turn.reply, [answer])]
        if any(sub_exact_match(f"{passage.title}\n{passage.text}", shown) for passage in turn.passages):
            return True
    return False


def repeated_queries(trajectory: types.Trajectory) -> int:
    """Answered searches whose normalised query was answered before in the episode."""
    queries = [normalize_answer(t.content) for t in trajectory.turns if t.event == protocol.SEARCH and t.reply]
    return len(queries) - len(set(queries))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatAware:
    """The reward of exact matches and of `well_formed` episodes (Jin et al., 2025, arXiv 2505.15117).

                    well-formed                                    malformed
    exact match     1                                              1 - structure
    another answer  structure, + retrieval if `retrieved`          answered
    no answer       (cannot be)                                    0
    """

    structure: float = 0.2
    retrieval: float = 0.0  # the reference's code suggests 0.1
    answered: float = 0.1

    def __call__(self, trajectory: types.Trajectory) -> float:
        right = exact_match(trajectory.answer, trajectory.example.golden_answers)
        if well_formed(trajectory):
            return 1.0 if right else self.structure + self.retrieval * retrieved(trajectory)
        if right:
            return 1.0 - self.structure
        return 0.0 if trajectory.answer is None else self.answered


FORMAT_AWARE = "format_aware"

REWARDS: dict[str, Reward] = {
    "exact_match": of_answer(exact_match),
    "sub_exact_match": of_answer(sub_exact_match),
    "f1": of_answer(token_f1),
    FORMAT_AWARE: FormatAware(),
    "well_formed": well_formed,
    "retrieved": retrieved,
    "searches": operator.attrgetter("searches"),
    "repeated_queries": repeated_queries,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """The reward of a run: Σ weight · part, over the same names in both fields."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    def parts(self, trajectory: types.Trajectory) -> dict[str, types.Worth]:
        """What each reward gives, unweighted; ValueError names one that gives other than one number for each turn."""
        parts: dict[str, types.Worth] = {}
        for name, reward in self.rewards.items():
            worth = reward(trajectory)
            each = by_turn(worth)
            if each is not None and len(each) != trajectory.turn_count:
                raise ValueError(
                    f"reward {name!r} gives {len(each)} numbers for the {trajectory.turn_count} turns of question"
                    f" {trajectory.example.id!r}, sample {trajectory.sample}; give one for each turn, or one for all"
                )
            parts[name] = amount(worth) if each is None else each
        return parts

    def total(self, parts: Mapping[str, types.Worth]) -> types.Worth:
        """The reward that `parts` add up to: one for each turn if some part is; numbers then count for the last."""
        turns = max(len(by_turn(parts[name]) or ()) for name, weight in self.weights.items() if weight)
        if not turns:
            return sum(weight * amount(parts[name]) for name, weight in self.weights.items())
        total = np.zeros(turns)
        for name, weight in self.weights.items():
            each = by_turn(parts[name])
            total[slice(-1, None) if each is None else slice(None)] += weight * np.asarray(parts[name])
        return tuple(total.tolist())

    def __call__(self, trajectory: types.Trajectory) -> types.Worth:
        return self.total(self.parts(trajectory))


def resolve(c: settings.Reward) -> WeightedSum:
    """The reward that settings describe: the one called `name`, plus weighted others.

    ValueError for a name that is no function's or comes twice, and for a weight that is no finite number.
    """
    known = REWARDS | {FORMAT_AWARE: FormatAware(structure=c.structure, retrieval=c.retrieval, answered=c.answered)}
    weights = {c.name: 1.0}
    for term in c.extra:
        name, weight = _name_and_weight(term)
        if name in weights:
            raise ValueError(
                f"reward {name!r} is named twice, again in {term!r}; name it once, in reward.name or extra"
            )
        weights[name] = weight
    found = {name: names.resolve(name, known, "reward") for name in weights}
    for name, reward in found.items():
        if not callable(reward):
            raise ValueError(f"reward names {name!r}, which is {reward!r}; make it a function of a trajectory")
    return WeightedSum(rewards=found, weights=weights)


def _name_and_weight(term: str) -> tuple[str, float]:
    name, _, weight = term.rpartition("=")
    with contextlib.suppress(ValueError):
        if name and math.isfinite(number := float(weight)):
            return name, number
    raise ValueError(f"reward.extra holds {term!r}; write name=weight with a finite weight, as in retrieved=0.1")
