"""What a run says of itself: metrics.jsonl and TensorBoard, lines on the console, time and memory of each verb.

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
from typing import Any, Iterable, Iterator, Mapping, TypeVar

import psutil
from rich import console as rich_console
from rich import progress as rich_progress

Item = TypeVar("Item")

_CONSOLE = rich_console.Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on the console."""
    _CONSOLE.print(text, markup=False)


def progress(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
    """Hands the items on and shows on a terminal how many have come and how long the rest may take."""
    columns = (*rich_progress.Progress.get_default_columns(), rich_progress.MofNCompleteColumn())
    shown = _CONSOLE.is_terminal
    with rich_progress.Progress(*columns, console=_CONSOLE, transient=True, disable=not shown) as bar:
        yield from bar.track(items, total=total, description=what)


def peak_memory_gb() -> float:
    """Largest resident set of this process so far, in 10⁹ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextlib.contextmanager
def verb(workdir: pathlib.Path, name: str) -> Iterator[None]:
    """Appends the verb's seconds, imports included, and peak memory to <workdir>/verbs.jsonl.

    Also when it is interrupted, since that time was spent on the run; an error leaves nothing behind.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _book(workdir, name)
        raise
    _book(workdir, name)


def _book(workdir: pathlib.Path, name: str) -> None:
    seconds = time.time() - psutil.Process().create_time()
    row = {"verb": name, "seconds": round(seconds, 2), "peak_memory_gb": round(peak_memory_gb(), 3)}
    with open(workdir / "verbs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


class Writer:
    """Writes a run's metrics."""

    def __init__(self, workdir: pathlib.Path, *, step: int, again: bool = False):
        """Continues after `step` steps; what was written for later ones is dropped, `again`: for that step too."""
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        last = step - again
        kept = [row for row in read(workdir) if row["step"] <= last] if step else []
        temporary = self._path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self._path)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the values of a step; scalars only."""
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
