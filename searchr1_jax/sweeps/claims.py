"""What papers found, as comparisons of measured figures, and the one rule that judges whether runs show it.

Method, Claim of a config file; {method: [Run, …]} ─ judge, RULE ─▶ Finding: a verdict and a sentence
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

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
    limit = max(run.settings.learner.steps / 4, run.validations[0][0])
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

    title: str = ""  # empty: that it is a comparison with `against`
    papers: str = "not in the papers"  # their evidence
    expected: int = 0
    measure: Measure = FINAL
    against: str = ""  # a method; empty: the same one
    than: Measure | None = None  # of that method; None: the same as `measure`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a study: what its runs change, what its tables call it, and what papers found of it."""

    title: str
    seeds: int = 1  # runs, of seed 0 and up
    argument: str = ""  # of get_config
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # nested or by dotted key
    claims: tuple[Claim, ...] = ()


RULE = """\
A figure counts as above (below) another if it is so on every seed that both have, by more than a margin: the larger of
the spreads of the two over all their seeds (largest minus smallest), or twice the standard error of the difference of
two shares of that many questions, whichever is more. Then what the papers found *agrees*, or *the opposite* holds; else
it is *not seen here*, which does not refute it. A single seed is a weak test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured about a claim."""

    title: str
    claim: Claim
    compared: str  # in words
    pairs: dict[int, tuple[float, float]]  # by seed: the method's figure, and what it is compared with; empty: none yet
    margin: float

    @property
    def sign(self) -> int:
        """+1 above, -1 below, 0 neither."""
        differences = [a - b for a, b in self.pairs.values()]
        return (min(differences) > self.margin) - (max(differences) < -self.margin)

    @property
    def verdict(self) -> str:
        expected = self.claim.expected
        if expected == 0:
            return {1: "above", -1: "below", 0: "no difference seen"}[self.sign]
        return {expected: "agrees", -expected: "the opposite", 0: "not seen here"}[self.sign]

    def sentence(self) -> str:
        pairs = ", ".join(f"{number(a)} and {number(b)} (seed {seed})" for seed, (a, b) in self.pairs.items())
        measured = f"{self.compared}: {pairs}; margin {number(self.margin)}"
        return f"*{self.title}* ({self.claim.papers}): **{self.verdict}**. {measured[0].upper()}{measured[1:]}."


def judge(methods: Mapping[str, Method], runs: finished_runs.Runs) -> dict[str, list[Finding]]:
    """All claims against the runs, by method; without pairs where a method has no run, or no seed in common."""
    found: dict[str, list[Finding]] = {name: [] for name in methods}
    for name, claim in ((name, claim) for name, method in methods.items() for claim in method.claims):
        measure, than = claim.measure, claim.than or claim.measure
        ours, theirs = runs.get(name, ()), runs.get(claim.against or name, ())
        values = {run.seed: than.of(run) for run in theirs}
        pairs = {run.seed: (measure.of(run), values[run.seed]) for run in ours if run.seed in values}
        margin = 0.0
        if pairs:
            error = math.sqrt(measure.variance(ours) + than.variance(theirs))
            margin = max(measure.spread(ours), than.spread(theirs), 2 * error)
        other = methods[claim.against].title if claim.against else ""
        compared = f"{measure.words} and {f'that of {other}' if other else than.words}"
        title = claim.title or f"against {other}"
        found[name].append(Finding(title=title, claim=claim, compared=compared, pairs=pairs, margin=margin))
    return found


def number(value: float) -> str:
    """Three decimals, without the zero before the point."""
    return re.sub(r"^0\.", ".", f"{value:.3f}")
