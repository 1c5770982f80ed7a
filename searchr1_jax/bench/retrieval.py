r"""How fast vectors are found: ScaNN with and without SOAR, exact search, and faiss where it is installed.

python -m searchr1_jax.bench.retrieval [--rows=100000] [--dimensions=768] [--methods=scann,hnsw] [--json]

The vectors are synthetic: 2,000 random directions, each row one of them plus noise of length 0.7, at unit length;
queries are other draws from the same. Indexes are built on all cores, in a process each; then one process on one core,
asking one query at a time, measures all of them in turns. A search's parameters are chosen on half of the queries and
judged on the other half, each method's queries/s read off its curve at recall@3 = 0.95 (medians of the turns):

    scann, scann_without_soar    retrieval/scann_index.py
    exact                        retrieval/exact_index.py, every row scored
    hnsw, ivf_pq                 faiss: HNSW with 32 links; IVF, fast-scan PQ, rescored with the vectors
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import threading
import time
from typing import Any

import numpy as np
from rich import console as rich_console
from rich import table as rich_table

CLUSTERS, NOISE = 2_000, 0.7
QUERIES, ROUNDS, RECALL = 1_000, 5, 0.95
BLOCK = 65_536  # rows drawn at a time
METHODS = ("scann", "scann_without_soar", "exact", "hnsw", "ivf_pq")
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # vectors, k -> rows, scores


def draw(path: pathlib.Path, rows: int, dimensions: int, *, seed: int) -> None:
    """Writes float32[rows, dimensions] to a .npy file, a block at a time; the clusters are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, dimensions), np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng((1, seed))
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dimensions))
    for start in range(0, rows, BLOCK):
        block = out[start : start + BLOCK]
        noise = rng.standard_normal(block.shape, np.float32) * np.float32(NOISE / math.sqrt(dimensions))
        block[:] = centres[rng.integers(CLUSTERS, size=len(block))] + noise
        block /= np.linalg.norm(block, axis=1, keepdims=True)


# A method: ready() starts its library; build(vectors, path) writes an index; open(vectors, path) returns a function
# that gives the search at one of the ladders' points, until it is called for the next.


def _settings(rows: int, dimensions: int, *, soar: bool):
    from searchr1_jax.retrieval import scann_index

    settings = scann_index.Settings.for_rows(rows, dimensions)
    return settings if soar else dataclasses.replace(settings, soar=None)


class Scann:
    def __init__(self, rows: int, *, soar: bool):
        self._soar = soar
        leaves = sorted({min(max(1, math.isqrt(rows)), math.ceil(1.5**i)) for i in range(20)})
        self.ladders = [[(few, depth) for few in leaves] for depth in (15, 20, 30, 40, 60, 100, 200)]

    def ready(self) -> None:
        from searchr1_jax.retrieval import scann_index

        scann_index.available()

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        from searchr1_jax.retrieval import scann_index

        settings = _settings(*vectors.shape, soar=self._soar)
        scann_index.build(vectors, path, settings=settings, shard_rows=len(vectors))

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
        from searchr1_jax.retrieval import scann_index

        index = scann_index.ScannIndex.load(path, threads=1)
        if not index.settings.leaves:
            return lambda point: index.search
        return lambda point: index.searching(leaves_searched=point[0], rescored=point[1]).search


class Exact:
    ladders = [[None]]

    def ready(self) -> None:
        import jax

        jax.device_put(np.zeros(8)).block_until_ready()

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        path.touch()

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
        from searchr1_jax.retrieval import exact_index

        index = exact_index.ExactIndex(vectors)
        return lambda point: index.search


class Faiss:
    """An index of faiss' factory, with its parameters as text."""

    def __init__(self, factory: str, ladders: list[list[str]]):
        self._factory, self.ladders = factory, ladders

    def ready(self) -> None:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(1)

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        import faiss  # pyright: ignore[reportMissingImports]

        index = faiss.index_factory(vectors.shape[1], self._factory, faiss.METRIC_INNER_PRODUCT)
        vectors = np.asarray(vectors)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(path))

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
        import faiss  # pyright: ignore[reportMissingImports]

        index, parameters = faiss.read_index(str(path)), faiss.ParameterSpace()

        def use(point):
            parameters.set_index_parameters(index, point)
            return lambda vectors, k: index.search(vectors, k)[::-1]

        return use


