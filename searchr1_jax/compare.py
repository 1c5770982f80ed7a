r"""Puts two evaluations of a workdir side by side: figures, an episode of each, and summary.json.

python -m searchr1_jax.compare --workdir=runs/quickstart --before=base --after=final
"""

import json
import os
import pathlib
from typing import Any

from absl import flags
from rich import box, console as rich_console, table as rich_table, text as rich_text

from searchr1_jax.core import files
from searchr1_jax.run import command, metrics

_DECODINGS = ("greedy", "sampled")


def _evaluations(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    found = {}
    for decoding in _DECODINGS:
        path = workdir / "eval" / f"{name}-{decoding}.json"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; run python -m searchr1_jax.evaluate --name={name} --decoding={decoding} first"
            )
        found[decoding] = files.read_json(path, "evaluate again")
    return found


def summarise(workdir: pathlib.Path, before: str, after: str) -> dict[str, Any]:
    """The two evaluations, wall-clock seconds of all verbs of the workdir, and the largest peak memory of one."""
    figures = {name: _evaluations(workdir, name) for name in (before, after)}
    seconds, peak = metrics.cost([workdir])
    return figures | {"seconds": round(seconds, 1), "peak_memory_gb": peak}


def figures(summary: dict[str, Any], before: str, after: str) -> rich_table.Table:
    table = rich_table.Table(box=box.SIMPLE_HEAD, title="held-out questions about things never seen in training")
    for name in ("decoding", "figure", before, after):
        table.add_column(name, justify="left" if name in ("decoding", "figure") else "right")
    for decoding in _DECODINGS:
        old, new = summary[before][decoding], summary[after][decoding]
        table.add_row(decoding, f"exact match, {new['n']} questions", f"{old['em']:.3f}", f"{new['em']:.3f}")
        for hops in sorted(new["em_by_hops"].keys() & old["em_by_hops"].keys()):
            pair = (f"{results['em_by_hops'][hops]:.3f}" for results in (old, new))
            table.add_row("", f"exact match, {hops}-hop", *pair)
        table.add_row("", "searches a question", f"{old['searches']:.2f}", f"{new['searches']:.2f}", end_section=True)
    return table


def _episodes(workdir: pathlib.Path, name: str) -> dict[str, dict[str, Any]]:
    path = workdir / "eval" / f"{name}-greedy.jsonl"
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def _transcript(row: dict[str, Any]) -> rich_text.Text:
    out = rich_text.Text()
    for turn in row["turns"]:
        out.append(turn["text"], style="bold green").append(turn["reply"], style="cyan")
    verdict = "right" if row["reward"] else f"wrong, it is {row['golden_answers'][0]}"
    return out.append(f"\n[{verdict}]", style="dim")


def side_by_side(workdir: pathlib.Path, before: str, after: str) -> rich_table.Table:
    """The question with the most turns that the later policy answers and the earlier one does not."""
    old, new = _episodes(workdir, before), _episodes(workdir, after)
    gained = [q for q in new if q in old and new[q]["reward"] > old[q]["reward"]]
    chosen = max(gained or new, key=lambda q: (len(new[q]["turns"]), q))
    table = rich_table.Table(box=box.SIMPLE_HEAD, title=new[chosen]["question"].rstrip("?") + "?")
    table.add_column(before, ratio=1)
    table.add_column(after, ratio=1)
    table.add_row(_transcript(old[chosen]), _transcript(new[chosen]))
    return table


def run(workdir: str | os.PathLike, *, before: str = "base", after: str = "final") -> dict[str, Any]:
    """Prints two evaluations in <workdir>/eval, by name, and writes and returns their summary."""
    directory, console = pathlib.Path(workdir), rich_console.Console()
    summary = summarise(directory, before, after)
    path = directory / "summary.json"
    files.write_json(path, summary)
    console.print(figures(summary, before, after))
    console.print(side_by_side(directory, before, after))
    console.print(f"{summary['seconds']:.0f} s, {summary['peak_memory_gb']:.2f} GB at most  ->  {path}", markup=False)
    return summary


def define() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("before", "base", "name of an evaluation in <workdir>/eval")
    flags.DEFINE_string("after", "final", "name of another")


def main() -> None:
    run(flags.FLAGS.workdir, before=flags.FLAGS.before, after=flags.FLAGS.after)


if __name__ == "__main__":
    command.run(main, define)
