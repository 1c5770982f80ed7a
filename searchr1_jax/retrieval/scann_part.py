"""ScaNN as a part of an index: shards that fit the memory to build in, and a search tuned to a recall.

vectors/ ─ scann_index.build ─▶ scann/ ─ scann_tuning, against exact search ─▶ the manifest's record: how to search
"""

from __future__ import annotations

import dataclasses
from typing import Any

from searchr1_jax.retrieval import part
from searchr1_jax.retrieval import rankers
from searchr1_jax.retrieval import scann_index
from searchr1_jax.retrieval import scann_plan
from searchr1_jax.retrieval import scann_tuning
from searchr1_jax.retrieval import vectors as vector_files

INDEXING_S = 0.3e-3  # seconds to index a passage of 768 dimensions on 2 cores


def _plan(wanted: part.Wanted) -> part.Estimate:
    shard = scann_plan.shard_rows(wanted.rows, memory_bytes=wanted.memory_bytes, dimensions=wanted.dimensions)
    plan = scann_plan.plan(wanted.rows, wanted.dimensions, shard_rows=shard, vectors_dtype=wanted.dtype)
    name = f"ScaNN, {plan.shards} shard{'s' if plan.shards > 1 else ''}"
    seconds = INDEXING_S * wanted.rows * wanted.dimensions / 768
    return part.Estimate(name, plan.disk_bytes, plan.building_bytes, plan.serving_bytes, seconds)


def _build(making: part.Making) -> dict[str, Any]:
    """Returns a `scann_tuning.Measured`."""
    vectors = vector_files.open_vectors(making.directory / "vectors")
    rows, dimensions = vectors.shape
    scann_index.build(
        vectors,
        making.directory / "scann",
        shard_rows=scann_plan.shard_rows(rows, memory_bytes=making.memory_bytes, dimensions=dimensions),
        progress=lambda done: making.progress("ScaNN", done, rows),
    )
    assert making.encoder is not None  # it made the vectors
    measured = scann_tuning.tune(
        scann_index.ScannIndex.load(making.directory / "scann"),
        vectors,
        making.encoder.encode(list(making.queries), "query"),
        k=3,
        target_recall=making.target_recall,
        progress=lambda done: making.progress("measuring", done, rows),
    )
    return dataclasses.asdict(measured)


def _how(record: dict[str, Any]) -> dict[str, Any]:
    """How it is searched, of what was measured."""
    return {name: record[name] for name in ("leaves_searched", "rescored")}


def _open(opening: part.Opening) -> rankers.ByVectors:
    index = scann_index.ScannIndex.load(opening.directory / "scann", **_how(opening.parts["scann"]))
    return rankers.ByVectors(opening.encoder(), index)


PART = part.Part(
    needs_vectors=True,
    plan=_plan,
    build=_build,
    open=_open,
    identity=_how,
    packages=("scann",),
    check=scann_index.check,
    in_memory=scann_index.ScannIndex,
)
