"""A command of one's own: how the turns of a run's last written trajectories ended.

python -m examples.command --workdir=runs/quickstart
"""

from __future__ import annotations

import collections
import json
import os
import pathlib

from absl import flags

from searchr1_jax.run import command


def run(workdir: str | os.PathLike) -> dict[str, int]:
    """Prints and returns how many turns called each tool, answered, or were invalid."""
    written = sorted((pathlib.Path(workdir) / "trajectories").glob("step*.jsonl"))
    if not written:
        raise ValueError(f"--workdir {workdir} has no trajectories; train with log.trajectories_every above 0")
    episodes = map(json.loads, written[-1].read_text().splitlines())
    counts = collections.Counter(turn["event"] for episode in episodes for turn in episode["turns"])
    for event, count in counts.most_common():
        print(f"{count:6} {event}")
    return dict(counts)


def define() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")


def main() -> None:
    run(flags.FLAGS.workdir)


if __name__ == "__main__":
    command.run(main, define)
