"""An index on disk, as `building` makes it, opened as a Retriever.

    DIRECTORY/manifest.json   what it was made of and how well it finds; written last: without it there is no index
              encoder/        inverse document frequencies, where the encoder is our hashed n-grams
              vectors/        of the passages: for "scann" and "exact"
              scann/  bm25/

    manifest ─ corpus, encoder: are they those? ─▶ rankers of the parts, fused, reranked ─▶ LocalRetriever

The corpus stays where it is. Corpus and encoder must be those that the index was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from searchr1_jax.retrieval import bm25
from searchr1_jax.retrieval import corpus as corpora
from searchr1_jax.retrieval import embed
from searchr1_jax.retrieval import exact_index
from searchr1_jax.retrieval import local
from searchr1_jax.retrieval import rankers
from searchr1_jax.retrieval import rerank
from searchr1_jax.retrieval import scann_index
from searchr1_jax.retrieval import text_encoder
from searchr1_jax.retrieval import vectors as vector_files

FORMAT = 1
MANIFEST, PLANNED = "manifest.json", "planned.json"
BY_VECTORS = ("scann", "exact")
PARTS = (*BY_VECTORS, "bm25")
SEARCHES = (*PARTS, "hybrid")  # hybrid: by words and by vectors, fused
HASHED = "hashed"  # the encoder that needs no files
_SEARCHED_BY = ("leaves_searched", "rescored")  # of what is measured: how ScaNN is asked


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
      ValueError: where there is no whole index, or one of another format.
    """
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        begun = (path.parent / PLANNED).exists()
        raise ValueError(
            f"{directory} holds {'the beginning of an index; finish it' if begun else 'no index; make it'} with"
            " python -m searchr1_jax.index build"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, and this version reads {FORMAT}; build it again")
    return manifest


def default_search(manifest: dict[str, Any]) -> str:
    """Hybrid where it can be, else the part there is (ScaNN before exact search)."""
    parts = manifest["parts"]
    if "bm25" in parts and len(parts) > 1:
        return "hybrid"
    return next(part for part in PARTS if part in parts)


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
      search: of SEARCHES; empty: `default_search`.
      corpus, encoder: where these are now, if no longer where the manifest says.
      reranker: Hugging Face directory or hub id of a cross-encoder that orders the best `candidates` anew.
      rows_dtype: of the vectors that exact search holds, float32, bfloat16 or int8; empty: as they are on disk.
    Raises:
      ValueError: where a part is missing, or corpus or encoder are not those it was made from, with both values.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    search = search or default_search(manifest)
    parts = manifest["parts"]
    if search not in SEARCHES:
        raise ValueError(f"search {search!r} is unknown; choose from {list(SEARCHES)}")
    dense = next((part for part in BY_VECTORS if part in parts), None)  # any vectors can be searched exactly
    lacks_words = search in ("bm25", "hybrid") and "bm25" not in parts
    lacks_vectors = search != "bm25" and dense is None or search == "scann" and "scann" not in parts
    if lacks_words or lacks_vectors:
        raise ValueError(
            f"search {search!r} is not possible: {directory} holds {sorted(parts)}; build it with the parts it needs"
        )
    opened = _open_corpus(manifest["corpus"], corpus, directory)
    found = []
    if search in ("bm25", "hybrid"):
        found.append(bm25.BM25Ranker(directory / "bm25"))
    if search != "bm25":
        kind = dense if search == "hybrid" else search
        found.append(_by_vectors(manifest, directory, kind, encoder, rows_dtype))
    ranker = found[0] if len(found) == 1 else rankers.Fused(found)
    if reranker:
        ranker = rerank.Reranked(ranker, rerank.CrossEncoder(reranker), opened, candidates)
    return local.LocalRetriever(opened, ranker)


def identity(
    directory: str | os.PathLike, *, search: str = "", reranker: str = "", candidates: int = 50, rows_dtype: str = ""
) -> str:
    """Names what answers, for caches: the same for the same answers, wherever and however fast they are found."""
    manifest = read_manifest(directory)
    made = without_paths(manifest) | {"made_with": None}
    if measured := made["parts"].get("scann"):
        made["parts"] = made["parts"] | {"scann": {name: measured[name] for name in _SEARCHED_BY}}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    reranked = f"{reranker} over {candidates}" if reranker else ""
    searched = [search or default_search(manifest), reranked, rows_dtype]
    return " ".join(filter(None, [f"index {digest[:16]}", *searched]))


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


def _by_vectors(
    manifest: dict[str, Any], directory: pathlib.Path, kind: str, encoder: str, rows_dtype: str
) -> rankers.ByVectors:
    opened = _open_encoder(manifest["encoder"], directory, encoder)
    if kind == "exact":
        vectors = vector_files.open_vectors(directory / "vectors")
        dtype = rows_dtype or manifest["vectors"]["dtype"]
        return rankers.ByVectors(opened, exact_index.ExactIndex(vectors, dtype=dtype))
    measured = manifest["parts"]["scann"]
    index = scann_index.ScannIndex.load(directory / "scann", **{name: measured[name] for name in _SEARCHED_BY})
    return rankers.ByVectors(opened, index)


def without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """Where corpus and encoder lay makes no difference to an index."""
    return {
        key: {name: v for name, v in value.items() if name != "path"} if isinstance(value, dict) else value
        for key, value in manifest.items()
    }


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of an index. Raises: ValueError where it is broken."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); remove {path.parent} and build the index again") from error


def hashed_encoder(directory: pathlib.Path, dimensions: int) -> embed.HashedNgramEncoder:
    """The n-gram encoder whose frequencies an index's directory keeps."""
    return embed.HashedNgramEncoder(dimensions=dimensions, idf=np.load(directory / "encoder" / "idf.npy"))


def _open_encoder(record: dict[str, Any], directory: pathlib.Path, path: str) -> vector_files.KnownEncoder:
    settings, path = dict(record["settings"]), path or record["path"]
    if record["path"] == HASHED:
        encoder = hashed_encoder(directory, settings["dimensions"])
    else:
        settings.pop("lower_case")  # stated by the encoder's own files
        if path == record["path"] and not os.path.exists(path):
            raise ValueError(
                f"the encoder of {directory} was {path}, which does not exist; say where it is (--encoder)"
            )
        encoder = text_encoder.TextEncoder(path, **settings)
    if encoder.fingerprint != record["fingerprint"]:
        raise ValueError(
            f"{directory} was made with the encoder {record['fingerprint']} ({record['path']}), but {path} is"
            f" {encoder.fingerprint}; name the right one (--encoder), or build the index again"
        )
    return encoder
