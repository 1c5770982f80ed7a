"""What a ScaNN index will take of memory and disk, before it is built.

rows, dimensions, Settings ─▶ Estimate        memory to build in ─▶ rows of a shard
"""

import bisect

from searchr1_jax.retrieval import exact_index, part, scann_index

INDEXING_S = 0.3e-3  # seconds to index a passage of 768 dimensions on 2 cores


def plan(
    rows: int, dimensions: int, *, settings: scann_index.Settings | None = None, shard_rows: int, dtype: str = "float32"
) -> part.Estimate:
    """What `build` with these arguments will take.

    A row is held as its vector, a code of half a byte a block (a whole byte in the file) and its leaf's number; with
    SOAR the file has room for two codes, while a second one is held only by rows that gain from it (a tenth to a
    quarter of synthetic ones; planned as half). The tree holds two float32 copies of its centroids. While a shard is
    built ScaNN has it twice as float32, its codes a byte each, and the training sample twice.
    """
    shards = -(-rows // shard_rows)
    name = f"ScaNN, {shards} shard{'s' if shards > 1 else ''}"
    seconds = INDEXING_S * rows * dimensions / 768
    largest = -(-rows // shards)
    settings = settings or scann_index.Settings.for_rows(largest, dimensions)
    given = 0 if dtype == "float32" else 4 * largest * dimensions  # a shard as float32
    if not settings.leaves:
        stored = 4 * rows * dimensions
        return part.Estimate(name, stored, 4 * largest * dimensions + given, stored, seconds)
    blocks = -(-dimensions // settings.dimensions_a_code)
    soar = settings.soar is not None
    stored = rows * dimensions * exact_index.DTYPES[settings.dtype] + shards * settings.leaves * dimensions * 8
    sample = min(largest, settings.training_rows)
    return part.Estimate(
        name,
        disk_bytes=stored + rows * (blocks + 4) * (1 + soar),
        building_bytes=largest * (8 * dimensions + blocks + 16) + 8 * sample * dimensions + given,
        serving_bytes=stored + int(rows * (blocks / 2 * (1 + 0.5 * soar) + 4 * (1 + soar))),
        seconds=seconds,
    )


def shard_rows(rows: int, *, memory_bytes: int, dimensions: int) -> int:
    """The most rows of a shard that can be built in so much memory: few large shards are searched fastest.

    Raises: ValueError where not even scann_index.BRUTE_FORCE_ROWS fit.
    """

    needed = lambda shard: plan(shard, dimensions, shard_rows=shard, dtype="bfloat16").building_bytes
    low = min(rows, scann_index.BRUTE_FORCE_ROWS)
    if needed(low) > memory_bytes:
        raise ValueError(
            f"{memory_bytes / 1e9:.1f} GB of memory do not hold a shard of {low:,} rows while it is built, which takes"
            f" {needed(low) / 1e9:.1f} GB; give more memory"
        )
    return bisect.bisect_right(range(rows + 1), memory_bytes, lo=low, key=needed) - 1
