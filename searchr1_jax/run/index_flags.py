"""The flags that `index` and `serve` share: which index it is, and how it is searched."""

from typing import Any

from absl import flags

from searchr1_jax.retrieval import exact_index, parts, stored
from searchr1_jax.run import command


def define() -> None:
    flags.DEFINE_string("index", None, 'directory of an index; to serve also "module:function", or "auto" of --corpus')
    flags.DEFINE_string("corpus", "", 'jsonl file, {"id", "contents"} a line; of a built index: where it is now')
    flags.DEFINE_string(
        "encoder", "", "directory or hub id of a BERT-family encoder; of a built index: where it is now"
    )
    flags.DEFINE_enum("search", "", ["", *parts.PARTS, stored.HYBRID], "how to search; default: hybrid where it can be")
    flags.DEFINE_string("reranker", "", "directory or hub id of a cross-encoder that reorders what was found")
    flags.DEFINE_integer("candidates", 50, "passages that it orders", lower_bound=1)
    flags.DEFINE_enum("rows_dtype", "", ["", *exact_index.DTYPES], "of the rows of exact search; default: as on disk")


def how() -> dict[str, Any]:
    """The arguments of `stored.open_index` but for the directory."""
    return command.values("corpus", "encoder", "search", "reranker", "candidates", "rows_dtype")
