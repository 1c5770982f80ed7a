"""What the benchmarks share: flags, one device, contestants in turns, processes apart, memory, and telling figures."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import functools
import json
import multiprocessing
import statistics
import time
from typing import Any, TypeVar

import jax
import psutil
from rich import console as rich_console, table as rich_table

from searchr1_jax.core import parallel

K = TypeVar("K")
T = TypeVar("T")


def flags(about: str | None, **defaults: Any) -> argparse.Namespace:
    """The command's flags, each of its default's type; --json is one of all."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (defaults | {"json": False}).items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, **kind)
    return parser.parse_args()


def one_device():
    """A context whose mesh is one device."""
    return jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))


def seconds(run: Callable[[], object]) -> float:
    """What a run takes; it waits for its results itself."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(repeats: int, runs: Mapping[K, Callable[[], T]]) -> dict[K, list[T]]:
    """What each run returned, a value a repeat; the runs take turns."""
    rounds = [{name: run() for name, run in runs.items()} for _ in range(repeats)]
    return {name: [each[name] for each in rounds] for name in runs}


def interleaved(repeats: int, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """The seconds of each run, a figure a repeat; the runs take turns."""
    return in_turns(repeats, {name: functools.partial(seconds, run) for name, run in runs.items()})


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the repeats' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result from a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def own_bytes() -> int:
    """Memory of this process that is its own: file pages it maps belong to the page cache (only Linux tells them)."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def peak_growth(run: Callable[[], T]) -> tuple[T, int]:
    """What a run, in a thread of its own, returns, and the bytes by which this process grows meanwhile, at most."""
    start, peak = own_bytes(), 0
    with futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        while futures.wait([running], timeout=0.004).not_done:
            peak = max(peak, own_bytes() - start)
        return running.result(), max(peak, own_bytes() - start)


def table(head: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    """Prints a table, its first column on the left; numbers with three digits at least."""
    out = rich_table.Table()
    for i, name in enumerate(head):
        out.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        out.add_row(*(x if isinstance(x, str) else f"{x:.3g}" if x < 100 else f"{x:,.0f}" for x in row))
    rich_console.Console().print(out)


def tell(asked: Mapping[str, Any], figures: Mapping[str, float], *, as_json: bool) -> None:
    """Prints what was measured with what was asked for: one JSON line, or a line and a table."""
    if as_json:
        print(json.dumps({**asked, **figures}))
        return
    print(", ".join(f"{name} {value}" for name, value in asked.items()))
    table(("figure", "value"), figures.items())
