r"""Serves searches over HTTP, in the protocol that trainers of the Search-R1 family speak.

python -m searchr1_jax.serve --index=indexes/wiki --port=8000
python -m searchr1_jax.serve --online=brave --cache=web.sqlite
python -m searchr1_jax.serve --index=package.module:function --corpus=corpus.jsonl

POST /retrieve {"queries": [str], "topk": int, "return_scores": bool}, GET /health, GET /metrics. It answers once it is
warm; on SIGTERM or Ctrl-C it still gives the answers it owes.
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Any

from absl import flags

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.retrieval import base as retrieval, cache as caches, online as online_lib, server, stored
from searchr1_jax.run import command, index_flags, metrics, retrievers


def run(
    *,
    index: str = "",
    online: str = "",
    cache: str = "",
    replay: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: server.Settings = server.Settings(),
    workdir: str | os.PathLike = ".",
    **how: Any,
) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
      index: what settings.Retriever.index may be: a directory, "package.module:function", "auto", …
      online: a key of online.ENGINES, instead.
      cache: SQLite file in which answers are kept and looked up; with `replay` they come from it alone.
      how: more arguments of `stored.open_index`; others than a built index are given those that are settings, and the
        corpus as data.corpus.
    Raises: ValueError where it is not said what to serve, or it is not there.
    """
    if bool(index) == bool(online):
        raise ValueError("say what to serve: --index=DIRECTORY or --online=ENGINE, one of them")
    if replay and not cache:
        raise ValueError("--replay answers from a cache alone; name it with --cache")
    opened, about = _engine(index, online, pathlib.Path(workdir), how)
    retriever = None if replay else opened()
    if cache:
        retriever = caches.QueryCache(retriever, cache, identity=about["identity"])
    assert retriever is not None  # a replay has a cache
    if online or replay:  # searches cost money, or have no answer; and there is nothing to warm
        settings = dataclasses.replace(settings, warm_queries=())
    metrics.say(f"serving {about['identity']} at http://{host}:{port}/retrieve")
    server.serve(retriever, host=host, port=port, settings=settings, info=about)


def _engine(
    index: str, online: str, workdir: pathlib.Path, how: dict[str, Any]
) -> tuple[Callable[[], retrieval.Retriever], dict[str, Any]]:
    """What opens the search engine, and what /health tells of it."""
    keys = {"retriever.url": online, "retriever.index": index, "data.corpus": how.get("corpus")}
    keys |= {f"retriever.{name}": value for name, value in how.items() if name not in ("corpus", "encoder")}
    settings = settings_lib.Settings().replace({key: value for key, value in keys.items() if value})
    kind = retrievers.kind_of(settings)
    about: dict[str, Any] = {"identity": kind.identity(settings, workdir)}
    if kind is not retrievers.KINDS["built"]:
        if how.get("encoder"):
            raise ValueError(
                f"--encoder={how['encoder']} is of a built index, which {index or online} is not; leave it out"
            )
        return lambda: kind.open(settings, workdir), about
    manifest = stored.read_manifest(index)
    about["passages"] = manifest["corpus"]["rows"]
    about["search"] = settings.retriever.search or stored.default_search(manifest)
    return lambda: stored.open_index(index, **how), about


def define() -> None:
    index_flags.define()
    default = server.Settings
    flags.DEFINE_enum("online", "", ["", *online_lib.ENGINES], "a search engine of the web instead")
    flags.DEFINE_string("cache", "", "SQLite file in which answers are kept and looked up")
    flags.DEFINE_bool("replay", False, "answer from --cache alone")
    flags.DEFINE_string("workdir", ".", "where a retriever of your own looks for relative paths first")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 for all")
    flags.DEFINE_integer("port", 8000, "port to listen at", lower_bound=1, upper_bound=65535)
    flags.DEFINE_integer("topk", default.topk, "passages a query, where a request does not say")
    flags.DEFINE_integer("threads", default.threads, "searches at once")
    flags.DEFINE_integer("batch_queries", default.batch_queries, "most queries of requests that are searched together")
    flags.DEFINE_float("batch_wait_ms", default.batch_wait_ms, "how long a request waits for others; 0: never")


def main() -> None:
    command.use_compilation_cache()
    limits = command.values("topk", "threads", "batch_queries", "batch_wait_ms")
    others = command.values("online", "cache", "replay", "host", "port", "workdir")
    run(index=flags.FLAGS.index or "", settings=server.Settings(**limits), **others, **index_flags.how())


if __name__ == "__main__":
    command.run(main, define, required=())
