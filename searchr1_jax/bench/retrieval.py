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

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import numpy as np

from searchr1_jax.bench import measuring
from searchr1_jax.retrieval import exact_index, scann_index, scann_plan

try:
    import faiss  # pyright: ignore[reportMissingImports]
except ImportError:
    faiss: Any = None

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


def _settings(rows: int, dimensions: int, *, soar: bool) -> scann_index.Settings:
    settings = scann_index.Settings.for_rows(rows, dimensions)
    return settings if soar else dataclasses.replace(settings, soar=None)


class Scann:
    def __init__(self, rows: int, *, soar: bool):
        self._soar = soar
        leaves = sorted({min(max(1, math.isqrt(rows)), math.ceil(1.5**i)) for i in range(20)})
        self.ladders = [[(few, depth) for few in leaves] for depth in (15, 20, 30, 40, 60, 100, 200)]

    def ready(self) -> None:
        scann_index.available()

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        settings = _settings(*vectors.shape, soar=self._soar)
        scann_index.build(vectors, path, settings=settings, shard_rows=len(vectors))

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
        index = scann_index.ScannIndex.load(path, threads=1)
        if not index.settings.leaves:
            return lambda point: index.search
        return lambda point: index.searching(leaves_searched=point[0], rescored=point[1]).search


class Exact:
    ladders = [[None]]

    def ready(self) -> None:
        jax.device_put(np.zeros(8)).block_until_ready()

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        path.touch()

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
        index = exact_index.ExactIndex(vectors)
        return lambda point: index.search


class Faiss:
    """An index of faiss' factory, with its parameters as text."""

    def __init__(self, factory: str, ladders: list[list[str]]):
        self._factory, self.ladders = factory, ladders

    def ready(self) -> None:
        faiss.omp_set_num_threads(1)

    def build(self, vectors: np.ndarray, path: pathlib.Path) -> None:
        index = faiss.index_factory(vectors.shape[1], self._factory, faiss.METRIC_INNER_PRODUCT)
        vectors = np.asarray(vectors)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(path))

    def open(self, vectors: np.ndarray, path: pathlib.Path) -> Callable[[Any], Search]:
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


def _build(name: str, vectors: pathlib.Path, path: pathlib.Path) -> dict[str, float]:
    """Builds on all cores. Returns seconds and the bytes it took, of memory at most and of disk."""
    mapped = np.load(vectors, mmap_mode="r")
    build = functools.partial(make(name, *mapped.shape).build, mapped, path)
    seconds, peak = measuring.peak_growth(lambda: measuring.seconds(build))
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    return {"build_s": seconds, "building_bytes": peak, "disk_bytes": sum(file.stat().st_size for file in files)}


def _memory(name: str, vectors: pathlib.Path, path: pathlib.Path) -> int:
    """Bytes by which opening the index and a first search make the process grow."""
    mapped = np.load(vectors, mmap_mode="r")
    method = make(name, *mapped.shape)
    method.ready()  # the library is not the index
    start = measuring.own_bytes()
    search = method.open(mapped, path)(method.ladders[0][0])  # holds the index
    search(np.asarray(mapped[:1]), 3)
    return measuring.own_bytes() - start


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
    """Queries/s, so many together."""
    parts = [queries[start : start + step] for start in range(0, len(queries), step)]
    return len(queries) / measuring.seconds(lambda: [search(part, 3) for part in parts])


