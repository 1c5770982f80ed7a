"""What a run says of itself: metrics.jsonl and TensorBoard, lines on the console, time and memory of each command.

metrics.jsonl holds one JSON object a step, null where a figure is not finite. A resumed run first drops what was
written after its checkpoint, so the file reads as if it had never stopped.
"""

import contextlib
import json
import math
import pathlib
import resource
import sys
import time
from typing import Any, Iterable, Iterator, Mapping, Self

import psutil
from rich import console as rich_console, progress as rich_progress

from searchr1_jax.core import cluster, files, parallel

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
        cluster.advance()
        self._done = done
        self._bar.update(self._task, completed=done, note=note)
        if not _CONSOLE.is_terminal and time.monotonic() - self._said > self.LINE_EVERY_S:
            self._said = time.monotonic()
            say(f"{self._what}: {self._done} of {self._total}  {note}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


_booked_until = 0.0


@contextlib.contextmanager
def booked(workdir: pathlib.Path, command: str) -> Iterator[None]:
    """Appends a command's seconds and the process's peak memory, in 10⁹ bytes, to <workdir>/verbs.jsonl.

    The seconds count from when the process began, imports included, or from when the command before it ended. Also an
    interrupted command is booked, since that time was spent on the run; an error leaves nothing behind.
    """
    global _booked_until
    interrupted = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        interrupted = error
    if parallel.is_first():
        began, _booked_until = max(_booked_until, psutil.Process().create_time()), time.time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        row = {"verb": command, "seconds": round(_booked_until - began, 2), "peak_memory_gb": round(peak, 3)}
        with open(workdir / "verbs.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    if interrupted:
        raise interrupted


def cost(workdirs: Iterable[pathlib.Path]) -> tuple[float, float]:
    """Seconds of all commands that are booked there, and the largest peak memory of one."""
    rows = [json.loads(line) for workdir in workdirs for line in (workdir / "verbs.jsonl").read_text().splitlines()]
    return sum(row["seconds"] for row in rows), max(row["peak_memory_gb"] for row in rows)


class Writer:
    """Writes a run's metrics; the first process does, for the others it is silent."""

    def __init__(self, workdir: pathlib.Path, *, step: int, again: bool = False):
        """Continues after `step` steps; what was written for later ones is dropped, `again`: for that step too."""
        self._workdir, self._path, self._tensorboard = workdir, workdir / "metrics.jsonl", None
        self.rewind(step - again, keep=step > 0)

    def rewind(self, step: int, *, keep: bool = True) -> None:
        """Drops what was written for later steps, or everything."""
        from tensorboardX import SummaryWriter

        if not parallel.is_first():
            return
        self.close()
        kept = [row for row in read(self._workdir) if row["step"] <= step] if keep else []
        files.write_jsonl(self._path, map(_row, kept))
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the values of a step; scalars only."""
        if self._tensorboard is None:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps(_row({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can hold it."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, NaN where it says null; a last line that a kill cut short is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows
