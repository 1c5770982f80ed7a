"""Pictures of a run, made from its metrics.jsonl."""

from __future__ import annotations

import pathlib

from searchr1_jax import metrics


def learning_curve(workdir: pathlib.Path) -> None:
    """Writes learning_curve.png: exact match, searches, response length and KL by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = metrics.read(workdir)
    evaluations = sorted(
        {key for row in rows for key in row if key.startswith("eval/") and key.endswith("/em")}
    )
    panels = {
        "exact match": {"training, sampled": "reward"}
        | {f"held out, {key.split('/')[1]}": key for key in evaluations},
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
