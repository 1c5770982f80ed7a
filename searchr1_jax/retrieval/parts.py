"""The parts that an index can have, a row each; of those that need vectors the first one there is searched."""

from searchr1_jax.retrieval import bm25, exact_index, part, scann_index, scann_part

PARTS: dict[str, part.Part] = {"scann": scann_part.PART, "exact": exact_index.PART, "bm25": bm25.PART}

BY_VECTORS = tuple(name for name, row in PARTS.items() if row.needs_vectors)
IN_MEMORY = {name: row.in_memory for name, row in PARTS.items() if row.in_memory}


def default() -> str:
    """ScaNN, or exact search where there is no ScaNN."""
    return "scann" if scann_index.available() else "exact"
