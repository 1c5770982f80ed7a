r"""Methods against each other and against the papers: a table, a picture and sentences, all from the logs of a sweep.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study
python -m searchr1_jax.study --workdir=runs/study --readme

    runs ─ finished_runs ─▶ {method: [Run of a seed, …]} ─ curves.study_curves ─▶ docs/study.png
                                  │
                 tables, and claims judged by one rule ─▶ docs/study.md, and the block of README.md

The config file says what is studied in the first line of its docstring, in METHODS which methods there are and what is
claimed of them (`sweeps.claims`), in PAPERS by whom, and in PANELS what is drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import NamedTuple

from absl import flags

from searchr1_jax.run import command, curves, metrics
from searchr1_jax.sweeps import claims, entries, finished_runs

_CONFIG, _DOCUMENT = "configs/study.py", "docs/study.md"
_BEGIN, _END = "<!-- study -->", "<!-- /study -->"


class Study(NamedTuple):
    """What a config file says of it."""

    title: str
    methods: Mapping[str, claims.Method]  # by the name of their runs; in the order of the tables
    papers: str  # whose claims these are
    panels: Mapping[str, Sequence[str]]  # of the picture: what is drawn together

    @classmethod
    def read(cls, path: pathlib.Path) -> Study:
        """Raises ValueError where something is missing, or where a method is named that there is not."""
        config = entries.load(path, "METHODS", "PAPERS", "PANELS")
        named = {claim.against for method in config.METHODS.values() for claim in method.claims if claim.against}
        if unknown := named.union(*config.PANELS.values()) - config.METHODS.keys():
            raise ValueError(
                f"claims or PANELS of {path} name {', '.join(sorted(unknown))}, which METHODS lacks; it has"
                f" {', '.join(config.METHODS)}"
            )
        title = (config.__doc__ or path.stem).splitlines()[0].rstrip(".")
        return cls(title, config.METHODS, config.PAPERS, config.PANELS)


def table(head: Sequence[str], *rows: Sequence[str]) -> str:
    """In markdown."""
    first, *lines = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, "|" + " --- |" * len(head), *lines])


def cell(runs: Sequence[finished_runs.Run], of: Callable[[finished_runs.Run], float], written=claims.number) -> str:
    """The mean of a figure over the seeds, and the smallest and the largest where they differ."""
    values = list(map(of, runs))
    low, mean, high = map(written, (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


_em = lambda runs, name: cell(runs, lambda run: run.evaluations[name]["em"])
_searches = lambda runs, name: cell(runs, lambda run: run.evaluations[name]["searches"], "{:.2f}".format)
_seconds = lambda runs: cell(runs, lambda run: run.training_s, "{:.0f}".format)
_seeds = lambda runs: ", ".join(str(run.seed) for run in runs)


def figures(methods: Mapping[str, claims.Method], runs: finished_runs.Runs) -> str:
    """The table of all figures: a row for each method."""
    hops = sorted({h for some in runs.values() for h in some[0].evaluations["final-sampled"]["em_by_hops"]})
    head = ["method", "seeds", "base, greedy", "base, sampled", "greedy", "sampled"]
    head += [*(f"{h}-hop, sampled" for h in hops), "searches, greedy", "searches, sampled", "seconds"]
    rows = []
    for name, some in runs.items():
        row = [methods[name].title, _seeds(some), *(_em(some, each) for each in finished_runs.EVALUATIONS)]
        row += [cell(some, lambda run, h=h: run.evaluations["final-sampled"]["em_by_hops"][h]) for h in hops]
        rows.append([*row, _searches(some, "final-greedy"), _searches(some, "final-sampled"), _seconds(some)])
    return table(head, *rows)


def short(
    methods: Mapping[str, claims.Method], runs: finished_runs.Runs, findings: Mapping[str, Sequence[claims.Finding]]
) -> str:
    """The table for the README: a row for the base and one for each method."""
    first = next(iter(runs.values()))  # others may have a base of their own: docs/study.md has them all
    n = first[0].evaluations["final-sampled"]["n"]
    head = [f"exact match on {n} test questions", "seeds", "greedy", "sampled", "searches", "seconds"]
    em = lambda some, which: [_em(some, f"{which}-greedy"), _em(some, f"{which}-sampled")]
    tested = lambda some, which: [_seeds(some), *em(some, which), _searches(some, f"{which}-sampled")]
    rows = [["the base", *tested(first, "base"), "", ""]]
    for name, some in runs.items():
        said = "; ".join(f"{f.title}: {f.verdict}" for f in findings[name] if f.pairs)
        rows.append([methods[name].title, *tested(some, "final"), _seconds(some), said])
    return table([*head, "the papers' findings"], *rows)


def judged(study: Study, findings: Mapping[str, Sequence[claims.Finding]]) -> list[str]:
    """The paragraphs on the claims: those of each method, and those that are not measured."""
    parts, missing = [], []
    for name, found in findings.items():
        missing += [f"{study.methods[name].title}: {finding.title}" for finding in found if not finding.pairs]
        if said := [f"* {finding.sentence()}" for finding in found if finding.pairs]:
            parts += [f"**{study.methods[name].title}**", "\n".join(said)]
    return [*parts, f"Not measured: {'; '.join(missing)}."] if missing else parts


def update_block(path: pathlib.Path, text: str) -> None:
    """Puts a text between the marks of a file; raises ValueError where they aren't there once each, in this order."""
    whole = path.read_text()
    if not (whole.count(_BEGIN) == whole.count(_END) == 1 and whole.index(_BEGIN) < whole.index(_END)):
        raise ValueError(f"{path} needs {_BEGIN} and, after it, {_END}, once each; put them where the table goes")
    before, after = whole.partition(_BEGIN)[0], whole.partition(_END)[2]
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def _cost(workdir: pathlib.Path) -> str:
    """What all commands in the directories of a sweep took, those that made the bases too."""
    seconds, peak = metrics.cost(path.parent for path in workdir.glob("*/verbs.jsonl"))
    return f"All verbs together took {seconds / 3600:.1f} hours; the largest peak memory of one was {peak:.2f} GB."


