r"""Runs the sweep of a config file on this machine; started again, it goes on where it was interrupted.

python -m searchr1_jax.sweep --config=configs/study.py --workdir=runs/study [--only='ppo*,grpo*'] [--jobs=2] [--list]

    def sweep(add):                                              # in the config file, beside get_config
        add("ppo-seed1", seed=1)
        add("grpo-fast", "algorithm=grpo", policy=dict(learning_rate=1e-3), **{"rollout.samples": 3})

An entry is a name, the argument of get_config, and what it changes, nested or by dotted key. The verbs take it through
a directory of its own, <workdir>/<name>, and write to <workdir>/<name>.log. World and base are made once for all
entries that agree in `_OF_BASE`, with the other settings those of get_config(""), and copied.

    _base-1a2b3c4d/    prepare ─ sft
                          │ copied
    <name>/               └─▶ evaluate base ─ train ─ evaluate final

A verb that succeeded leaves <directory>/done/<verb>, which holds its flags and config; where these are others it runs
again, with all that follow it. A log is locked while somebody writes to it: what a killed sweep has left running is
waited for, and several sweeps may share a workdir. Ctrl-C or SIGTERM asks the verbs to stop (train first saves a
checkpoint), once more: at once. The status is 1 where a run failed, 130 where the sweep was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import difflib
import fcntl
import fnmatch
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import ml_collections
from rich import console as rich_console
from rich import progress as rich_progress

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # config files import each other as `configs.…`

from searchr1_jax.core import files  # noqa: E402
from searchr1_jax.run import checks  # noqa: E402
from searchr1_jax.run import run_directory  # noqa: E402

# What an entry can change of its world and base …
_OF_BASE = (
    "world.", "protocol.", "sft.", "data.demonstrations", "model.param_dtype", "model.compute_dtype",
    "rollout.passages", "rollout.max_information_tokens",
)  # fmt: skip
# … and what they heed besides, always as in get_config(""): entries with other limits start from the same base.
_LIMITS = ("rollout.context_tokens", "learner.row_tokens", "learner.micro_batch_rows")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # no dots: <name>.log stands beside <name>/
_NOT_COPIED = ("done", "sft", "verbs.jsonl")  # of a base
_TAIL = 12  # lines of a failed run's log that are shown
_LOOK_EVERY_S = 0.5

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A config of a sweep, and the flags that make it."""

    name: str
    flags: tuple[str, ...]
    config: Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A verb in a directory."""

    label: str
    verb: str
    flags: tuple[str, ...]

    def command(self, entry: Entry, directory: pathlib.Path) -> list[str]:
        module = f"searchr1_jax.{self.verb}"
        return [sys.executable, "-m", module, f"--workdir={directory}", *entry.flags, *self.flags]

    def stamp(self, entry: Entry) -> str:
        """What the verb is asked for: its flags and the whole config."""
        return json.dumps([self.verb, self.flags, run_directory.as_json(entry.config)], indent=1)

    def is_done(self, entry: Entry, directory: pathlib.Path) -> bool:
        path = directory / "done" / self.label
        return path.is_file() and path.read_text() == self.stamp(entry)


MAKE_BASE = (Step(label="prepare", verb="prepare", flags=()), Step(label="sft", verb="sft", flags=()))


def steps_of_run(entry: Entry, directory: pathlib.Path) -> tuple[Step, ...]:
    decoding = "--decoding=greedy,sampled"
    base = (f"--model={directory / entry.config.sft.output}", "--name=base", decoding)
    return (
        Step(label="evaluate-base", verb="evaluate", flags=base),
        Step(label="train", verb="train", flags=()),
        Step(label="evaluate-final", verb="evaluate", flags=("--name=final", decoding)),
    )


# What is to be done.


def load(path: pathlib.Path) -> Any:
    """The config file as a module.

    Raises:
      ValueError: where there is none, or it describes no sweep.
    """
    if not path.is_file():
        raise ValueError(f"--config={path} does not exist; name a file as configs/study.py, without an argument")
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := [name for name in ("get_config", "sweep") if not hasattr(module, name)]:
        raise ValueError(f"{path} defines no {' and no '.join(missing)}; a sweep needs get_config(arg) and sweep(add)")
    return module


def entries(path: pathlib.Path) -> list[Entry]:
    """The sweep of a config file, every config resolved and checked.

    Raises:
      ValueError: naming the entry, for a name that is taken or no safe name of a directory, an unknown key, a value of
        the wrong type, or a config that cannot work.
    """
    module, found = load(path), {}

    def add(name: str, arg: str = "", /, **overrides: Any) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"sweep entry {name!r} cannot name a directory; use at most 100 letters, digits, _ and -, and begin"
                " with a letter or digit"
            )
        if name.lower() in found:
            raise ValueError(f"sweep entry {name!r} is there twice; names differ in more than case")
        try:
            found[name.lower()] = entry(path, module.get_config, name, arg, run_directory.flatten(overrides))
        except ValueError as error:
            raise ValueError(f"sweep entry {name!r}: {error}") from error

    module.sweep(add)
    if not found:
        raise ValueError(f"sweep(add) of {path} adds nothing; call add(name, …) in it")
    return list(found.values())


def entry(
    path: pathlib.Path, get_config: Callable[[str], Config], name: str, arg: str, overrides: dict[str, Any]
) -> Entry:
    """An entry with overrides by dotted key.

    Raises:
      ValueError: for an unknown key, a value of the wrong type, or a config that cannot work.
    """
    config = get_config(arg)
    known = run_directory.flatten(config.to_dict())
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"the config has no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            config.update_from_flattened_dict({key: value})
            fits = value is not None
        except TypeError:
            fits = False
        if not fits:
            kind = type(known[key]).__name__
            raise ValueError(f"{key} is {value!r}; make it of type {kind}, as {known[key]!r} is")
    checks.check(config)
    if config.model.path != config.sft.output:
        raise ValueError(
            f"model.path is {config.model.path!r}, but runs of a sweep start from the base that it makes, sft.output ="
            f" {config.sft.output!r}; leave model.path as it is"
        )
    flags = [f"--config={path}" + (f":{arg}" if arg else "")]
    return Entry(name=name, flags=(*flags, *(f"--config.{k}={v}" for k, v in overrides.items())), config=config)


def base_of(run: Entry, path: pathlib.Path, get_config: Callable[[str], Config]) -> Entry:
    """The entry that makes the world and the base which a run starts from; equal runs get equal ones."""
    plain, wanted = (run_directory.flatten(c.to_dict()) for c in (get_config(""), run.config))
    changes = {k: v for k, v in wanted.items() if k.startswith(_OF_BASE) and v != plain[k]}
    decisive = {k: v for k, v in (plain | changes).items() if k.startswith((*_OF_BASE, *_LIMITS))}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    return entry(path, get_config, f"_base-{digest}", "", changes)


def check_directory(workdir: pathlib.Path, run: Entry, base: Entry) -> None:
    """Raises ValueError where a run's directory holds another run, or one that began with another base."""
    run_directory.check(run.config, workdir / run.name)
    path = workdir / run.name / "done" / "base"
    began = path.read_text() if path.exists() else base.name
    if began != base.name:
        raise ValueError(
            f"{workdir / run.name} began with {began}, but the config's world and base are now {base.name}; remove that"
            " directory, or choose another --workdir"
        )