def _recall(search: Search, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true k best rows that are among the k found."""
    found, true = search(queries, k)[0], truth[:, :k]
    return float((true[:, :, None] == found[:, None, :]).any(axis=2).mean())


def first_with(recalls: Iterable[float], recall: float) -> int | None:
    """The first point of a ladder that finds so much, if any."""
    return next((i for i, found in enumerate(recalls) if found >= recall), None)


def choose(ladders: list[list[Any]], use: Callable[[Any], Search], queries: np.ndarray, truth: np.ndarray) -> list[Any]:
    """The points of a ladder around the fastest that reaches RECALL: one below, itself, one above."""
    best, chosen = 0.0, ladders[-1][-1:]
    if len(ladders[0]) == 1:
        return chosen  # there is no choice
    for ladder in ladders:
        at = first_with((_recall(use(point), queries, truth, 3) for point in ladder), RECALL)
        if at is not None and (rate := max(_rate(use(ladder[at]), queries, 1) for _ in range(3))) > best:
            best, chosen = rate, ladder[max(0, at - 1) : at + 2]
    return chosen


def at_recall(recalls: list[float], rates: list[float], recall: float) -> float:
    """Queries/s at a recall, from those of a ladder's points, the quickest first; logarithmic in between.

    Nothing is extrapolated: a quickest point that finds more counts as it is, and NaN says that none finds enough.
    """
    if not (i := first_with(recalls, recall)):
        return math.nan if i is None else rates[0]
    share = (recall - recalls[i - 1]) / (recalls[i] - recalls[i - 1])
    return rates[i - 1] * (rates[i] / rates[i - 1]) ** share


def measure(
    names: list[str], rows: int, dimensions: int, *, queries: int, rounds: int, directory: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Every method's figures, under its name."""
    vectors, half = directory / "vectors.npy", queries // 2
    draw(vectors, rows, dimensions, seed=0)
    draw(directory / "queries.npy", queries, dimensions, seed=1)
    mapped, asked = np.load(vectors, mmap_mode="r"), np.load(directory / "queries.npy")
    truth, _ = exact_index.top_k(mapped, asked, 10)
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        figures[name] = measuring.apart(_build, name, vectors, directory / name)
        figures[name]["memory_bytes"] = measuring.apart(_memory, name, vectors, directory / name)
    uses, points, runs = {}, {}, {}

    def rate(name: str, point: Any, together: int) -> float:
        # Exact search takes the time of hundreds of approximate ones: fewer queries say as much.
        return _rate(uses[name](point), asked[half:][: 32 if name == "exact" else None], together)

    with _one_core():
        for name in names:
            method = make(name, rows, dimensions)
            method.ready()
            uses[name] = method.open(mapped, directory / name)
            points[name] = choose(method.ladders, uses[name], asked[:half], truth[:half])
            runs |= {(name, i): functools.partial(rate, name, point, 1) for i, point in enumerate(points[name])}
            runs[name, "together"] = functools.partial(rate, name, points[name][-1], 64)
        rates = {run: statistics.median(some) for run, some in measuring.in_turns(rounds, runs).items()}
    for name, use in uses.items():
        recalls = [_recall(use(point), asked[half:], truth[half:], 3) for point in points[name]]
        enough = first_with(recalls, RECALL)
        enough = len(recalls) - 1 if enough is None else enough
        figures[name] |= {
            "recall_at_3": recalls[enough],
            "recall_at_10": _recall(use(points[name][enough]), asked[half:], truth[half:], 10),
            "qps": at_recall(recalls, [rates[name, i] for i in range(len(recalls))], RECALL),
            "batched_qps": rates[name, "together"],
            "point": str(points[name][enough]),
        }
    return figures


def planned(names: Iterable[str], rows: int, dimensions: int) -> dict[str, dict[str, int]]:
    """What `scann_plan.plan` says of the ScaNN indexes among the methods."""
    plans = {}
    for name in (name for name in names if name.startswith("scann")):
        settings = _settings(rows, dimensions, soar=name == "scann")
        p = scann_plan.plan(rows, dimensions, settings=settings, shard_rows=rows)
        plans[name] = dict(memory_bytes=p.serving_bytes, disk_bytes=p.disk_bytes, building_bytes=p.building_bytes)
    return plans


def summary(figures: dict[str, dict[str, Any]], rows: int, dimensions: int) -> dict[str, Any]:
    """One record: each method's queries/s, ScaNN's other figures, and everything under "methods"."""
    out: dict[str, Any] = {"rows": rows, "dimensions": dimensions, "vectors": "synthetic", "at_recall_at_3": RECALL}
    out |= {f"{name}_qps": figure["qps"] for name, figure in figures.items()}
    first = next(iter(figures.values()))
    out |= {name: first[name] for name in ("recall_at_3", "recall_at_10", "build_s", "memory_bytes", "disk_bytes")}
    if {"scann", "hnsw"} <= figures.keys():
        out["scann_over_hnsw"] = figures["scann"]["qps"] / figures["hnsw"]["qps"]
    return out | {"methods": figures, "planned": planned(figures, rows, dimensions)}


def main():
    given = measuring.flags(__doc__, rows=100_000, dimensions=768, methods="")
    installed = [name for name in METHODS if name not in ("hnsw", "ivf_pq") or faiss]
    names = given.methods.split(",") if given.methods else installed
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"no method {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes to come: one core is what all of them get
    jax.config.update("jax_platforms", "cpu")
    size = given.rows, given.dimensions
    with tempfile.TemporaryDirectory(prefix="bench-retrieval-") as directory:
        figures = measure(names, *size, queries=QUERIES, rounds=ROUNDS, directory=pathlib.Path(directory))
    if given.json:
        print(json.dumps(summary(figures, *size)))
        return
    print(f"{given.rows:,} synthetic vectors of {given.dimensions}, one core; queries/s at recall@3 = {RECALL},")
    print("recalls of the quickest point measured that reaches it")
    keys = {"qps": "queries/s", "batched_qps": "of 64 together", "recall_at_3": "recall@3", "recall_at_10": "recall@10"}
    keys |= {"build_s": "build s", "memory_bytes": "memory bytes", "disk_bytes": "disk bytes"}
    rows = [(name, *(figure[key] for key in keys)) for name, figure in figures.items()]
    measuring.table(("method", *keys.values()), rows)


if __name__ == "__main__":
    main()
