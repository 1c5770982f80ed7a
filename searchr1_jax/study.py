r"""Methods against each other and against the papers: a table, a picture and sentences, all from the logs of a sweep.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study
python -m searchr1_jax.study --workdir=runs/study --readme

    runs ─ finished_runs ─▶ {method: [Run of a seed, …]} ─ curves.study_curves ─▶ docs/study.png
                                  │
                 tables, and claims judged by one rule ─▶ docs/study.md, and the block of README.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

from absl import flags

from searchr1_jax.run import command
from searchr1_jax.run import curves
from searchr1_jax.sweeps import claims
from searchr1_jax.sweeps import finished_runs

_, _WORKDIR = command.define_flags()  # of the sweep, with its runs' directories in it
_DOCUMENT = flags.DEFINE_string("document", "docs/study.md", "written whole; the picture goes beside it, as .png")
_README = flags.DEFINE_bool("readme", False, "update the block of README.md too")

_BEGIN, _END = "<!-- study -->", "<!-- /study -->"

PANELS = {
    "retrieved tokens, groups": ("ppo", "unmasked", "grpo"),
    "algorithms": ("grpo", "rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo"),
    "samples a question": ("grpo", "grpo_of_3", "grpo_of_1"),
    "settings of PPO": ("ppo", "top_3", "format", "no_kl"),
}


def over_seeds(values: Sequence[float], written: Callable[[float], str]) -> str:
    """The mean, and the smallest and the largest where they differ."""
    low, mean, high = map(written, (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _em(runs: Sequence[finished_runs.Run], name: str) -> str:
    return over_seeds([run.evaluations[name]["em"] for run in runs], claims.number)


def _em_by_hops(runs: Sequence[finished_runs.Run], name: str, hops: str) -> str:
    return over_seeds([run.evaluations[name]["em_by_hops"][hops] for run in runs], claims.number)


def _searches(runs: Sequence[finished_runs.Run], name: str) -> str:
    return over_seeds([run.evaluations[name]["searches"] for run in runs], "{:.2f}".format)


def _seconds(runs: Sequence[finished_runs.Run]) -> str:
    return over_seeds([run.training_s for run in runs], "{:.0f}".format)


def _seeds(runs: Sequence[finished_runs.Run]) -> str:
    return ", ".join(str(run.seed) for run in runs)


def figures(methods: finished_runs.Methods) -> str:
    """The table of all figures: a row for each method."""
    found = {h for runs in methods.values() for h in runs[0].evaluations["final-sampled"]["em_by_hops"]}
    hops = sorted(found)
    head = ["method", "seeds", "base, greedy", "base, sampled", "greedy", "sampled"]
    head += [*(f"{h}-hop, sampled" for h in hops), "searches, greedy", "searches, sampled", "seconds"]
    rows = [head]
    for method, runs in methods.items():
        row = [finished_runs.METHODS[method], _seeds(runs), *(_em(runs, name) for name in finished_runs.EVALUATIONS)]
        row += [_em_by_hops(runs, "final-sampled", h) for h in hops]
        row += [_searches(runs, "final-greedy"), _searches(runs, "final-sampled")]
        row.append(_seconds(runs))
        rows.append(row)
    return table(rows)


def short(methods: finished_runs.Methods, findings: Sequence[claims.Finding]) -> str:
    """The table for the README: a row for the base and one for each method."""
    first = next(iter(methods.values()))  # others may have a base of their own: docs/study.md has them all
    n = first[0].evaluations["final-sampled"]["n"]
    figures_ = ("greedy", "sampled", "searches", "seconds")
    rows = [[f"exact match on {n} test questions", "seeds", *figures_, "the papers' findings"]]

    def add(label: str, seeds: str, runs: Sequence[finished_runs.Run], which: str, seconds: str, said: str) -> None:
        results = (_em(runs, f"{which}-greedy"), _em(runs, f"{which}-sampled"), _searches(runs, f"{which}-sampled"))
        rows.append([label, seeds, *results, seconds, said])

    add("the base", _seeds(first), first, "base", "", "")
    for method, runs in methods.items():
        said = "; ".join(f"{f.claim.title}: {f.verdict}" for f in findings if f.claim.method == method)
        add(finished_runs.METHODS[method], _seeds(runs), runs, "final", _seconds(runs), said)
    return table(rows)


def document(
    methods: finished_runs.Methods,
    unfinished: Sequence[str],
    verbs: Sequence[Mapping[str, Any]],
    *,
    made_by: str,
    picture: str,
) -> str:
    """docs/study.md.

    Args:
      unfinished: names of runs that are left out.
      verbs: rows of all verbs.jsonl, those of the base included.
      made_by: the command.
      picture: the file's name, beside the document.
    """
    findings = {claim: claims.judge(claim, methods) for claim in claims.CLAIMS}
    first = next(iter(methods.values()))[0]
    n, steps = first.evaluations["final-sampled"]["n"], first.config["learner"]["steps"]
    parts = [
        "# A study in the quickstart's world",
        f"Written by `{made_by}` from the logs of the runs of `configs/study.py`; the verdicts are computed too.",
        f"![Held-out exact match and searches by step]({picture})",
        f"*Validation on {first.validation_questions} questions, sampled; bands reach from the smallest to the largest"
        " of the seeds.*",
        f"Exact match and searches a question on {n} test questions after {steps} steps: the mean and, where seeds"
        " differ, the smallest and largest. Seconds are those of the steps, without start and evaluations, on the"
        " machine and beside the load that the runs had.",
        figures(methods),
        f"All verbs together took {sum(verb['seconds'] for verb in verbs) / 3600:.1f} hours; the largest peak memory of"
        f" one was {max(verb['peak_memory_gb'] for verb in verbs):.2f} GB.",
        "## The papers' findings",
        "What Search-R1's authors saw on Qwen2.5 with Wikipedia (2503.09516, 2505.15117), and whether this world shows"
        " it.",
        claims.RULE,
    ]
    for method in methods:
        said = [f"* {f.sentence()}" for claim, f in findings.items() if f and claim.method == method]
        if said:
            parts += [f"**{finished_runs.METHODS[method]}**", "\n".join(said)]
    missing = [f"{finished_runs.METHODS[c.method]}: {c.title}" for c, finding in findings.items() if not finding]
    if missing:
        parts.append(f"Not measured: {'; '.join(missing)}.")
    if unfinished:
        parts.append(f"Not finished, and left out: {', '.join(unfinished)}.")
    return "\n\n".join(parts) + "\n"


def update_block(path: pathlib.Path, text: str) -> None:
    """Puts a text between the two marks of a file.

    Raises:
      ValueError: where they are not there once each, in this order.
    """
    whole = path.read_text()
    if not (whole.count(_BEGIN) == whole.count(_END) == 1 and whole.index(_BEGIN) < whole.index(_END)):
        raise ValueError(f"{path} needs {_BEGIN} and, after it, {_END}, once each; put them where the table goes")
    before, after = whole.partition(_BEGIN)[0], whole.partition(_END)[2]
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def main(argv):
    del argv
    workdir, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_DOCUMENT.value)
    methods, unfinished = finished_runs.read(workdir)
    verbs = [verb for runs in methods.values() for run in runs for verb in run.verbs]
    verbs += [verb for base in sorted(workdir.glob("_base-*")) for verb in finished_runs.read_verbs(base)]
    chosen = "" if _DOCUMENT.value == _DOCUMENT.default else f" --document={output}"
    made_by = f"python -m searchr1_jax.study --workdir={workdir}{chosen}"
    picture = output.with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    panels = {
        title: {finished_runs.METHODS[m]: [run.rows for run in methods[m]] for m in names if m in methods}
        for title, names in PANELS.items()
    }
    curves.study_curves(picture, {title: lines for title, lines in panels.items() if lines})
    output.write_text(document(methods, unfinished, verbs, made_by=made_by, picture=picture.name))
    written = [output, picture]
    if _README.value:
        readme = pathlib.Path("README.md")
        judged = [claims.judge(claim, methods) for claim in claims.CLAIMS]
        update_block(readme, short(methods, list(filter(None, judged))))
        written.append(readme)
    print(f"{sum(map(len, methods.values()))} runs  ->  {', '.join(map(str, written))}")


if __name__ == "__main__":
    command.run(main, required=("workdir",))
