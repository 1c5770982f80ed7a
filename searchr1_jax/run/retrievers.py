"""Which search engine the settings name, the first of KINDS that holds, behind a cache of queries if they ask for one.

    a search engine of the web, a server          retriever.url
    made at the start, the user's own, built      retriever.index

A user's own is "package.module:function", called with the settings and the workdir; it returns a `base.Retriever`. For
the cache of queries it is known by that name and, where the function has an attribute `identity`, by what that returns
for the same two arguments: whatever else its answers depend on, such as the corpus' hash.
"""

from collections.abc import Callable
import pathlib
import re
from typing import Any, NamedTuple

import jax

from searchr1_jax.core import names, settings as settings_lib
from searchr1_jax.retrieval import base, cache, corpus as corpora, local, online, parts, remote, stored
from searchr1_jax.run import run_directory


class Kind(NamedTuple):
    """One way to name a search engine."""

    holds: Callable[[settings_lib.Retriever], bool]  # whether it is named in this way
    identity: Callable[[settings_lib.Settings, pathlib.Path], str]  # names what answers, without opening it
    open: Callable[[settings_lib.Settings, pathlib.Path], base.Retriever]


def make(settings: settings_lib.Settings, workdir: pathlib.Path) -> base.Retriever:
    """What the settings name, behind a cache of queries where they ask for one.

    Raises: ValueError where what they name is not there, or is not what a cache was recorded with.
    """
    c, kind = settings.retriever, kind_of(settings)
    if c.cache == "off":
        return kind.open(settings, workdir)
    if jax.process_count() > 1:
        raise ValueError(
            f"retriever.cache is {c.cache!r} with {jax.process_count()} processes; a cache is one process's: set it to"
            ' "off", or let a retrieval server keep it (python -m searchr1_jax.serve --cache=…)'
        )
    engine = kind.open(settings, workdir) if c.cache == "record" else None
    return cache.QueryCache(engine, workdir / c.cache_file, identity=kind.identity(settings, workdir))


def kind_of(settings: settings_lib.Settings) -> Kind:
    """How the settings name their search engine."""
    return next(kind for kind in KINDS.values() if kind.holds(settings.retriever))


def _client(kind: Callable[..., Any]) -> Callable[[settings_lib.Settings, pathlib.Path], base.Retriever]:
    """A client of what answers at retriever.url, after a first search."""

    def opened(settings, workdir):
        c = settings.retriever
        client = kind(c.url, timeout_s=c.timeout_s, attempts=c.attempts, backoff_s=c.backoff_s)
        client.search(["test"], 1)
        return client

    return opened


def _at_the_start(settings: settings_lib.Settings, workdir: pathlib.Path) -> base.Retriever:
    c = settings.retriever
    if unread := [f"retriever.{key}" for key in ("search", "reranker", "rows_dtype") if getattr(c, key)]:
        raise ValueError(
            f"{', '.join(unread)} is of a built index, and retriever.index is {c.index!r}; leave it empty, or name a"
            " directory that searchr1_jax.index built"
        )
    corpus = run_directory.find(settings.data.corpus, workdir, "data.corpus")
    return local.build(corpus, index=c.index, dimensions=c.dimensions, cache_dir=workdir / "data")


def _identity_at_the_start(settings: settings_lib.Settings, workdir: pathlib.Path) -> str:
    c = settings.retriever
    corpus = corpora.Corpus(run_directory.find(settings.data.corpus, workdir, "data.corpus"), workdir / "data")
    return f"corpus {corpus.sha256[:16]} {c.index} {c.dimensions}"


def _function(settings: settings_lib.Settings) -> Any:
    """The user's own. Raises: ValueError where it cannot be imported."""
    return names.resolve(settings.retriever.index, parts.IN_MEMORY, "retriever.index")


def _own(settings: settings_lib.Settings, workdir: pathlib.Path) -> base.Retriever:
    made = _function(settings)(settings, workdir)
    if not callable(getattr(made, "search", None)):
        raise ValueError(
            f"retriever.index is {settings.retriever.index!r}, which returned {made!r}; it has to return a Retriever,"
            " with a method search(queries, k)"
        )
    return made


def _identity_of_own(settings: settings_lib.Settings, workdir: pathlib.Path) -> str:
    identity = getattr(_function(settings), "identity", None)
    name = settings.retriever.index
    return name if identity is None else f"{name} {identity(settings, workdir)}"


def _built(settings: settings_lib.Settings) -> dict[str, Any]:
    """Which index on disk, and how it is searched."""
    c = settings.retriever
    how = dict(search=c.search, reranker=c.reranker, candidates=c.candidates, rows_dtype=c.rows_dtype)
    return {"directory": c.index, **how}


_url = lambda settings, _: settings.retriever.url
KINDS = {
    "of the web": Kind(lambda c: c.url in online.ENGINES, _url, _client(online.OnlineRetriever)),
    "a server": Kind(lambda c: bool(c.url), _url, _client(remote.RemoteRetriever)),
    "made at the start": Kind(lambda c: c.index in ("auto", *parts.IN_MEMORY), _identity_at_the_start, _at_the_start),
    "own": Kind(lambda c: re.fullmatch(r"[\w.]+:\w+", c.index) is not None, _identity_of_own, _own),
    "built": Kind(
        lambda c: True, lambda s, _: stored.identity(**_built(s)), lambda s, _: stored.open_index(**_built(s))
    ),
}
