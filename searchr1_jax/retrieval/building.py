"""Makes an index of a corpus, part by part, in the directory that `stored` opens.

    corpus ─ encoder ─▶ vectors/ ─▶ scann/ ─ measured against exact search ─▶ manifest.json
       └─▶ bm25/

Every part can be interrupted at any moment and goes on where it was; what an interrupted build was asked for stands
in planned.json, and another recipe is refused there.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any

import jax
import numpy as np

from searchr1_jax.core import files, parallel
from searchr1_jax.retrieval import (
    corpus as corpora,
    embed,
    part,
    parts as parts_lib,
    stored,
    text_encoder,
    vectors as vector_files,
)

_COUNTED_ON = "corpus.sha256"  # in encoder/


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of a corpus."""

    parts: tuple[str, ...] = dataclasses.field(default_factory=lambda: (parts_lib.default(),))  # of parts.PARTS
    encoder: str = ""  # of vectors: a Hugging Face directory or hub id; "" or stored.HASHED: hashed n-grams
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of it: what its files don't say, or else
    dimensions: int = 256  # of hashed n-grams
    dtype: str = "float32"  # of the vectors on disk
    memory_bytes: int = 16_000_000_000  # that building may take: ScaNN is built in shards that fit
    target_recall: float = 0.95  # at 3, that ScaNN is tuned to

    def __post_init__(self):
        unknown = [name for name in self.parts if name not in parts_lib.PARTS]
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"--parts is {list(self.parts)}; name some of {list(parts_lib.PARTS)}, each once")
        if self.encoder and not self.needs_vectors:
            raise ValueError(
                f"--parts={','.join(self.parts)} with --encoder={self.encoder!r}; an encoder belongs to"
                f" {' and '.join(parts_lib.BY_VECTORS)}, and to them alone"
            )
        if self.settings and self.encoder in ("", stored.HASHED):
            raise ValueError(
                f"{', '.join(f'--{name}' for name in self.settings)} without --encoder: hashed n-grams and words have"
                " no such settings; name the encoder that has"
            )
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"--target_recall is {self.target_recall}; it is a share, above 0 and at most 1")

    @property
    def needs_vectors(self) -> bool:
        return any(name in parts_lib.BY_VECTORS for name in self.parts)

    @property
    def hashed(self) -> bool:
        """Whether its encoder is the one of hashed n-grams."""
        return self.needs_vectors and self.encoder in ("", stored.HASHED)


def make_encoder(recipe: Recipe) -> vector_files.KnownEncoder | None:
    """The recipe's encoder, if a part needs one.

    That of hashed n-grams has yet to be `fitted`, which changes its vectors but not its speed.
    """
    if not recipe.needs_vectors:
        return None
    if not recipe.hashed:
        return text_encoder.TextEncoder(recipe.encoder, **recipe.settings)
    return embed.HashedNgramEncoder(dimensions=recipe.dimensions, idf=np.ones(embed.SLOTS))


def fitted(
    encoder: vector_files.KnownEncoder | None, corpus: corpora.Corpus, directory: pathlib.Path, progress: part.Progress
) -> vector_files.KnownEncoder | None:
    """The encoder, with what has to be counted on the corpus: as an index's directory keeps it, else counted now."""
    if not isinstance(encoder, embed.HashedNgramEncoder):
        return encoder
    if _counted_on(directory) == corpus.sha256:
        return stored.hashed_encoder(directory, encoder.dimensions)
    tell = lambda rows: progress("counting n-grams", rows, len(corpus))
    return embed.HashedNgramEncoder.fit(corpus, dimensions=encoder.dimensions, progress=tell)


def keep(encoder: vector_files.KnownEncoder | None, corpus: corpora.Corpus, directory: pathlib.Path) -> None:
    """Writes what was counted on the corpus into the directory."""
    if isinstance(encoder, embed.HashedNgramEncoder) and _counted_on(directory) != corpus.sha256:
        with files.whole(directory / "encoder") as temporary:
            temporary.mkdir()
            np.save(temporary / "idf.npy", encoder.idf)
            (temporary / _COUNTED_ON).write_text(corpus.sha256)


def _counted_on(directory: pathlib.Path) -> str:
    path = directory / "encoder" / _COUNTED_ON
    return path.read_text() if path.exists() else ""


