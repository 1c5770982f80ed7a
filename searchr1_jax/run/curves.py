"""Pictures: the learning curve of a run, the curves of a study."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import pathlib
from typing import Any, NamedTuple

from searchr1_jax.core import files, parallel
from searchr1_jax.run import metrics


@contextlib.contextmanager
def _picture(path: pathlib.Path, rows: int, columns: int, *, dpi: int, **options) -> Iterator[Any]:
    """Yields axes[rows, columns] over steps, the first one a share; written as a PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, sharex=True, squeeze=False, layout="constrained", **options)
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].set_ylim(0, 1)
    with files.whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot.close(figure)


def learning_curve(workdir: pathlib.Path) -> None:
    """Writes learning_curve.png: exact match, searches, response length and KL by step; the first process does."""
    if not parallel.is_first():
        return
    rows = metrics.read(workdir)
    keys = sorted({key for row in rows for key in row if key.startswith("eval/") and key.endswith("/em")})
    held_out = {f"held out, {key.split('/')[1]}": key for key in keys}
    panels = {
        "exact match": {"training, sampled": "reward"} | held_out,
        "searches a question": {"training": "searches"}
        | {label: key.replace("/em", "/searches") for label, key in held_out.items()},
        "response tokens": {"training": "response_tokens"},
        "KL to the reference (nats a token)": {"training": "kl_to_reference"},
    }
    with _picture(workdir / "learning_curve.png", 2, 2, dpi=120, figsize=(9, 5.5)) as axes:
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
            for label, key in lines.items():
                points = [(row["step"], row[key]) for row in rows if key in row]
                marker = "o" if key.startswith("eval/") else None
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1.4)
            axis.set_title(title, fontsize=10)
        axes[0, 0].legend(fontsize=8, frameon=False)


class Band(NamedTuple):
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
    return Band(steps, [sum(v) / len(v) for v in values], list(map(min, values)), list(map(max, values)))


def study_curves(path: pathlib.Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[dict[str, Any]]]]]) -> None:
    """Writes a picture: held-out exact match and searches, both sampled, by step; a column for each panel.

    Args:
      panels: by title, what is compared in it: by method, its runs as `band` takes them. The first is drawn in black.
    """
    figures = {"exact match": "eval/sampled/em", "searches a question": "eval/sampled/searches"}
    size = {"figsize": (3.6 * len(panels), 6), "dpi": 110}
    with _picture(path, len(figures), len(panels), sharey="row", **size) as axes:
        for axis, what in zip(axes[:, 0], figures, strict=True):
            axis.set_ylabel(what)
        for column, (title, methods) in zip(axes.T, panels.items(), strict=True):
            for axis, key in zip(column, figures.values(), strict=True):
                for i, (method, runs) in enumerate(methods.items()):
                    found, colour = band(runs, key), "black" if i == 0 else f"C{i - 1}"
                    axis.plot(found.steps, found.mean, label=method, color=colour, linewidth=1.4)
                    axis.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
            column[0].set_title(title, fontsize=10)
            column[0].legend(fontsize=8, frameon=False, loc="lower right")
