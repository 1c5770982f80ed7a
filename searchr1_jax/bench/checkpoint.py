r"""How fast a checkpoint is loaded and exported, and how much host memory that takes beyond the weights.

python -m searchr1_jax.bench.checkpoint [--size=llama-3.2-1b] [--dtype=bfloat16] [--repeats=3] [--json]

Writes a random checkpoint of a named size into a temporary directory, then measures, each in a process of its own and
in turns: plainly reading its files into memory (warm cache), loading it into arrays, and loading and exporting it.
On the CPU backend the arrays are host memory themselves, so a load must hold them once:

    load_memory_ratio    peak growth of the process while loading / bytes of the weights
    load_speed_ratio     seconds of plain reading / seconds of loading (median of the pairs)
    export_memory_ratio  peak growth of the process while loading and exporting / bytes of the weights
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import resource
import shutil
import statistics
import tempfile
import threading
import time

from rich import console as rich_console
from rich import table as rich_table


def _resident() -> int:
    """Bytes of this process that are its own: file pages it maps belong to the page cache."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Peak:
    """Largest growth of the process within a `with` block, in bytes; sampled every few milliseconds."""

    def __enter__(self):
        self._start, self._done, self.bytes = _resident(), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.004):
            self.bytes = max(self.bytes, _resident() - self._start)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, _resident() - self._start)


def make(directory: pathlib.Path, size: str, dtype: str) -> int:
    """Writes a random checkpoint, one tensor at a time. Returns the bytes of its weights."""
    import jax
    import numpy as np

    from searchr1_jax.core import parallel
    from searchr1_jax.models import catalog
    from searchr1_jax.models import decoder
    from searchr1_jax.models import hf

    model = catalog.SIZES[size]
    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1)):
        _, abstract = decoder.abstract(decoder.Policy, model, np.dtype(dtype))
    # One layer's random numbers serve all layers: a broadcast takes no memory.
    rng = np.random.default_rng(0)

    def random(leaf):
        one = rng.standard_normal(leaf.shape[-2:], np.float32).astype(leaf.dtype)
        return np.broadcast_to(one, leaf.shape)

    params = jax.tree.map(random, abstract)
    hf.save(directory, model, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def plain_read(directory: pathlib.Path, _dtype: str) -> dict[str, float]:
    """Reads the files into buffers of their size."""
    began = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        buffer = bytearray(path.stat().st_size)
        with open(path, "rb", buffering=0) as file:
            view, place = memoryview(buffer), 0
            while read := file.readinto(view[place:]):
                place += read
    return {"seconds": time.perf_counter() - began}


def load(directory: pathlib.Path, dtype: str, output: pathlib.Path | None = None) -> dict[str, float]:
    """Loads into arrays on the mesh, and exports them where an output is given."""
    import jax
    import numpy as np

    from searchr1_jax.core import parallel
    from searchr1_jax.models import hf

    with jax.set_mesh(parallel.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        jax.device_put(np.zeros(8)).block_until_ready()
        with _Peak() as peak:
            began = time.perf_counter()
            params = jax.block_until_ready(hf.load(directory, dtype=np.dtype(dtype)))
            seconds = time.perf_counter() - began
            if output is not None:
                hf.save(output, hf.read_config(directory), params)
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def _apart(function, *arguments):
    """The function's result from a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(size: str, dtype: str, repeats: int, directory: pathlib.Path) -> dict[str, float]:
    """All figures; needs room for the checkpoint twice in `directory`."""
    checkpoint, exported = directory / "checkpoint", directory / "exported"
    size_bytes = _apart(make, checkpoint, size, dtype)
    _apart(plain_read, checkpoint, dtype)  # warms the page cache
    reads, loads = [], []
    for _ in range(repeats):
        reads.append(_apart(plain_read, checkpoint, dtype))
        loads.append(_apart(load, checkpoint, dtype))
    export = _apart(load, checkpoint, dtype, exported)
    speed = [read["seconds"] / one["seconds"] for read, one in zip(reads, loads, strict=True)]
    return {
        "gigabytes": size_bytes / 1e9,
        "read_seconds": statistics.median(read["seconds"] for read in reads),
        "load_seconds": statistics.median(one["seconds"] for one in loads),
        "load_speed_ratio": statistics.median(speed),
        "load_memory_ratio": max(one["peak_bytes"] for one in loads) / size_bytes,
        "export_memory_ratio": export["peak_bytes"] / size_bytes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama-3.2-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
    try:
        figures = measure(arguments.size, arguments.dtype, arguments.repeats, directory)
    finally:
        shutil.rmtree(directory)
    if arguments.json:
        print(json.dumps({"size": arguments.size, "dtype": arguments.dtype} | figures))
        return
    table = rich_table.Table(title=f"{arguments.size}, {arguments.dtype}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}")
    rich_console.Console().print(table)


if __name__ == "__main__":
    main()
