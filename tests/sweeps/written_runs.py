"""Finished runs whose logs are written by hand."""

import json
import pathlib

STEPS = 40


def write(
    workdir: pathlib.Path, name: str, *, em: float, validations=(0.2, 0.5, 0.7, 0.8, 0.9), searches=1.5, **config
) -> pathlib.Path:
    """A finished run, greedy and sampled alike: 800 test questions, and 200 validation questions every tenth step."""
    run = workdir / name
    (run / "eval").mkdir(parents=True)
    settings = {"seed": int(name[-1]), "learner": {"steps": STEPS}} | config
    (run / "config.json").write_text(json.dumps(settings))
    figures = {"base": (0.1, 0.25), "final": (em, searches)}
    for which, (value, asked) in figures.items():
        for decoding in ("greedy", "sampled"):
            hops = {"1": value, "2": value}
            found = {"n": 800, "em": value, "em_by_hops": hops, "searches": asked}
            (run / "eval" / f"{which}-{decoding}.json").write_text(json.dumps(found))
    (run / "eval" / "validation-sampled-step000000.json").write_text('{"n": 200}')
    rows = [{"step": 0}] + [{"step": i, "seconds/rollout": 0.25, "seconds/learning": 1.0} for i in range(1, STEPS + 1)]
    for row, value in zip(rows[::10], validations, strict=True):
        row |= {"eval/sampled/em": value, "eval/sampled/searches": 2 * value}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "verbs.jsonl").write_text('{"verb": "train", "seconds": 1800.0, "peak_memory_gb": 1.25}\n')
    return run
