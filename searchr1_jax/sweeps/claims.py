"""What the papers found, as comparisons of measured figures, and the one rule that judges whether runs show it.

{method: [Run, …]} ─ Measure ─▶ figures ─ Claim, RULE ─▶ Finding: a verdict and a sentence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
import re

from searchr1_jax.sweeps import finished_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure of a run."""

    words: str
    of: Callable[[finished_runs.Run], float]
    questions: Callable[[finished_runs.Run], int] = lambda run: 0  # that it is the share of; 0: it is no share

    def variance(self, runs: Sequence[finished_runs.Run]) -> float:
        """Of a share p of n questions, p (1 − p) / n with the mean p of the runs; 0 for what is no share."""
        count = self.questions(runs[0])
        share = sum(map(self.of, runs)) / len(runs)
        return share * (1 - share) / count if count else 0.0

    def spread(self, runs: Sequence[finished_runs.Run]) -> float:
        """Largest minus smallest of the seeds."""
        values = list(map(self.of, runs))
        return max(values) - min(values)


def _early(run: finished_runs.Run) -> float:
    """The mean of the evaluations in the first quarter of the steps, at least that of the first."""
    limit = max(run.config["learner"]["steps"] / 4, run.validations[0][0])
    found = [em for step, em in run.validations if step <= limit]
    return sum(found) / len(found)


def _tested(words: str, name: str, key: str = "em") -> Measure:
    shares = dict(questions=lambda run: run.evaluations[name]["n"]) if key == "em" else {}
    return Measure(words=words, of=lambda run: run.evaluations[name][key], **shares)


def _validated(words: str, of: Callable[[finished_runs.Run], float]) -> Measure:
    return Measure(words=words, of=of, questions=lambda run: run.validation_questions)


FINAL = _tested("sampled exact match", "final-sampled")
BASE = _tested("the base's", "base-sampled")
SEARCHES = _tested("searches a question", "final-sampled", "searches")
BASE_SEARCHES = _tested("the base's", "base-sampled", "searches")
EARLY = _validated("validation exact match, mean over the first quarter of the steps,", _early)
LAST = _validated("validation exact match at the end", lambda run: run.validations[-1][1])
BEST = _validated("the best on the way", lambda run: max(em for _, em in run.validations))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """That a figure of a method is above (+1) or below (-1) another figure; 0: the papers don't say."""

    method: str
    title: str
    papers: str  # their evidence
    expected: int
    measure: Measure = FINAL
    against: str
    than: Measure = FINAL


def _untried(method: str, against: str) -> Claim:
    title = f"against {finished_runs.METHODS[against]}"
    return Claim(method=method, title=title, papers="not in the papers", expected=0, against=against)


CLAIMS = (
    Claim(
        method="ppo", title="learning to search pays", against="ppo", than=BASE, expected=+1,
        papers="7B base: .431 after PPO, .304 for retrieval without any learning",
    ),
    Claim(
        method="ppo", title="searches grow more", measure=SEARCHES, against="ppo", than=BASE_SEARCHES, expected=+1,
        papers="about 1.4 a question early in training, 2.0 late",
    ),
    Claim(
        method="unmasked", title="masking helps", against="ppo", expected=-1,
        papers="7B base, PPO: .431 masked, .343 when retrieved tokens are learned from",
    ),
    Claim(
        method="top_3", title="three passages beat one", against="ppo", expected=+1,
        papers="7B base, PPO: .375 with one passage, .431 with three",
    ),
    Claim(
        method="format", title="learns faster", measure=EARLY, against="ppo", than=EARLY, expected=+1,
        papers="base models learn faster when the form is rewarded too; here the form is only to answer at all",
    ),
    _untried("no_kl", "ppo"),
    _untried("reinforce_pp", "ppo"),
    Claim(
        method="grpo", title="starts faster", measure=EARLY, against="ppo", than=EARLY, expected=+1,
        papers="GRPO's reward rises earlier than PPO's",
    ),
    Claim(
        method="grpo", title="collapses later", measure=LAST, against="grpo", than=BEST, expected=-1,
        papers="GRPO's reward breaks down again late in training",
    ),
    Claim(
        method="grpo", title="ends below PPO", against="ppo", expected=-1,
        papers="7B base: .350, PPO .431; at 3B the other way, .312 and .303",
    ),
    Claim(
        method="grpo_of_3", title="a smaller group ends higher", against="grpo", expected=+1,
        papers="7B base: .363 with 3 samples a question, .350 with 5",
    ),
    Claim(
        method="grpo_of_1", title="a smaller group ends higher", against="grpo", expected=+1,
        papers="7B base: .410 with 1 sample a question, .350 with 5",
    ),
    *(_untried(method, "grpo") for method in ("rloo", "dr_grpo", "dapo", "gspo")),
)  # fmt: skip

RULE = """\
A figure counts as above (below) another if it is so on every seed that both have, by more than a margin: the larger of
the spreads of the two over all their seeds (largest minus smallest), or twice the standard error of the difference of
two shares of so many questions, whichever is more. Then what the papers found *agrees*, or *the opposite* holds; else
it is *not seen here*, which does not refute it. A single seed is a weak test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured about a claim."""

    claim: Claim
    pairs: dict[int, tuple[float, float]]  # by seed: the method's figure, and what it is compared with
    margin: float

    @property
    def sign(self) -> int:
        """+1 above, -1 below, 0 neither."""
        differences = [a - b for a, b in self.pairs.values()]
        return (min(differences) > self.margin) - (max(differences) < -self.margin)

    @property
    def verdict(self) -> str:
        if self.claim.expected == 0:
            return {1: "above", -1: "below", 0: "no difference seen"}[self.sign]
        return {self.claim.expected: "agrees", -self.claim.expected: "the opposite", 0: "not seen here"}[self.sign]

    def sentence(self) -> str:
        c = self.claim
        other = c.than.words if c.against == c.method else f"that of {finished_runs.METHODS[c.against]}"
        pairs = ", ".join(f"{number(a)} and {number(b)} (seed {seed})" for seed, (a, b) in self.pairs.items())
        measured = f"{c.measure.words} and {other}: {pairs}; margin {number(self.margin)}"
        return f"*{c.title}* ({c.papers}): **{self.verdict}**. {measured[0].upper()}{measured[1:]}."


def judge(claim: Claim, methods: finished_runs.Methods) -> Finding | None:
    """The claim against the runs, or None where a method has none, or no seed in common."""
    ours, theirs = methods.get(claim.method, ()), methods.get(claim.against, ())
    values = {run.seed: claim.than.of(run) for run in theirs}
    pairs = {run.seed: (claim.measure.of(run), values[run.seed]) for run in ours if run.seed in values}
    if not pairs:
        return None
    error = math.sqrt(claim.measure.variance(ours) + claim.than.variance(theirs))
    margin = max(claim.measure.spread(ours), claim.than.spread(theirs), 2 * error)
    return Finding(claim=claim, pairs=pairs, margin=margin)


def number(value: float) -> str:
    """Three decimals, without the zero before the point."""
    return re.sub(r"^0\.", ".", f"{value:.3f}")
