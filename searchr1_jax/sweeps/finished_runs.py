"""The logs of a sweep's finished runs, by method.

<method>-seed<n>/  config.json ─ metrics.jsonl ─ eval/*.json  ─ read ─▶ {method: [Run of a seed, …]}
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.run import metrics, run_directory

_RUN_NAME = re.compile(r"(?P<method>[A-Za-z0-9].*)-seed(?P<seed>0|[1-9][0-9]*)")
EVALUATIONS = ("base-greedy", "base-sampled", "final-greedy", "final-sampled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The logs of a finished run."""

    settings: settings_lib.Settings
    rows: list[dict[str, Any]]  # of metrics.jsonl
    evaluations: dict[str, dict[str, Any]]  # "base-greedy", … on test questions
    validation_questions: int

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Step and sampled exact match of the evaluations during training, the one before it left out."""
        found = [(row["step"], row["eval/sampled/em"]) for row in self.rows if "eval/sampled/em" in row]
        return [(step, em) for step, em in found if step > 0]

    @property
    def training_s(self) -> float:
        """Of all steps, without start and evaluations; what an interruption lost is not counted."""
        return sum(row.get("seconds/rollout", 0.0) + row.get("seconds/learning", 0.0) for row in self.rows)


Runs = Mapping[str, Sequence[Run]]  # by method; the seeds ascend


def read(workdir: pathlib.Path, methods: Iterable[str]) -> tuple[dict[str, list[Run]], list[str]]:
    """The finished runs of a sweep by method, in the order of `methods`, and the names of those not finished.

    Raises:
      ValueError: for another method, a run of another seed than its name says, runs of a method that differ in more
        than the seed, evaluations on different questions, or a workdir without a finished run.
    """
    found: dict[str, list[Run]] = {method: [] for method in methods}
    unfinished = []
    for directory in sorted(path for path in workdir.glob("*-seed*") if path.is_dir()):
        if not (name := _RUN_NAME.fullmatch(directory.name)):
            continue
        method, seed = name["method"], int(name["seed"])
        if method not in found:
            raise ValueError(
                f"{directory} is of a method that is not described; add {method!r} to METHODS of the --config, or move"
                " the directory elsewhere"
            )
        run = read_run(directory)
        if run is None:
            unfinished.append(directory.name)
        elif run.seed != seed:
            raise ValueError(f"{directory} holds a run of seed {run.seed}; name it {method}-seed{run.seed}")
        else:
            found[method].append(run)
    runs = {method: sorted(some, key=lambda run: run.seed) for method, some in found.items() if some}
    if not runs:
        raise ValueError(
            f"no finished run in {workdir}; run python -m searchr1_jax.sweep with this --config and"
            f" --workdir={workdir} first"
        )
    for method, run in ((method, run) for method, some in runs.items() for run in some[1:]):
        first = runs[method][0]
        if changed := run_directory.changes(first.settings.replace({"seed": run.seed}), run.settings):
            raise ValueError(
                f"seeds {first.seed} and {run.seed} of {method} differ in {'; '.join(map(str, changed))}; move one"
                " elsewhere and run the sweep again"
            )
    counts = {e["n"] for some in runs.values() for run in some for e in run.evaluations.values()}
    if len(counts) > 1:
        raise ValueError(f"evaluations are of {sorted(counts)} questions; evaluate all on the same ones")
    return runs, unfinished


def read_run(directory: pathlib.Path) -> Run | None:
    """A run's logs, or None where it is not finished."""
    needed = run_directory.CONFIG, *(f"eval/{name}.json" for name in EVALUATIONS)
    if not all((directory / name).is_file() for name in needed):
        return None
    settings, rows = run_directory.settings_of(directory), metrics.read(directory)
    if not rows or rows[-1]["step"] < settings.learner.steps:
        return None
    validations = sorted((directory / "eval").glob("validation-sampled-*.json"))
    if not validations:
        raise ValueError(
            f"{directory / 'eval'} holds no validation-sampled-*.json; train with evaluation.decoding and .every set"
        )
    questions = json.loads(validations[0].read_text())["n"]
    return Run(settings=settings, rows=rows, evaluations=evaluations(directory), validation_questions=questions)


def evaluations(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What a finished run's evaluations on test questions found, by name."""
    return {name: json.loads((directory / "eval" / f"{name}.json").read_text()) for name in EVALUATIONS}
