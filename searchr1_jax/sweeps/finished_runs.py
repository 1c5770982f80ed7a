"""The logs of a sweep's finished runs, by method.

<method>-seed<n>/  config.json ─ metrics.jsonl ─ eval/*.json ─ verbs.jsonl  ─ read ─▶ {method: [Run of a seed, …]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

from searchr1_jax.run import metrics
from searchr1_jax.run import run_directory

RUN_NAME = re.compile(r"(?P<method>[A-Za-z0-9].*)-seed(?P<seed>0|[1-9][0-9]*)")
EVALUATIONS = ("base-greedy", "base-sampled", "final-greedy", "final-sampled")

# The methods of configs/study.py, as the table calls them, in its order.
METHODS = {
    "ppo": "PPO",
    "unmasked": "PPO, retrieved tokens not masked",
    "top_3": "PPO, three passages a search",
    "format": "PPO, reward of the form too",
    "no_kl": "PPO, no KL",
    "reinforce_pp": "REINFORCE++",
    "grpo": "GRPO, groups of 5",
    "grpo_of_3": "GRPO, groups of 3",
    "grpo_of_1": "GRPO, groups of 1",
    "rloo": "RLOO",
    "dr_grpo": "Dr.GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The logs of a finished run."""

    seed: int
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    evaluations: dict[str, dict[str, Any]]  # "base-greedy", … on test questions
    validation_questions: int
    verbs: list[dict[str, Any]]

    @property
    def validations(self) -> list[tuple[int, float]]:
        """Step and sampled exact match of the evaluations during training, the one before it left out."""
        found = [(row["step"], row["eval/sampled/em"]) for row in self.rows if "eval/sampled/em" in row]
        return [(step, em) for step, em in found if step > 0]

    @property
    def training_s(self) -> float:
        """Of all steps, without start and evaluations; what an interruption lost is not counted."""
        return sum(row.get("seconds/rollout", 0.0) + row.get("seconds/learning", 0.0) for row in self.rows)


Methods = Mapping[str, Sequence[Run]]  # runs by ascending seed


def read(workdir: pathlib.Path) -> tuple[dict[str, list[Run]], list[str]]:
    """The finished runs of a sweep by method, in the order of METHODS, and the names of those not finished.

    Raises:
      ValueError: for a method that METHODS lacks, a run of another seed than its name says, runs of a method that
        differ in more than the seed, evaluations on different questions, or a workdir without a finished run.
    """
    found: dict[str, list[Run]] = {method: [] for method in METHODS}
    unfinished = []
    for directory in sorted(path for path in workdir.glob("*-seed*") if path.is_dir()):
        if not (name := RUN_NAME.fullmatch(directory.name)):
            continue
        if name["method"] not in METHODS:
            raise ValueError(
                f"{directory} is of a method that is not described; add {name['method']!r} to METHODS in"
                " searchr1_jax/finished_runs.py, or move the directory elsewhere"
            )
        run = read_run(directory)
        if run is None:
            unfinished.append(directory.name)
        elif run.seed != int(name["seed"]):
            raise ValueError(f"{directory} holds a run of seed {run.seed}; name it {name['method']}-seed{run.seed}")
        else:
            found[name["method"]].append(run)
    methods = {method: sorted(runs, key=lambda run: run.seed) for method, runs in found.items() if runs}
    if not methods:
        raise ValueError(
            f"no finished run in {workdir}; run python -m searchr1_jax.sweep --config=configs/study.py"
            f" --workdir={workdir}"
        )
    for method, runs in methods.items():
        for run in runs[1:]:
            if changed := run_directory.differences(runs[0].config | {"seed": run.seed}, run.config):
                raise ValueError(
                    f"seeds {runs[0].seed} and {run.seed} of {method} differ in {'; '.join(changed.values())}; move one"
                    " elsewhere and run the sweep again"
                )
    counts = {e["n"] for runs in methods.values() for run in runs for e in run.evaluations.values()}
    if len(counts) > 1:
        raise ValueError(f"evaluations are of {sorted(counts)} questions; evaluate all on the same ones")
    return methods, unfinished


def read_run(directory: pathlib.Path) -> Run | None:
    """A run's logs, or None where it is not finished."""
    files = [directory / "config.json", *(directory / "eval" / f"{name}.json" for name in EVALUATIONS)]
    if not all(path.is_file() for path in files):
        return None
    config, *evaluations = (json.loads(path.read_text()) for path in files)
    rows = metrics.read(directory)
    if not rows or rows[-1]["step"] < config["learner"]["steps"]:
        return None
    validation = next(iter(sorted((directory / "eval").glob("validation-sampled-*.json"))), None)
    if validation is None:
        raise ValueError(
            f"{directory / 'eval'} holds no validation-sampled-*.json; train with evaluation.decoding and .every set"
        )
    return Run(
        seed=config["seed"],
        config=config,
        rows=rows,
        evaluations=dict(zip(EVALUATIONS, evaluations, strict=True)),
        validation_questions=json.loads(validation.read_text())["n"],
        verbs=read_verbs(directory),
    )


def read_verbs(directory: pathlib.Path) -> list[dict[str, Any]]:
    path = directory / "verbs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
