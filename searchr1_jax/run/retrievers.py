"""Which search engine a config names: a server, one of the web, a built index, or one made at the start.

settings.retriever ─ url? ─▶ RemoteRetriever, OnlineRetriever      ┐
                 ─ index ─▶ stored.open_index, local.build       ┴─ cache? ─▶ QueryCache
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.retrieval import base
from searchr1_jax.retrieval import cache
from searchr1_jax.retrieval import corpus as corpora
from searchr1_jax.retrieval import local
from searchr1_jax.retrieval import online
from searchr1_jax.retrieval import remote
from searchr1_jax.retrieval import scann_index
from searchr1_jax.retrieval import stored
from searchr1_jax.run import run_directory


def make(settings: settings_lib.Settings, workdir: pathlib.Path) -> base.Retriever:
    """What the config names, behind a cache of queries where it asks for one.

    Raises:
      ValueError: where what it names is not there, or is not what a cache was recorded with.
    """
    c = settings.retriever
    if c.cache == "off":
        return _engine(settings, workdir)
    if jax.process_count() > 1:
        raise ValueError(
            f"retriever.cache is {c.cache!r} with {jax.process_count()} processes; a cache is one process's: set it to"
            ' "off", or let a retrieval server keep it (python -m searchr1_jax.serve --cache=…)'
        )
    engine = _engine(settings, workdir) if c.cache == "record" else None
    return cache.QueryCache(engine, workdir / c.cache_file, c.cache, identity=_identity(settings, workdir))


def _identity(settings: settings_lib.Settings, workdir: pathlib.Path) -> str:
    """Names what answers the config's queries."""
    c = settings.retriever
    if c.url:
        return c.url
    if _is_built(c.index):
        return stored.identity(c.index, **_how(c))
    corpus = corpora.Corpus(run_directory.find(settings.data.corpus, workdir, "data.corpus"), workdir / "data")
    return f"corpus {corpus.sha256[:16]} {c.index} {c.dimensions}"


def _how(c: settings_lib.Retriever) -> dict[str, Any]:
    """How a built index is searched."""
    return dict(search=c.search, reranker=c.reranker, candidates=c.candidates, rows_dtype=c.rows_dtype)


def _is_built(index: str) -> bool:
    return index not in ("auto", *local.INDEX_KINDS)


def _engine(settings: settings_lib.Settings, workdir: pathlib.Path) -> base.Retriever:
    """A server or an engine of the web, after a first search; or an index in this process."""
    c = settings.retriever
    unread = [f"retriever.{key}" for key in ("search", "reranker", "rows_dtype") if getattr(c, key)]
    if unread and not c.url and not _is_built(c.index):
        raise ValueError(
            f"{', '.join(unread)} is of a built index, and retriever.index is {c.index!r}; leave it empty, or name a"
            " directory that searchr1_jax.index built"
        )
    if c.url:
        kind = online.OnlineRetriever if c.url in online.ENGINES else remote.RemoteRetriever
        client = kind(c.url, timeout_s=c.timeout_s, attempts=c.attempts, backoff_s=c.backoff_s)
        client.check()
        return client
    if _is_built(c.index):
        return stored.open_index(c.index, **_how(c))
    corpus, index = run_directory.find(settings.data.corpus, workdir, "data.corpus"), c.index
    if index == "auto":
        index = "scann" if scann_index.available() else "exact"
    return local.build(corpus, index=index, dimensions=c.dimensions, cache_dir=workdir / "data")