def planned(recipe: Recipe, corpus: corpora.Corpus, encoder: vector_files.KnownEncoder | None) -> dict[str, Any]:
    """The manifest of the index that a recipe makes, but for what is measured."""
    by_vectors: dict[str, Any] = {"encoder": None, "vectors": None}
    if encoder is not None:
        from_files = isinstance(encoder, text_encoder.TextEncoder)
        by_vectors["encoder"] = {
            "path": os.path.abspath(encoder.directory) if from_files else stored.HASHED,
            "fingerprint": encoder.fingerprint,
            "settings": dataclasses.asdict(encoder.settings),
        }
        by_vectors["vectors"] = {"dtype": recipe.dtype, "dimensions": encoder.dimensions}
    return {
        "format": stored.FORMAT,
        "corpus": {"path": corpus.path, "sha256": corpus.sha256, "rows": len(corpus)},
        **by_vectors,
        "parts": {name: {} for name in recipe.parts},
        "memory_bytes": recipe.memory_bytes,
        "target_recall": recipe.target_recall,
    }


def check(directory: pathlib.Path, plan: dict[str, Any]) -> bool:
    """Whether the directory holds the planned index, whole or begun; a plan's absent keys are not compared.

    Corpus and encoder are compared by their hashes: they may have moved.

    Raises: ValueError where it holds another index, or the beginning of one, naming what differs.
    """
    for name in (stored.MANIFEST, stored.PLANNED):
        if not (directory / name).exists():
            continue
        held = stored.without_paths(files.read_json(directory / name, stored.REMEDY))
        for key, value in stored.without_paths(plan).items():
            of_held = {name: {} for name in held[key]} if key == "parts" else held.get(key)
            if of_held != value:
                what = "an index" if name == stored.MANIFEST else "the beginning of an index"
                raise ValueError(
                    f"{directory} holds {what} whose {key} is {of_held}, not {value}; name another --index, or remove"
                    " that one"
                )
        return True
    return False


def build(
    recipe: Recipe,
    corpus: corpora.Corpus,
    encoder: vector_files.KnownEncoder | None,
    directory: pathlib.Path,
    queries: Sequence[str],
    progress: part.Progress,
) -> bool:
    """Makes what is missing of an index, each stage by all processes together; returns whether anything was.

    Args:
      encoder: as `make_encoder` made it.
      queries: that parts are tuned and measured on.
    Raises: ValueError where `check` does.
    """
    encoder = fitted(encoder, corpus, directory, progress)
    manifest = planned(recipe, corpus, encoder)
    _together(lambda: check(directory, manifest))  # all have looked before the first one writes
    if (directory / stored.MANIFEST).exists() and not (directory / stored.PLANNED).exists():
        return False  # a build that is killed at its very end leaves the plan behind

    def claim() -> None:
        if not check(directory, manifest):
            files.write_json(directory / stored.PLANNED, manifest)
        keep(encoder, corpus, directory)

    def embed_share() -> None:
        if encoder is not None:
            vector_files.embed_corpus(
                encoder,
                corpus,
                directory / "vectors",
                dtype=recipe.dtype,
                process=jax.process_index(),
                processes=jax.process_count(),
                progress=lambda rows: progress("embedding", rows, len(corpus)),
            )

    def finish() -> None:
        limits = recipe.memory_bytes, recipe.target_recall
        making = part.Making(directory, corpus, encoder, queries, *limits, progress)
        for name, row in parts_lib.PARTS.items():
            if name in recipe.parts and row.build is not None:
                manifest["parts"][name] = row.build(making)
        manifest["made_with"] = made_with = {}
        for package in ("jax", *(package for row in parts_lib.PARTS.values() for package in row.packages)):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                made_with[package] = importlib.metadata.version(package)
        files.write_json(directory / stored.MANIFEST, manifest)
        (directory / stored.PLANNED).unlink(missing_ok=True)

    _together(lambda: parallel.is_first() and claim())
    _together(embed_share)
    _together(lambda: parallel.is_first() and finish())
    return True


def _together(stage: Callable[[], object]) -> None:
    """Does a stage in every process, and goes on when all have; where it fails in one it fails in all."""
    failure = None
    try:
        stage()
    except Exception as error:
        failure = error
    told = parallel.gather(failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if others := [text for text in told if text]:
        raise OSError(f"another process failed: {others[0]}")


def sample_queries(corpus: corpora.Corpus, *, count: int, words: int = 10) -> list[str]:
    """Stretches of passages, the same ones each time, for measuring where there are no questions.

    Two at least, for one is chosen by and another judged by; of a single passage both.
    """
    rng = np.random.default_rng(0)
    queries = []
    for row in rng.choice(len(corpus), size=max(2, min(count, len(corpus))), replace=len(corpus) < 2):
        text = corpus[int(row)].text.split() or corpus.contents(int(row)).split()
        start = rng.integers(max(1, len(text) - words + 1))
        queries.append(" ".join(text[start : start + words]))
    return queries
