r"""Serves searches over HTTP, in the protocol that trainers of the Search-R1 family speak.

python -m searchr1_jax.serve --index=indexes/wiki --port=8000
python -m searchr1_jax.serve --online=brave --cache=web.sqlite

POST /retrieve {"queries": [str], "topk": int, "return_scores": bool}, GET /health, GET /metrics. It answers once it is
warm; on SIGTERM or Ctrl-C it still gives the answers it owes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.retrieval import cache
from searchr1_jax.retrieval import online
from searchr1_jax.retrieval import server
from searchr1_jax.retrieval import stored
from searchr1_jax.run import command
from searchr1_jax.run import metrics

_FLAGS = command.define_index_flags()
_ONLINE = flags.DEFINE_enum("online", "", ["", *online.ENGINES], "a search engine of the web instead")
_CACHE = flags.DEFINE_string("cache", "", "SQLite file in which answers are kept and looked up")
_REPLAY = flags.DEFINE_bool("replay", False, "answer from --cache alone")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 for all")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen at", lower_bound=1, upper_bound=65535)
_TOPK = flags.DEFINE_integer("topk", 3, "passages a query, where a request does not say")
_THREADS = flags.DEFINE_integer("threads", 4, "searches at once")
_BATCH = flags.DEFINE_integer("batch_queries", 64, "most queries of several requests that are searched together")
_WAIT = flags.DEFINE_float("batch_wait_ms", 0.0, "how long a request waits for others; 0: never")


def main(argv):
    del argv
    command.quiet_libraries()
    command.use_compilation_cache()
    if bool(_FLAGS.index.value) == bool(_ONLINE.value):
        raise ValueError("say what to serve: --index=DIRECTORY or --online=ENGINE, one of them")
    if _REPLAY.value and not _CACHE.value:
        raise ValueError("--replay answers from a cache alone; name it with --cache")
    settings = server.Settings(
        topk=_TOPK.value, threads=_THREADS.value, batch_queries=_BATCH.value, batch_wait_ms=_WAIT.value
    )
    retriever, about = _engine()
    if _ONLINE.value or _REPLAY.value:  # searches cost money, or have no answer; and there is nothing to warm
        settings = dataclasses.replace(settings, warm_queries=())
    metrics.say(f"serving {about['identity']} at http://{_HOST.value}:{_PORT.value}/retrieve")
    server.serve(retriever, host=_HOST.value, port=_PORT.value, settings=settings, info=about)


def _engine() -> tuple[retrieval.Retriever, dict[str, Any]]:
    """What answers, and what /health tells of it."""
    if _ONLINE.value:
        about = {"identity": _ONLINE.value}
        opened = lambda: online.OnlineRetriever(_ONLINE.value, timeout_s=30.0, attempts=4, backoff_s=1.0)
    else:
        directory, search = _FLAGS.index.value, _FLAGS.search.value
        manifest = stored.read_manifest(directory)
        about = {
            "identity": stored.identity(
                directory,
                search=search,
                reranker=_FLAGS.reranker.value,
                candidates=_FLAGS.candidates.value,
                rows_dtype=_FLAGS.rows_dtype.value,
            ),
            "passages": manifest["corpus"]["rows"],
            "search": search or stored.default_search(manifest),
        }
        opened = _FLAGS.open
    retriever = None if _REPLAY.value else opened()
    if _CACHE.value:
        mode = "replay" if _REPLAY.value else "record"
        retriever = cache.QueryCache(retriever, _CACHE.value, mode, identity=about["identity"])
    return retriever, about


if __name__ == "__main__":
    command.run(main, required=())