def make(name: str, rows: int, dimensions: int) -> Scann | Exact | Faiss:
    """The method of that name."""
    if name == "hnsw":
        return Faiss("HNSW32", [[f"efSearch={2 ** (i / 2):.0f}" for i in range(6, 21)]])
    if name == "ivf_pq":
        lists = max(1, min(math.isqrt(rows), rows // 40))
        probes = sorted({min(lists, math.ceil(1.5**i)) for i in range(20)})
        codes = max(1, dimensions // 4)  # of four dimensions each, 4 bits
        ladders = [[f"nprobe={few},k_factor_rf={deep}" for few in probes] for deep in (5, 10, 20, 40, 80)]
        return Faiss(f"IVF{lists},PQ{codes}x4fs,RFlat", ladders)
    return Exact() if name == "exact" else Scann(rows, soar=name == "scann")


def _anonymous() -> int:
    """Bytes of this process that are its own: file pages it maps belong to the page cache."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process its memory; run the benchmark on Linux")


def _build(name: str, vectors: pathlib.Path, path: pathlib.Path) -> dict[str, float]:
    """Builds on all cores. Returns seconds and the bytes it took, of memory at most and of disk."""
    mapped = np.load(vectors, mmap_mode="r")
    start, peak, done = _anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    make(name, *mapped.shape).build(mapped, path)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"build_s": seconds, "building_bytes": peak, "disk_bytes": sum(file.stat().st_size for file in files)}


def _memory(name: str, vectors: pathlib.Path, path: pathlib.Path) -> int:
    """Bytes by which opening the index and a first search make the process grow."""
    mapped = np.load(vectors, mmap_mode="r")
    method = make(name, *mapped.shape)
    method.ready()  # the library is not the index
    start = _anonymous()
    search = method.open(mapped, path)(method.ladders[0][0])  # holds the index
    search(np.asarray(mapped[:1]), 3)
    return _anonymous() - start


def _apart(function, *arguments):
    """The function's result from a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@contextlib.contextmanager
def _one_core():
    """Keeps this process, and the threads it starts, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _rate(search: Search, queries: np.ndarray, step: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(queries), step):
        search(queries[start : start + step], 3)
    return len(queries) / (time.perf_counter() - began)


def _recall(search: Search, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true k best rows that are among the k found."""
    found, true = search(queries, k)[0], truth[:, :k]
    return float((true[:, :, None] == found[:, None, :]).any(axis=2).mean())


def choose(method: Any, use: Callable[[Any], Search], queries: np.ndarray, truth: np.ndarray) -> list[Any]:
    """The points of a ladder around the fastest that reaches RECALL: one below, itself, one above."""
    best, chosen = 0.0, method.ladders[-1][-1:]
    for ladder in method.ladders:
        for at, point in enumerate(ladder):
            search = use(point)
            if len(ladder) == 1 or _recall(search, queries, truth, 3) >= RECALL:
                rate = max(_rate(search, queries, 1) for _ in range(3)) if len(ladder) > 1 else math.inf
                if rate > best:
                    best, chosen = rate, ladder[max(0, at - 1) : at + 2]
                break
    return chosen


def at_recall(points: list[tuple[float, float]], recall: float) -> float:
    """Queries/s at a recall, from (recall, queries/s) of a ladder, the quickest first; logarithmic in between.

    Nothing is extrapolated: a quickest point that finds more counts as it is, and NaN says that none finds enough.
    """
    before = None
    for point in points:
        if point[0] >= recall:
            if before is None:
                return point[1]
            share = (recall - before[0]) / (point[0] - before[0])
            return float(math.exp((1 - share) * math.log(before[1]) + share * math.log(point[1])))
        before = point
    return math.nan


def measure(
    names: list[str], rows: int, dimensions: int, *, queries: int, rounds: int, directory: pathlib.Path
) -> dict[str, dict[str, float]]:
    """Every method's figures, under its name."""
    from searchr1_jax.retrieval import exact_index

    vectors = directory / "vectors.npy"
    draw(vectors, rows, dimensions, seed=0)
    draw(directory / "queries.npy", queries, dimensions, seed=1)
    mapped, asked = np.load(vectors, mmap_mode="r"), np.load(directory / "queries.npy")
    truth, _ = exact_index.top_k(mapped, asked, 10)
    half = queries // 2
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        figures[name] = _apart(_build, name, vectors, directory / name)
        figures[name]["memory_bytes"] = _apart(_memory, name, vectors, directory / name)
    with _one_core():
        uses, points = {}, {}
        for name in names:
            method = make(name, rows, dimensions)
            method.ready()
            uses[name] = method.open(mapped, directory / name)
            points[name] = choose(method, uses[name], asked[:half], truth[:half])
        # Exact search takes the time of hundreds of approximate ones: fewer queries say as much.
        judges = {name: (asked[half:][: 32 if name == "exact" else None]) for name in names}
        rates: dict[str, list[list[float]]] = {name: [[] for _ in points[name]] for name in names}
        together: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                for point, found in zip(points[name], rates[name], strict=True):
                    found.append(_rate(uses[name](point), judges[name], 1))
                together[name].append(_rate(uses[name](points[name][-1]), judges[name], 64))
    for name in names:
        judged = asked[half:], truth[half:]
        recalls = [_recall(uses[name](point), *judged, 3) for point in points[name]]
        qps = at_recall(list(zip(recalls, map(statistics.median, rates[name]), strict=True)), RECALL)
        enough = next((i for i, found in enumerate(recalls) if found >= RECALL), len(recalls) - 1)
        figures[name] |= {
            "recall_at_3": recalls[enough],
            "recall_at_10": _recall(uses[name](points[name][enough]), *judged, 10),
            "qps": qps,
            "batched_qps": statistics.median(together[name]),
            "point": str(points[name][enough]),
        }
    return figures


def planned(names: list[str], rows: int, dimensions: int) -> dict[str, dict[str, int]]:
    """What `scann_plan.plan` says of the ScaNN indexes among the methods."""
    from searchr1_jax.retrieval import scann_plan

    plans = {}
    for name in names:
        if name.startswith("scann"):
            settings = _settings(rows, dimensions, soar=name == "scann")
            plan = scann_plan.plan(rows, dimensions, settings=settings, shard_rows=rows)
            plans[name] = {
                "memory_bytes": plan.serving_bytes, "disk_bytes": plan.disk_bytes, "building_bytes": plan.building_bytes
            }  # fmt: skip
    return plans


def summary(figures: dict[str, dict[str, Any]], rows: int, dimensions: int) -> dict[str, Any]:
    """One record: each method's queries/s, ScaNN's other figures, and everything under "methods"."""
    out: dict[str, Any] = {"rows": rows, "dimensions": dimensions, "vectors": "synthetic", "at_recall_at_3": RECALL}
    out |= {f"{name}_qps": figure["qps"] for name, figure in figures.items()}
    first = next(iter(figures.values()))
    out |= {name: first[name] for name in ("recall_at_3", "recall_at_10", "build_s", "memory_bytes", "disk_bytes")}
    if {"scann", "hnsw"} <= figures.keys():
        out["scann_over_hnsw"] = figures["scann"]["qps"] / figures["hnsw"]["qps"]
    return out | {"methods": figures, "planned": planned(list(figures), rows, dimensions)}


def _print(record: dict[str, Any]) -> None:
    table = rich_table.Table(title=f"{record['rows']:,} synthetic vectors of {record['dimensions']}, one core")
    for column in ("method", "queries/s", "of 64 together", "recall@3", "recall@10", "build s", "memory MB", "disk MB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, figure in record["methods"].items():
        table.add_row(
            name,
            f"{figure['qps']:,.0f}",
            f"{figure['batched_qps']:,.0f}",
            f"{figure['recall_at_3']:.3f}",
            f"{figure['recall_at_10']:.3f}",
            f"{figure['build_s']:.1f}",
            f"{figure['memory_bytes'] / 1e6:,.0f}",
            f"{figure['disk_bytes'] / 1e6:,.0f}",
        )
    console = rich_console.Console(highlight=False)
    console.print(table)
    console.print(f"queries/s at recall@3 = {RECALL}; recalls of the quickest point measured that reaches it")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--methods", default="", help=f"some of {','.join(METHODS)}; all that are installed by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    installed = [name for name in METHODS if name not in ("hnsw", "ivf_pq") or importlib.util.find_spec("faiss")]
    names = arguments.methods.split(",") if arguments.methods else installed
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"no method {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # one core is what all of them get
    with tempfile.TemporaryDirectory(prefix="bench-retrieval-") as directory:
        size = arguments.rows, arguments.dimensions
        figures = measure(names, *size, queries=QUERIES, rounds=ROUNDS, directory=pathlib.Path(directory))
    record = summary(figures, *size)
    if arguments.json:
        print(json.dumps(record))
    else:
        _print(record)


if __name__ == "__main__":
    main()
