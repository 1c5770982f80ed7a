"""An index on disk, as `building` makes it, opened as a Retriever.

    DIRECTORY/manifest.json   what it was made of and how well it finds; written last: without it there is no index
              encoder/        inverse document frequencies, where the encoder is our hashed n-grams
              vectors/        of the passages: for parts that need them
              scann/  bm25/   of the parts, see `parts.PARTS`

    manifest ─ corpus, encoder: are they those? ─▶ rankers of the parts, fused, reranked ─▶ LocalRetriever

The corpus stays where it is. Corpus and encoder must be those that the index was made from.
"""

from collections.abc import Collection
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from searchr1_jax.core import files
from searchr1_jax.retrieval import (
    corpus as corpora,
    embed,
    local,
    part,
    parts as parts_lib,
    rankers,
    rerank,
    text_encoder,
    vectors as vector_files,
)

FORMAT = 1
MANIFEST, PLANNED = "manifest.json", "planned.json"
REMEDY = "remove the index and build it again"  # where a file of it is broken
HYBRID = "hybrid"  # a search by words and by vectors, fused
HASHED = "hashed"  # the encoder that needs no files


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an index. Raises: ValueError where there is no whole index, or one of another format."""
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        begun = (path.parent / PLANNED).exists()
        raise ValueError(
            f"{directory} holds {'the beginning of an index; finish it' if begun else 'no index; make it'} with"
            " python -m searchr1_jax.index build"
        )
    manifest = files.read_json(path, REMEDY)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, and this version reads {FORMAT}; build it again")
    return manifest


def default_search(manifest: dict[str, Any]) -> str:
    """Hybrid where it can be, else the part there is, the first of PARTS."""
    parts = manifest["parts"]
    return HYBRID if asked(HYBRID, parts) else next(name for name in parts_lib.PARTS if name in parts)


def asked(search: str, parts: Collection[str]) -> list[str]:
    """The parts that a search asks of an index that has these; none where it is not possible."""
    held = [name for name in parts_lib.PARTS if name in parts]
    by_vectors = [name for name in held if name in parts_lib.BY_VECTORS]
    by_words = [name for name in held if name not in parts_lib.BY_VECTORS]
    if search == HYBRID:
        return [*by_words, by_vectors[0]] if by_words and by_vectors else []
    alone = parts_lib.PARTS[search].build is None and by_vectors  # it needs the vectors and nothing else
    return [search] if search in held or alone else []


def open_index(
    directory: str | os.PathLike,
    *,
    search: str = "",
    corpus: str = "",
    encoder: str = "",
    reranker: str = "",
    candidates: int = 50,
    rows_dtype: str = "",
) -> local.LocalRetriever:
    """The index as a Retriever.

    Args:
      search: one of PARTS or HYBRID; empty: `default_search`.
      corpus, encoder: where these are now, if no longer where the manifest says.
      reranker: Hugging Face directory or hub id of a cross-encoder that orders the best `candidates` anew.
      rows_dtype: of the vectors that exact search holds, float32, bfloat16 or int8; empty: as they are on disk.
    Raises: ValueError where a part is missing, or corpus or encoder are not those it was made from, with both values.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    search = search or default_search(manifest)
    parts = manifest["parts"]
    if search != HYBRID and search not in parts_lib.PARTS:
        raise ValueError(f"search {search!r} is unknown; choose from {[*parts_lib.PARTS, HYBRID]}")
    names = asked(search, parts)
    if not names:
        raise ValueError(
            f"search {search!r} is not possible: {directory} holds {sorted(parts)}; build it with the parts it needs"
        )
    opened = _open_corpus(manifest["corpus"], corpus, directory)
    opened_encoder = lambda: _open_encoder(manifest["encoder"], directory, encoder)
    opening = part.Opening(directory=directory, parts=parts, encoder=opened_encoder, rows_dtype=rows_dtype)
    found = [parts_lib.PARTS[name].open(opening) for name in names]
    ranker = found[0] if len(found) == 1 else rankers.Fused(found)
    if reranker:
        ranker = rerank.Reranked(ranker, rerank.CrossEncoder(reranker), opened, candidates)
    return local.LocalRetriever(opened, ranker)


def identity(
    directory: str | os.PathLike, *, search: str = "", reranker: str = "", candidates: int = 50, rows_dtype: str = ""
) -> str:
    """Names what answers, for caches: the same for the same answers, wherever and however fast they are found."""
    manifest = read_manifest(directory)
    parts = {name: parts_lib.PARTS[name].identity(record) for name, record in manifest["parts"].items()}
    made = without_paths(manifest) | {"made_with": None, "parts": parts}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    reranked = f"{reranker} over {candidates}" if reranker else ""
    return " ".join(filter(None, [f"index {digest[:16]}", search or default_search(manifest), reranked, rows_dtype]))


def _open_corpus(record: dict[str, Any], path: str, directory: pathlib.Path) -> corpora.Corpus:
    path = path or record["path"]
    if not os.path.exists(path):
        raise ValueError(f"the corpus of {directory} was {path}, which does not exist; say where it is (--corpus)")
    corpus = corpora.Corpus(path, directory)
    if (corpus.sha256, len(corpus)) != (record["sha256"], record["rows"]):
        raise ValueError(
            f"{directory} was made from a corpus of {record['rows']} rows with SHA-256 {record['sha256']}, but {path}"
            f" has {len(corpus)} rows and {corpus.sha256}; name the right one (--corpus), or build the index again"
        )
    return corpus


def without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """Where corpus and encoder lay makes no difference to an index."""
    return {
        key: {name: v for name, v in value.items() if name != "path"} if isinstance(value, dict) else value
        for key, value in manifest.items()
    }


def hashed_encoder(directory: pathlib.Path, dimensions: int) -> embed.HashedNgramEncoder:
    """The n-gram encoder whose frequencies an index's directory keeps."""
    return embed.HashedNgramEncoder(dimensions=dimensions, idf=np.load(directory / "encoder" / "idf.npy"))


def _open_encoder(record: dict[str, Any], directory: pathlib.Path, path: str) -> vector_files.KnownEncoder:
    settings, path = record["settings"], path or record["path"]
    if record["path"] == HASHED:
        encoder = hashed_encoder(directory, settings["dimensions"])
    elif path == record["path"] and not os.path.exists(path):
        raise ValueError(f"the encoder of {directory} was {path}, which does not exist; say where it is (--encoder)")
    else:
        encoder = text_encoder.TextEncoder(path, **settings)
    if encoder.fingerprint != record["fingerprint"]:
        raise ValueError(
            f"{directory} was made with the encoder {record['fingerprint']} ({record['path']}), but {path} is"
            f" {encoder.fingerprint}; name the right one (--encoder), or build the index again"
        )
    return encoder