def choose(all_entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The entries whose name one of the patterns matches, or all where there is no pattern.

    Raises:
      ValueError: for a pattern that matches none.
    """
    names = [each.name for each in all_entries]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--only={pattern} matches none of the entries; they are {', '.join(names)}")
    return [e for e in all_entries if not patterns or any(fnmatch.fnmatchcase(e.name, p) for p in patterns)]


# Doing it.


class Failed(Exception):
    """A verb ended with an error; says which, and the end of its log."""


class Stopped(Exception):
    """The sweep was asked to stop."""


class Runner:
    """Runs verbs in processes of their own, until it is asked to stop."""

    def __init__(self, workdir: pathlib.Path, display: rich_progress.Progress):
        self._workdir, self._display = workdir, display
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # a signal's handler may interrupt its owner
        self.stopping = False

    def say(self, text: str) -> None:
        self._display.console.print(text, markup=False)

    def stop(self, *_) -> None:
        """The handler of a signal: begins nothing more, and asks the verbs that run to stop."""
        with self._lock:
            if not self.stopping:
                self.say("stopping; once more to stop at once")
            self.stopping = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def run(self, entry: Entry, steps: Iterable[Step], *, begin: Callable[[], None]) -> None:
        """Takes an entry through its steps, from the first that was not done before.

        Args:
          begin: makes what the directory holds at first, if it is not there.
        Raises:
          Failed: where a verb did not succeed.
          Stopped: where the sweep was asked to stop.
        """
        directory = self._workdir / entry.name
        if self.stopping:
            raise Stopped
        with self._log(entry.name) as log, self._line(entry.name) as note:
            begin()
            for step in itertools.dropwhile(lambda step: step.is_done(entry, directory), steps):
                self._call(step.command(entry, directory), log, lambda last: note(f"{step.label}  {last}"))
                (directory / "done").mkdir(exist_ok=True)
                (directory / "done" / step.label).write_text(step.stamp(entry))

    def _call(self, command: Sequence[str], log: Any, note: Callable[[str], None]) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        log.write(f"\n$ {' '.join(command[1:])}\n".encode())
        log.flush()
        with self._lock:
            if self.stopping:
                raise Stopped
            # In a session of its own, so that Ctrl-C reaches it once, through us. It inherits the log and its lock.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            self._running.add(process)
        try:
            while process.poll() is None:
                note(tail(pathlib.Path(log.name), 1))
                time.sleep(_LOOK_EVERY_S)
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            if self.stopping:
                raise Stopped
            raise Failed(f"{command[2]} ended with status {process.returncode}\n{tail(pathlib.Path(log.name), _TAIL)}")

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[Any]:
        """The log of a directory, locked; whoever else works there is waited for."""
        with open(self._workdir / f"{name}.log", "ab") as log:
            waiting = False
            while True:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.stopping:
                        raise Stopped from None
                    if not waiting:
                        self.say(f"{name}: waiting for another process that works on it")
                    waiting = True
                    time.sleep(_LOOK_EVERY_S)
            yield log

    @contextlib.contextmanager
    def _line(self, name: str) -> Iterator[Callable[[str], None]]:
        """A line on a terminal that says what goes on, as long as it does."""
        task = self._display.add_task(name, note="")
        try:
            yield lambda note: self._display.update(task, note=note)
        finally:
            self._display.remove_task(task)


def tail(path: pathlib.Path, lines: int) -> str:
    """The last lines of a log that are not empty."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])


def copy_base(base: pathlib.Path, directory: pathlib.Path) -> None:
    """A directory of a run that holds the world and the base; whole or not at all."""
    if directory.exists():
        return
    with files.whole(directory) as partial:
        shutil.copytree(base, partial, ignore=lambda at, _: _NOT_COPIED if pathlib.Path(at) == base else ())
        (partial / "done").mkdir()
        (partial / "done" / "base").write_text(base.name)


def figures(directory: pathlib.Path) -> str:
    """What the evaluations of a finished run say."""
    parts = []
    for decoding in ("greedy", "sampled"):
        before, after = (
            json.loads((directory / "eval" / f"{name}-{decoding}.json").read_text()) for name in ("base", "final")
        )
        parts.append(f"{decoding} {before['em']:.3f} → {after['em']:.3f}")
    return f"exact match {', '.join(parts)}; {after['searches']:.2f} searches a question"


def work(
    runner: Runner, workdir: pathlib.Path, jobs: int, runs: Sequence[Entry], bases: Sequence[Entry]
) -> dict[str, str]:
    """Makes the bases, then does the runs, so many at once. Returns why some failed, by name.

    Args:
      bases: of each run; the same may come several times.
    """
    failed: dict[str, str] = {}
    count = itertools.count(1)

    def attempt(entry: Entry, steps: Iterable[Step], begin: Callable[[], None], told: Callable[[], str]) -> None:
        began = time.monotonic()
        try:
            runner.run(entry, steps, begin=begin)
            runner.say(f"{entry.name}: {time.monotonic() - began:.0f} s  {told()}")
        except Stopped:
            pass
        except (Failed, OSError) as error:
            failed[entry.name] = str(error)
            runner.say(f"{entry.name}: failed: {str(error).splitlines()[0]}")

    def make(base: Entry) -> None:
        attempt(base, MAKE_BASE, lambda: None, lambda: "world and base")

    def do(run: Entry, base: Entry) -> None:
        if base.name in failed:
            failed[run.name] = f"not begun, because {base.name} failed"
            return
        directory = workdir / run.name
        begin = lambda: copy_base(workdir / base.name, directory)
        told = lambda: f"{figures(directory)}  ({next(count)} of {len(runs)})"
        attempt(run, steps_of_run(run, directory), begin, told)

    with futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, {base.name: base for base in bases}.values()))
        list(pool.map(do, runs, bases))
    return failed


