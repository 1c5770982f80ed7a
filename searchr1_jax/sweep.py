r"""Runs the sweep of a config file on this machine; started again, it goes on where it was interrupted.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study [--only='ppo*,grpo*'] [--jobs=2] [--list]

    def sweep(add):                                              # in the config file, beside get_config
        add("ppo-seed1", seed=1)
        add("grpo-fast", "algorithm=grpo", policy=dict(learning_rate=1e-3), **{"rollout.samples": 3})

An entry is a name, the argument of get_config, and what it changes, nested or by dotted key. The commands take it
through a directory of its own, <workdir>/<name>, and write to <workdir>/<name>.log. World and base are made once for
all entries that agree in what decides them, and copied.

A command that succeeded leaves <directory>/done/<step>, which holds its flags and settings; where these are others it
runs again, with all that follow it. A log is locked while somebody writes to it: what a killed sweep has left running
is waited for, and several sweeps may share a workdir. Ctrl-C or SIGTERM asks the commands to stop (train first saves a
checkpoint), once more: at once. The status is 1 where a run failed, 130 where the sweep was stopped.
"""

from collections.abc import Sequence
import os
import pathlib
import sys

from absl import flags

from searchr1_jax.run import command
from searchr1_jax.sweeps import entries, runner


def plan(config: str | os.PathLike, workdir: str | os.PathLike, only: Sequence[str] = ()) -> list[entries.Entry]:
    """The runs whose names match, each checked against what its directory holds; raises ValueError as `run` does."""
    runs = entries.choose(entries.read(command.config_file(str(config)).absolute()), only)
    for each in runs:
        entries.check(each, pathlib.Path(workdir) / each.name)
    return runs


def run(
    config: str | os.PathLike, workdir: str | os.PathLike, *, only: Sequence[str] = (), jobs: int = 1
) -> dict[str, str]:
    """Does what is left of a sweep, of the runs that match, so many at once. Returns why runs failed, by name.

    Raises:
      ValueError: before anything runs, for a sweep that cannot work, or a directory that holds another run.
      Stopped: where a signal asked it to stop.
    """
    runs, directory = plan(config, workdir, only), pathlib.Path(workdir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with runner.Runner(directory) as at_work:
        failed = at_work.work(runs, jobs)
    for name, why in failed.items():
        print(f"\n{name} failed; all of it: {directory / name}.log\n{why}", file=sys.stderr)
    if at_work.stopping:
        raise runner.Stopped
    return failed


def listing(workdir: pathlib.Path, runs: Sequence[entries.Entry]) -> str:
    """A line for each run: how far it is and what its config is."""
    lines = []
    for each in runs:
        done = [step.label for step in each.steps if step.is_done(each, workdir / each.name)]
        state = "done" if len(done) == len(each.steps) else f"after {done[-1]}" if done else "to do"
        lines.append(f"{each.name:24} {state:20} {' '.join(each.flags)}")
    return "\n".join(lines)


def define() -> None:
    flags.DEFINE_string("config", None, "configs/NAME.py, with sweep(add)")
    flags.DEFINE_string("workdir", None, "directory of the runs' directories")
    flags.DEFINE_list("only", [], "names or patterns of them; default: all")
    flags.DEFINE_integer("jobs", 1, "runs at once", lower_bound=1)
    flags.DEFINE_bool("list", False, "say what there is to do, and do nothing")


def main() -> None:
    given = flags.FLAGS
    if given.list:
        print(listing(pathlib.Path(given.workdir), plan(given.config, given.workdir, given.only)))
        return
    try:
        failed = run(given.config, given.workdir, only=given.only, jobs=given.jobs)
    except runner.Stopped:
        print("stopped; start again with the same command to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command.run(main, define, required=("config", "workdir"))
