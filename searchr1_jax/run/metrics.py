"""What a run says of itself: metrics.jsonl and TensorBoard, lines on the console, time and memory of each command.

metrics.jsonl holds one JSON object a step. A resumed run first drops what was written after its checkpoint, so
the file reads as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import sys
import time
from typing import Any, Iterator, Mapping

import psutil
from rich import console as rich_console
from rich import progress as rich_progress

from searchr1_jax.core import files
from searchr1_jax.core import parallel

_CONSOLE = rich_console.Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on the console, once however many processes there are."""
    if parallel.is_first():
        _CONSOLE.print(text, markup=False)


class Progress:
    """How much of some work is done: a bar on a terminal, elsewhere a line now and then."""

    LINE_EVERY_S = 60.0

    def __init__(self, total: int, *, what: str):
        columns = rich_progress.Progress.get_default_columns()
        columns += rich_progress.MofNCompleteColumn(), rich_progress.TextColumn("{task.fields[note]}")
        shown = _CONSOLE.is_terminal and parallel.is_first()
        self._bar = rich_progress.Progress(*columns, console=_CONSOLE, transient=True, disable=not shown)
        self._task = self._bar.add_task(what, total=total, note="")
        self._what, self._total, self._done, self._said = what, total, 0, time.monotonic()

    def advance(self, note: str = "") -> None:
        """One more is done; `note` is shown beside it."""
        self.reach(self._done + 1, note)

    def reach(self, done: int, note: str = "") -> None:
        """So many are done; `note` is shown beside it."""
        self._done = done
        self._bar.update(self._task, completed=done, note=note)
        if not _CONSOLE.is_terminal and time.monotonic() - self._said > self.LINE_EVERY_S:
            self._said = time.monotonic()
            say(f"{self._what}: {self._done} of {self._total}  {note}")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


def peak_memory_gb() -> float:
    """Largest resident set of this process so far, in 10⁹ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextlib.contextmanager
def booked(workdir: pathlib.Path, command: str) -> Iterator[None]:
    """Appends a command's seconds and the process's peak memory to <workdir>/verbs.jsonl.

    The seconds count from when the process began, imports included, or from when the command before it ended. Also an
    interrupted command is booked, since that time was spent on the run; an error leaves nothing behind.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _book(workdir, command)
        raise
    _book(workdir, command)


_booked_until = 0.0


def _book(workdir: pathlib.Path, command: str) -> None:
    global _booked_until
    if not parallel.is_first():
        return
    began, _booked_until = max(_booked_until, psutil.Process().create_time()), time.time()
    row = {"verb": command, "seconds": round(_booked_until - began, 2), "peak_memory_gb": round(peak_memory_gb(), 3)}
    with open(workdir / "verbs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


class Writer:
    """Writes a run's metrics; the first process does, for the others it is silent."""

    def __init__(self, workdir: pathlib.Path, *, step: int, again: bool = False):
        """Continues after `step` steps; what was written for later ones is dropped, `again`: for that step too."""
        self._workdir, self._path, self._tensorboard = workdir, workdir / "metrics.jsonl", None
        self._open(step - again, keep=step > 0)

    def rewind(self, step: int) -> None:
        """Drops what was written for later steps."""
        self.close()
        self._open(step, keep=True)

    def _open(self, last: int, *, keep: bool) -> None:
        """Goes on after step `last`, whose rows and those before are kept, or none."""
        from tensorboardX import SummaryWriter

        if not parallel.is_first():
            return
        kept = [row for row in read(self._workdir) if row["step"] <= last] if keep else []
        files.write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the values of a step; scalars only."""
        if self._tensorboard is None:
            return
        row = {"step": step} | {name: value for name, value in values.items()}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
