"""Doing a sweep: commands in processes of their own, so many at once, until all is done or a signal asks to stop.

_base-1a2b3c4d/    prepare ─ sft
                      │ copied
<name>/               └─▶ evaluate base ─ train ─ evaluate final          <name>.log, locked by who writes to it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import fcntl
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

from rich import console as rich_console, progress as rich_progress

from searchr1_jax.core import files
from searchr1_jax.run import command
from searchr1_jax.sweeps import entries, finished_runs

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOT_COPIED = ("sft", "verbs.jsonl")  # of a base
_TAIL = 12  # lines of a failed run's log that are shown
_LOOK_EVERY_S = 0.5


class Failed(Exception):
    """A command ended with an error; says which, and the end of its log."""


class Stopped(Exception):
    """The sweep was asked to stop."""


class Runner:
    """Runs commands in a directory, until it is asked to stop; a context in which signals ask for that.

    Nothing here may use JAX's devices: the commands need them.
    """

    def __init__(self, workdir: pathlib.Path):
        console = rich_console.Console(highlight=False, soft_wrap=True)
        text = rich_progress.TextColumn("{task.description}  {task.fields[note]}", markup=False)
        columns = text, rich_progress.TimeElapsedColumn()
        self._display = rich_progress.Progress(*columns, console=console, disable=not console.is_terminal)
        self._workdir, self._context = workdir, contextlib.ExitStack()
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # a signal's handler may interrupt its owner
        self.stopping = False

    def __enter__(self) -> Runner:
        self._context.enter_context(self._display)
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._stop)
                self._context.callback(signal.signal, number, before)
        return self

    def __exit__(self, *_) -> None:
        self._context.close()

    def say(self, text: str) -> None:
        self._display.console.print(text, markup=False)

    def _stop(self, *_) -> None:
        """The handler of a signal: begins nothing more, and asks the commands that run to stop."""
        with self._lock:
            if not self.stopping:
                self.say("stopping; once more to stop at once")
            self.stopping = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def run(self, entry: entries.Entry) -> None:
        """Takes an entry through its steps, from the first that was not done before; raises Failed or Stopped."""
        directory = self._workdir / entry.name
        if self.stopping:
            raise Stopped
        with self._log(entry.name) as log, self._line(entry.name) as note:
            if entry.base:
                copy_base(self._workdir / entry.base.name, directory)
            for step in itertools.dropwhile(lambda step: step.is_done(entry, directory), entry.steps):
                self._call(step.arguments(entry, directory), log, lambda last: note(f"{step.label}  {last}"))
                step.stamp(entry, directory)

    def _call(self, arguments: Sequence[str], log: BinaryIO, note: Callable[[str], None]) -> None:
        path = pathlib.Path(log.name)
        search = os.pathsep.join(filter(None, [str(command.ROOT), os.environ.get("PYTHONPATH")]))
        log.write(f"\n$ {' '.join(arguments)}\n".encode())
        log.flush()
        with self._lock:
            if self.stopping:
                raise Stopped
            # In a session of its own, so that Ctrl-C reaches it once, through us. It inherits the log and its lock.
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            env = os.environ | {"PYTHONPATH": search}
            process = subprocess.Popen([sys.executable, *arguments], start_new_session=True, env=env, **streams)
            self._running.add(process)
        try:
            while process.returncode is None:
                note(_tail(path, 1))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_EVERY_S)
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            if self.stopping:
                raise Stopped
            raise Failed(f"{arguments[1]} ended with status {process.returncode}\n{_tail(path, _TAIL)}")

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[BinaryIO]:
        """The log of a directory, locked; whoever else works there is waited for."""
        with open(self._workdir / f"{name}.log", "ab") as log:
            for attempt in itertools.count():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self.stopping:
                    raise Stopped
                if attempt == 0:
                    self.say(f"{name}: waiting for another process that works on it")
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

    def work(self, runs: Sequence[entries.Entry], jobs: int) -> dict[str, str]:
        """Makes the bases, then does the runs, so many at once. Returns why some failed, by name."""
        failed: dict[str, str] = {}
        finished = itertools.count(1)

        def attempt(entry: entries.Entry) -> None:
            began, name = time.monotonic(), entry.name
            if entry.base and entry.base.name in failed:
                failed[name] = f"not begun, because {entry.base.name} failed"
                return
            try:
                self.run(entry)
                told = "world and base"
                if entry.base:
                    told = f"{_figures(self._workdir / name)}  ({next(finished)} of {len(runs)})"
                self.say(f"{name}: {time.monotonic() - began:.0f} s  {told}")
            except Stopped:
                pass
            except (Failed, OSError, ValueError) as error:
                failed[name] = str(error)
                self.say(f"{name}: failed: {str(error).splitlines()[0]}")

        bases = {run.base.name: run.base for run in runs if run.base}
        with futures.ThreadPoolExecutor(jobs) as pool:
            for some in (bases.values(), runs):
                begun = [pool.submit(attempt, each) for each in some]
                while futures.wait(begun, _LOOK_EVERY_S).not_done:
                    pass  # awake now and then: a wait without end may see a signal late
                for done in begun:
                    done.result()
        return failed


def _tail(path: pathlib.Path, lines: int) -> str:
    """The last lines of a log that are not empty."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])


def copy_base(base: pathlib.Path, directory: pathlib.Path) -> None:
    """A directory of a run that holds the world and the base, and says which; whole or not at all."""
    if not directory.exists():
        with files.whole(directory) as partial:
            shutil.copytree(base, partial, ignore=lambda at, _: _NOT_COPIED if pathlib.Path(at) == base else ())


def _figures(directory: pathlib.Path) -> str:
    """What the evaluations of a finished run say."""
    found = finished_runs.evaluations(directory)
    em = lambda decoding: " → ".join(f"{found[f'{name}-{decoding}']['em']:.3f}" for name in ("base", "final"))
    searches = f"{found['final-sampled']['searches']:.2f} searches a question"
    return f"exact match greedy {em('greedy')}, sampled {em('sampled')}; {searches}"
