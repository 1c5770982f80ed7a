"""What runs look like to others: a learning curve, the card of an exported model, the curves of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from searchr1_jax.core import parallel
from searchr1_jax.learning import advantages
from searchr1_jax.learning import losses
from searchr1_jax.run import metrics


def learning_curve(workdir: pathlib.Path) -> None:
    """Writes learning_curve.png: exact match, searches, response length and KL by step; the first process does."""
    if not parallel.is_first():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = metrics.read(workdir)
    evaluations = sorted({key for row in rows for key in row if key.startswith("eval/") and key.endswith("/em")})
    panels = {
        "exact match": {"training, sampled": "reward"} | {f"held out, {key.split('/')[1]}": key for key in evaluations},
        "searches a question": {"training": "searches"}
        | {f"held out, {key.split('/')[1]}": key.replace("/em", "/searches") for key in evaluations},
        "response tokens": {"training": "response_tokens"},
        "KL to the reference (nats a token)": {"training": "kl_to_reference"},
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, key in lines.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            marker = "o" if key.startswith("eval/") else None
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    temporary = workdir / ".learning_curve.png"
    figure.savefig(temporary, dpi=120)
    temporary.replace(workdir / "learning_curve.png")
    pyplot.close(figure)


def _known_as(table: Mapping[str, Any], name: str) -> str:
    """What a row is known as; a user's own, which need not be at hand here, by its name."""
    return table[name].known_as if name in table else name


def model_card(workdir: pathlib.Path, run: dict[str, Any], *, name: str, base: str, step: int, **_: Any) -> str:
    """README.md of an exported model: what it is, how it was trained, what it scored.

    Args:
      run: the resolved config of the run.
      base: the model that training started from.
      step: of the checkpoint.
    """
    algorithm = _known_as(losses.POLICY_LOSSES, run["algorithm"]["policy_loss"])
    algorithm = algorithm or _known_as(advantages.ADVANTAGES, run["algorithm"]["advantage"])
    rows = []
    for path in sorted((workdir / "eval").glob("*.json")):
        if not path.name.startswith("validation-"):
            results = json.loads(path.read_text())
            figures = f"{results['em']:.3f} | {results['searches']:.2f}"
            rows.append(f"| {path.stem} | {results['split']} | {results['decoding']} | {results['n']} | {figures} |")
    scores = ["No evaluation of this run was found."]
    if rows:
        head = ["| evaluation | split | decoding | questions | exact match | searches |", "|" + " --- |" * 6]
        scores = head + rows
    return "\n".join(
        [
            "---",
            f"base_model: {base}",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [search-r1, reinforcement-learning]",
            "---",
            "",
            f"# {name}",
            "",
            f"A language model that searches: `{base}`, trained with {algorithm} for {step} steps by searchr1_jax",
            "after Search-R1 (Jin et al., 2025). It ends a turn with `</search>` or `</answer>`, the stop strings of",
            "its generation config, and expects passages between `<information>` and `</information>` after a search.",
            "",
            "## Evaluation",
            "",
            *scores,
            "",
            "## Prompt",
            "",
            "```",
            run["protocol"]["prompt"].rstrip("\n"),
            "```",
            "",
            "## Config",
            "",
            "```json",
            json.dumps(run, indent=2),
            "```",
            "",
        ]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """A figure over the seeds of a method, at the steps that all of them have."""

    steps: list[int]
    mean: list[float]
    low: list[float]  # the smallest of the seeds
    high: list[float]


def band(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> Band:
    """The band of a key over runs; each run is its rows of metrics.jsonl, and a row may lack the key."""
    by_step = [{row["step"]: row[key] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    values = [[run[step] for run in by_step] for step in steps]
    return Band(
        steps=steps,
        mean=[sum(v) / len(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
    )


def study_curves(path: pathlib.Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[dict[str, Any]]]]]) -> None:
    """Writes a picture: held-out exact match and searches, both sampled, by step; a column for each panel.

    Args:
      panels: by title, what is compared in it: by method, its runs as `band` takes them. The first is drawn in black.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {"exact match": "eval/sampled/em", "searches a question": "eval/sampled/searches"}
    shape = dict(figsize=(3.6 * len(panels), 6), sharex=True, sharey="row", squeeze=False, layout="constrained")
    figure, axes = pyplot.subplots(len(figures), len(panels), **shape)
    for column, (title, methods) in enumerate(panels.items()):
        for axis, (what, key) in zip(axes[:, column], figures.items(), strict=True):
            for i, (method, runs) in enumerate(methods.items()):
                found, colour = band(runs, key), "black" if i == 0 else f"C{i - 1}"
                axis.plot(found.steps, found.mean, label=method, color=colour, linewidth=1.4)
                axis.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(what)
        axes[0, column].set_title(title, fontsize=10)
        axes[0, column].legend(fontsize=8, frameon=False, loc="lower right")
        axes[-1, column].set_xlabel("step")
    axes[0, 0].set_ylim(0, 1)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
    pyplot.close(figure)
