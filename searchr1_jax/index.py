r"""Makes an index of a corpus, says what it is, and tries it.

python -m searchr1_jax.index build --index=indexes/wiki --corpus=wiki-18.jsonl --encoder=intfloat/e5-base-v2 --dry_run
python -m searchr1_jax.index build --index=indexes/wiki --corpus=wiki-18.jsonl --encoder=intfloat/e5-base-v2 \
    --query_prefix="query: " --passage_prefix="passage: " --max_tokens=256
python -m searchr1_jax.index info --index=indexes/wiki
python -m searchr1_jax.index query --index=indexes/wiki "who wrote Emma?" "who wrote Persuasion?"

A build says first what it will take, shows how far it is, can be killed at any moment, and goes on when it is started
again; the index is there when its manifest is. Several processes (--distributed) share the embedding.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import time
from typing import Any

from absl import flags
import jax
import numpy as np
import psutil
from rich import console as rich_console, table as rich_table

from searchr1_jax.core import parallel, types
from searchr1_jax.retrieval import building, corpus as corpora, part, parts, stored, text_encoder, vectors
from searchr1_jax.run import command, index_flags, metrics

VERBS = ("build", "info", "query")
TUNED_ON = 1000  # queries
FITTING_SHARE = 1.3  # seconds of counting n-grams over those of embedding by them
_TRIED = 128  # passages, from which time and size are estimated
_CONSOLE = rich_console.Console(highlight=False, soft_wrap=True)


def build(
    directory: str | os.PathLike,
    corpus: str | os.PathLike,
    recipe: building.Recipe,
    *,
    queries: str | os.PathLike = "",
    rows_dtype: str = "",
    dry_run: bool = False,
) -> None:
    """Says what the index will take, then makes what is missing of it, unless this is a dry run.

    Args:
      corpus, queries: jsonl files of passages and of questions to tune on; without these stretches of passages.
      rows_dtype: of the rows that exact search will hold, for the estimate; empty: as on disk.
    Raises: ValueError for a broken corpus or questions, another index in the directory, or too little room; ImportError
      where a part cannot be made on this machine.
    """
    directory = pathlib.Path(directory)
    for name in [] if dry_run else recipe.parts:
        parts.PARTS[name].check()
    with metrics.Progress(os.path.getsize(corpus), what="reading the corpus") as bar:
        passages = corpora.Corpus(corpus, directory, progress=bar.reach)
    tuned_on = _read_questions(queries) if queries else building.sample_queries(passages, count=TUNED_ON)
    encoder = building.make_encoder(recipe)
    manifest = building.planned(recipe, passages, encoder)
    if recipe.hashed:
        manifest.pop("encoder")  # known once it is fitted
    building.check(directory, manifest)
    embedding_s = None if encoder is None else _embedding_s(recipe, passages, encoder)
    dimensions = 0 if encoder is None else encoder.dimensions
    planned = plan(recipe, len(passages), dimensions, corpus=passages, rows_dtype=rows_dtype, embedding_s=embedding_s)
    show(planned)
    _check_room(planned, directory)
    if dry_run:
        return
    began = time.time()
    with _bars() as progress:
        made = building.build(recipe, passages, encoder, directory, tuned_on, progress)
    if not made:
        metrics.say(f"{directory} is this index already, and whole")
        return
    for name, record in stored.read_manifest(directory)["parts"].items():
        if "recall_at_3" in record:
            metrics.say(
                f"{name}: recall@3 {record['recall_at_3']:.3f}, recall@10 {record['recall_at_10']:.3f},"
                f" {record['queries_per_s']:,.0f} queries/s on one thread ({record['queries']} queries)"
            )
    metrics.say(f"{directory}: {len(passages):,} passages, {time.time() - began:,.0f} s")


def plan(
    recipe: building.Recipe,
    rows: int,
    dimensions: int,
    *,
    corpus: corpora.Corpus | None = None,
    rows_dtype: str = "",
    embedding_s: float | None = None,
) -> list[part.Estimate]:
    """What the vectors take, if there are any, and each part; what is already there is not subtracted.

    Args:
      corpus: None where it is not there yet.
      embedding_s: seconds to make the vectors; None: not estimated.
    Raises: ValueError for a part that is planned by the corpus, where there is none.
    """
    if corpus is None and set(recipe.parts) - set(parts.BY_VECTORS):
        raise ValueError(
            f"--rows={rows} plans vectors that are not there yet: give it with --dry_run and --parts of"
            f" {list(parts.BY_VECTORS)}, not {list(recipe.parts)}"
        )
    wanted = part.Wanted(rows, corpus, dimensions, recipe.dtype, rows_dtype, recipe.memory_bytes)
    size = rows * dimensions * vectors.DTYPES[recipe.dtype].itemsize
    embedded = [part.Estimate("vectors", size, 0, 0, embedding_s)] if recipe.needs_vectors else []
    return embedded + [row.plan(wanted) for name, row in parts.PARTS.items() if name in recipe.parts]


def show(planned: Sequence[part.Estimate]) -> None:
    """Prints what the parts of an index will take."""
    table = rich_table.Table("part", "disk", "memory to build", "memory to serve", "time")
    for name, *sizes, seconds in planned:
        table.add_row(name, *(f"{size / 1e9:,.3f} GB" for size in sizes), "" if seconds is None else _duration(seconds))
    if parallel.is_first():
        _CONSOLE.print(table)


def _embedding_s(recipe: building.Recipe, corpus: corpora.Corpus, encoder: vectors.KnownEncoder) -> float:
    """Seconds that the processes will take together, at the speed with some passages."""
    texts = [corpus.contents(int(row)) for row in np.linspace(0, len(corpus) - 1, _TRIED)]
    encoder.encode(texts, "passage")  # compiles
    began = time.perf_counter()
    encoder.encode(texts, "passage")
    seconds = (time.perf_counter() - began) / len(texts) * len(corpus)
    counting = FITTING_SHARE * seconds if recipe.hashed else 0.0  # by every process
    return counting + seconds / jax.process_count()


def _check_room(planned: Sequence[part.Estimate], directory: pathlib.Path) -> None:
    """Raises ValueError where the disk has no room for an index, or the machine too little memory to build it."""
    disk = sum(each.disk_bytes for each in planned)
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = psutil.disk_usage(str(there)).free
    # Already taken; the vectors' file has holes where there are none yet.
    taken = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
    if disk > free + taken:
        raise ValueError(
            f"the index takes {disk / 1e9:,.1f} GB and {there} has {free / 1e9:,.1f} GB free; make room, or name"
            " another --index"
        )
    memory, has = max(each.building_bytes for each in planned), psutil.virtual_memory().total
    if memory > has:
        raise ValueError(
            f"building takes {memory / 1e9:,.1f} GB of memory and this machine has {has / 1e9:,.1f} GB; lower"
            " --memory_gb for scann, leave bm25 out of --parts, or build on a larger one"
        )


@contextlib.contextmanager
def _bars() -> Iterator[part.Progress]:
    """Yields what shows how much of something is done, one bar at a time."""
    with contextlib.ExitStack() as shown:
        bars: dict[str, metrics.Progress] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                shown.close()  # a terminal has room for one
                bars[what] = shown.enter_context(metrics.Progress(total, what=what))
            bars[what].reach(done)

        yield progress


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


def _read_questions(path: str | os.PathLike) -> list[str]:
    """At most TUNED_ON questions of a jsonl file, evenly chosen. Raises: ValueError for fewer than two, or no texts."""
    try:
        lines = [line for line in pathlib.Path(path).read_bytes().split(b"\n") if line.strip()]
        chosen = [lines[int(i)] for i in np.linspace(0, len(lines) - 1, min(TUNED_ON, len(lines)))]
        questions = [json.loads(line)["question"] for line in chosen]
        if not all(isinstance(question, str) for question in questions):
            raise ValueError("a question is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no file of questions, one {{"question": …}} a line ({error!r})') from error
    if len(questions) < 2:
        raise ValueError(f"{path} holds {len(questions)} questions to tune on; give some hundreds, or no --queries")
    return questions


def query(directory: str | os.PathLike, queries: Sequence[str], *, k: int = 3, **how: Any) -> list[list[types.Passage]]:
    """Prints what an index finds, opened by `stored.open_index` with the directory and `how`, and returns it."""
    if not queries:
        raise ValueError('say what to look for: python -m searchr1_jax.index query --index=… "a query" …')
    found = stored.open_index(directory, **how).search(list(queries), k)
    for text, passages in zip(queries, found, strict=True):
        table = rich_table.Table("score", "id", "passage", title=text, title_justify="left")
        for passage in passages:
            table.add_row(f"{passage.score:.4f}", passage.id, f"{passage.title}\n{passage.text}")
        _CONSOLE.print(table)
    return found


def define() -> None:
    index_flags.define()
    default = building.Recipe
    flags.DEFINE_list("parts", [], f"of {', '.join(parts.PARTS)}; default: scann (exact where there is no ScaNN)")
    flags.DEFINE_string("query_prefix", None, "before each query; default: as its files say")
    flags.DEFINE_string("passage_prefix", None, "before each passage")
    flags.DEFINE_enum("pooling", None, text_encoder.POOLINGS, "of token vectors")
    flags.DEFINE_bool("normalize", None, "vectors to length 1")
    flags.DEFINE_integer("max_tokens", None, "of a text; what is longer is cut")
    flags.DEFINE_integer("dimensions", default.dimensions, "of n-gram vectors; with --rows, of any", lower_bound=1)
    flags.DEFINE_enum("dtype", default.dtype, list(vectors.DTYPES), "of the vectors on disk")
    flags.DEFINE_float(
        "memory_gb", default.memory_bytes / 1e9, "that building may take; ScaNN's shards are made to fit"
    )
    flags.DEFINE_float("target_recall", default.target_recall, "recall at 3 that ScaNN's search is tuned to")
    flags.DEFINE_string("queries", "", "jsonl file of questions to tune on; default: stretches of passages")
    flags.DEFINE_bool("dry_run", False, "say what a build would take, and stop")
    flags.DEFINE_integer("rows", None, "with --dry_run, for a corpus: of vectors not there yet", lower_bound=1)
    flags.DEFINE_integer("k", 3, "passages for a query")


def _recipe() -> building.Recipe:
    """What the flags say."""
    given = flags.FLAGS
    settings = command.values("query_prefix", "passage_prefix", "pooling", "normalize", "max_tokens")
    return building.Recipe(
        parts=tuple(given.parts) or (parts.default(),),
        settings={name: value for name, value in settings.items() if value is not None},
        memory_bytes=int(given.memory_gb * 1e9),
        **command.values("encoder", "dimensions", "dtype", "target_recall"),
    )


def main(verb: str = "", *arguments: str) -> None:
    if verb not in VERBS:
        raise ValueError(f"say what to do: python -m searchr1_jax.index {'|'.join(VERBS)} --index=…")
    command.use_compilation_cache()
    given = flags.FLAGS
    if verb == "info":
        _CONSOLE.print_json(json.dumps(stored.read_manifest(given.index)))
    elif verb == "query":
        query(given.index, arguments, k=given.k, **index_flags.how())
    elif given.rows and given.dry_run:
        show(plan(_recipe(), given.rows, given.dimensions, rows_dtype=given.rows_dtype))
    elif given.rows:
        raise ValueError(f"--rows={given.rows} plans vectors that are not there yet; give it with --dry_run")
    elif not given.corpus:
        raise ValueError("--corpus is missing; name the jsonl file to index, or its --rows with --dry_run")
    else:
        build(given.index, given.corpus, _recipe(), **command.values("queries", "rows_dtype", "dry_run"))


if __name__ == "__main__":
    command.run(main, define, required=("index",), words=True)