# The command.


def listing(workdir: pathlib.Path, runs: Sequence[Entry]) -> str:
    """A line for each run: how far it is and what its config is."""
    lines = []
    for run in runs:
        steps = steps_of_run(run, workdir / run.name)
        done = [step.label for step in steps if step.is_done(run, workdir / run.name)]
        state = "done" if len(done) == len(steps) else f"after {done[-1]}" if done else "to do"
        lines.append(f"{run.name:24} {state:20} {' '.join(run.flags)}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=pathlib.Path, help="configs/NAME.py, with sweep(add)")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="directory of the runs' directories")
    parser.add_argument("--only", default="", help="names or patterns, separated by commas; default: all")
    parser.add_argument("--jobs", default=1, type=int, help="runs at once")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    given = parser.parse_args(argv)
    path, workdir = given.config.absolute(), given.workdir.absolute()
    try:
        if given.jobs < 1:
            raise ValueError(f"--jobs={given.jobs} runs nothing; use at least 1")
        runs = choose(entries(path), list(filter(None, given.only.split(","))))
        get_config = load(path).get_config
        bases = [base_of(run, path, get_config) for run in runs]
        for run, base in zip(runs, bases, strict=True):
            check_directory(workdir, run, base)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.list:
        print(listing(workdir, runs))
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    console = rich_console.Console(highlight=False, soft_wrap=True)
    columns = (
        rich_progress.TextColumn("{task.description}  {task.fields[note]}", markup=False),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console, disable=not console.is_terminal) as display:
        runner = Runner(workdir, display)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, runner.stop)
        failed = work(runner, workdir, given.jobs, runs, bases)
    for name, why in failed.items():
        print(f"\n{name} failed; all of it: {workdir / name}.log\n{why}", file=sys.stderr)
    if runner.stopping:
        print("stopped; start again with the same command to go on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
