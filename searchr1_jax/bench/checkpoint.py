r"""How fast a checkpoint is loaded and exported, and how much host memory that takes beyond the weights.

python -m searchr1_jax.bench.checkpoint [--size=llama-3.2-1b] [--dtype=bfloat16] [--repeats=3] [--json]

Writes a random checkpoint of a named size into a temporary directory, then measures, each in a process of its own and
in turns: plainly reading its files into memory (warm cache), loading it into arrays, and loading and exporting it.
On the CPU backend the arrays are host memory themselves, so a load must hold them once:

    load_memory_ratio    peak growth of the process while loading / bytes of the weights
    load_speed_ratio     seconds of plain reading / seconds of loading (median of the pairs)
    export_memory_ratio  peak growth of the process while loading and exporting / bytes of the weights
"""

import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from searchr1_jax.bench import measuring
from searchr1_jax.models import catalog, decoder, hf


def make(directory: pathlib.Path, size: str, dtype: str) -> int:
    """Writes a random checkpoint, one tensor at a time. Returns the bytes of its weights."""
    model, rng = catalog.SIZES[size], np.random.default_rng(0)
    with measuring.one_device():
        _, abstract = decoder.abstract(decoder.Policy, model, np.dtype(dtype))

    def random(leaf):  # one layer's random numbers serve all layers: a broadcast takes no memory
        one = rng.standard_normal(leaf.shape[-2:], np.float32).astype(leaf.dtype)
        return np.broadcast_to(one, leaf.shape)

    hf.save(directory, model, jax.tree.map(random, abstract))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def plain_read(directory: pathlib.Path) -> float:
    """Seconds of reading the files into buffers of their size."""
    began = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        view = memoryview(bytearray(path.stat().st_size))
        with open(path, "rb", buffering=0) as file:
            while read := file.readinto(view):
                view = view[read:]
    return time.perf_counter() - began


def load(directory: pathlib.Path, dtype: str, output: pathlib.Path | None = None) -> tuple[float, int]:
    """Seconds of loading into arrays, and peak growth, with an export where an output is given."""

    def run() -> float:
        with measuring.one_device():
            began = time.perf_counter()
            params = jax.block_until_ready(hf.load(directory, dtype=np.dtype(dtype)))
            seconds = time.perf_counter() - began
            if output is not None:
                hf.save(output, hf.read_config(directory), params)
        return seconds

    jax.device_put(np.zeros(8)).block_until_ready()  # the backend is not the checkpoint
    return measuring.peak_growth(run)


def measure(size: str, dtype: str, repeats: int, directory: pathlib.Path) -> dict[str, float]:
    """All figures; needs room for the checkpoint twice in `directory`."""
    checkpoint, apart = directory / "checkpoint", measuring.apart
    size_bytes = apart(make, checkpoint, size, dtype)
    apart(plain_read, checkpoint)  # warms the page cache
    reads = {"read": lambda: (apart(plain_read, checkpoint), 0), "load": lambda: apart(load, checkpoint, dtype)}
    (read_s, _), (load_s, load_bytes) = (zip(*of, strict=True) for of in measuring.in_turns(repeats, reads).values())
    _, export_bytes = apart(load, checkpoint, dtype, directory / "exported")
    return {
        "gigabytes": size_bytes / 1e9,
        "read_seconds": statistics.median(read_s),
        "load_seconds": statistics.median(load_s),
        "load_speed_ratio": measuring.median_ratio(read_s, load_s),
        "load_memory_ratio": max(load_bytes) / size_bytes,
        "export_memory_ratio": export_bytes / size_bytes,
    }


def main():
    given = measuring.flags(__doc__, size="llama-3.2-1b", dtype="bfloat16", repeats=3)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as directory:
        figures = measure(given.size, given.dtype, given.repeats, pathlib.Path(directory))
    measuring.tell({"size": given.size, "dtype": given.dtype}, figures, as_json=given.json)


if __name__ == "__main__":
    main()