def run(
    config: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    document: str | os.PathLike = _DOCUMENT,
    readme: str | os.PathLike | None = None,
) -> list[pathlib.Path]:
    """Writes the document and, beside it, the picture; with `readme` also the block of that file. Returns the files.

    Raises ValueError for a config or logs that do not fit together, or where no run is finished.
    """
    study = Study.read(command.config_file(str(config)))
    output, methods = pathlib.Path(document), study.methods
    runs, unfinished = finished_runs.read(pathlib.Path(workdir), methods)
    findings, picture, first = claims.judge(methods, runs), output.with_suffix(".png"), next(iter(runs.values()))[0]
    output.parent.mkdir(parents=True, exist_ok=True)
    panels = {
        title: {methods[name].title: [run.rows for run in runs[name]] for name in names if name in runs}
        for title, names in study.panels.items()
    }
    curves.study_curves(picture, {title: lines for title, lines in panels.items() if lines})
    given = dict(config=(config, _CONFIG), workdir=(workdir, None), document=(document, _DOCUMENT))
    chosen = " ".join(f"--{name}={value}" for name, (value, default) in given.items() if str(value) != default)
    parts = [
        f"# {study.title}",
        f"Written by `python -m searchr1_jax.study {chosen}` from the logs of the runs of `{config}`; the verdicts are"
        " computed too.",
        f"![Held-out exact match and searches by step]({picture.name})",
        f"*Validation on {first.validation_questions} questions, sampled; bands reach from the smallest to the largest"
        " of the seeds.*",
        f"Exact match and searches a question on {first.evaluations['final-sampled']['n']} test questions after"
        f" {first.settings.learner.steps} steps: the mean and, where seeds differ, the smallest and largest. Seconds"
        " are those of the steps, without start and evaluations, on the machine and beside the load that the runs had.",
        figures(methods, runs),
        _cost(pathlib.Path(workdir)),
        "## The papers' findings",
        study.papers,
        claims.RULE,
        *judged(study, findings),
        *([f"Not finished, and left out: {', '.join(unfinished)}."] if unfinished else []),
    ]
    output.write_text("\n\n".join(parts) + "\n")
    written = [output, picture]
    if readme:
        written.append(pathlib.Path(readme))
        update_block(written[-1], short(methods, runs, findings))
    print(f"{sum(map(len, runs.values()))} runs  ->  {', '.join(map(str, written))}")
    return written


def define() -> None:
    flags.DEFINE_string("config", _CONFIG, "configs/NAME.py, with METHODS, PAPERS and PANELS")
    flags.DEFINE_string("workdir", None, "of the sweep, with its runs' directories in it")
    flags.DEFINE_string("document", _DOCUMENT, "written whole; the picture goes beside it, as .png")
    flags.DEFINE_bool("readme", False, "update the block of README.md too")


def main() -> None:
    given = flags.FLAGS
    run(given.config, given.workdir, document=given.document, readme="README.md" if given.readme else None)


if __name__ == "__main__":
    command.run(main, define)
