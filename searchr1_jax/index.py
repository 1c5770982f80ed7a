r"""Makes an index of a corpus, says what it is, and tries it.

python -m searchr1_jax.index build --index=indexes/wiki --corpus=wiki-18.jsonl --encoder=intfloat/e5-base-v2 --dry_run
python -m searchr1_jax.index build --index=indexes/wiki --corpus=wiki-18.jsonl --encoder=intfloat/e5-base-v2 \
    --query_prefix="query: " --passage_prefix="passage: " --max_tokens=256
python -m searchr1_jax.index info --index=indexes/wiki
python -m searchr1_jax.index query --index=indexes/wiki "who wrote Emma?" "who wrote Persuasion?"

A build says first what it will take, shows how far it is, can be killed at any moment, and goes on when it is started
again; the index is there when its manifest is. Several processes (--distributed) share the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import pathlib
import time
from typing import NamedTuple

from absl import flags
import jax
import numpy as np
import psutil
from rich import console as rich_console
from rich import table as rich_table

from searchr1_jax.core import parallel
from searchr1_jax.retrieval import bm25
from searchr1_jax.retrieval import building
from searchr1_jax.retrieval import corpus as corpora
from searchr1_jax.retrieval import exact_index
from searchr1_jax.retrieval import scann_index
from searchr1_jax.retrieval import scann_plan
from searchr1_jax.retrieval import stored
from searchr1_jax.retrieval import vectors
from searchr1_jax.run import command
from searchr1_jax.run import metrics

_COMMANDS = ("build", "info", "query")
_FLAGS = command.define_index_flags()
_PARTS = flags.DEFINE_list("parts", [], "of scann, exact, bm25; default: scann (exact where there is no ScaNN)")
_SETTINGS = {
    "query_prefix": flags.DEFINE_string("query_prefix", None, "before each query; default: as its files say"),
    "passage_prefix": flags.DEFINE_string("passage_prefix", None, "before each passage"),
    "pooling": flags.DEFINE_enum("pooling", None, ["mean", "cls"], "of token vectors"),
    "normalize": flags.DEFINE_bool("normalize", None, "vectors to length 1"),
    "max_tokens": flags.DEFINE_integer("max_tokens", None, "of a text; what is longer is cut"),
}
_DIMENSIONS = flags.DEFINE_integer("dimensions", 256, "of hashed n-gram vectors; with --rows, of any", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the vectors on disk")
_MEMORY_GB = flags.DEFINE_float("memory_gb", 16.0, "that building may take; ScaNN is built in shards that fit")
_TARGET_RECALL = flags.DEFINE_float("target_recall", 0.95, "recall at 3 that ScaNN's search is tuned to")
_QUERIES = flags.DEFINE_string("queries", "", "jsonl file of questions to tune on; default: stretches of passages")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "say what a build would take, and stop")
_ROWS = flags.DEFINE_integer(
    "rows", None, "with --dry_run: of vectors that are not there yet, in place of a corpus", lower_bound=1
)
_K = flags.DEFINE_integer("k", 3, "passages for a query")

TUNED_ON = 1000  # queries
SCANN_S = 0.3e-3  # seconds to index a passage of 768 dimensions on 2 cores
FITTING_SHARE = 1.3  # seconds of counting n-grams over those of embedding by them
_TRIED = 128  # passages, of which time and size are reckoned
_CONSOLE = rich_console.Console(highlight=False, soft_wrap=True)


def main(argv):
    if len(argv) < 2 or argv[1] not in _COMMANDS:
        raise ValueError(f"say what to do: python -m searchr1_jax.index {'|'.join(_COMMANDS)} --index=…")
    command.quiet_libraries()
    command.use_compilation_cache()
    verb, *arguments = argv[1:]
    directory = pathlib.Path(_FLAGS.index.value)
    if verb == "build":
        build(directory)
    elif verb == "info":
        _CONSOLE.print_json(json.dumps(stored.read_manifest(directory)))
    else:
        query(directory, arguments)


def build(directory: pathlib.Path) -> None:
    """Estimates, embeds, indexes, measures."""
    parts = tuple(_PARTS.value) or ("scann" if scann_index.available() else "exact",)
    if _ROWS.value:
        if not _DRY_RUN.value or set(parts) - set(stored.BY_VECTORS):
            raise ValueError(
                f"--rows={_ROWS.value} plans vectors that are not there yet: give it with --dry_run and --parts of"
                f" {list(stored.BY_VECTORS)}, not {list(parts)}"
            )
        _print_plan(vector_rows(parts, _ROWS.value, _DIMENSIONS.value, seconds=None))
        return
    if not _FLAGS.corpus.value:
        raise ValueError("--corpus is missing; name the jsonl file to index, or its --rows with --dry_run")
    needs_vectors = any(part in stored.BY_VECTORS for part in parts)
    recipe = building.Recipe(
        parts=parts,
        encoder=(_FLAGS.encoder.value or stored.HASHED) if needs_vectors else _FLAGS.encoder.value,
        settings={name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None},
        dimensions=_DIMENSIONS.value,
        dtype=_DTYPE.value,
        memory_bytes=int(_MEMORY_GB.value * 1e9),
        target_recall=_TARGET_RECALL.value,
    )
    if "scann" in parts and not (_DRY_RUN.value or scann_index.available()):
        raise ValueError(
            'the package "scann" cannot be imported here, it has wheels for x86-64 Linux only; use --parts=exact'
        )
    size = pathlib.Path(_FLAGS.corpus.value).stat().st_size
    with metrics.Progress(size, what="reading the corpus") as bar:
        corpus = corpora.Corpus(_FLAGS.corpus.value, directory, progress=bar.reach)
    queries = _read_questions(_QUERIES.value) if _QUERIES.value else building.sample_queries(corpus, count=TUNED_ON)
    encoder = building.make_encoder(recipe) if needs_vectors else None
    plan = building.planned(recipe, corpus, encoder)
    if recipe.encoder == stored.HASHED:
        plan.pop("encoder")  # known once it is fitted
    building.check(directory, plan)
    estimate(recipe, corpus, encoder, directory)
    if _DRY_RUN.value:
        return
    began = time.time()
    with _bars() as progress:
        if encoder is not None:
            encoder = building.fitted(encoder, corpus, directory, progress)
        plan = building.planned(recipe, corpus, encoder)
        _together(lambda: building.check(directory, plan))  # all have looked before the first one writes
        if building.is_whole(directory):
            metrics.say(f"{directory} is this index already, and whole")
            return

        def claim() -> None:
            if parallel.is_first():
                building.claim(directory, plan)
                if encoder is not None:
                    building.keep(encoder, corpus, directory)

        def embed() -> None:
            if encoder is not None:
                here = dict(process=jax.process_index(), processes=jax.process_count())
                building.embed_corpus(recipe, corpus, encoder, directory, progress, **here)

        def finish() -> None:
            if parallel.is_first():
                building.finish(recipe, corpus, encoder, directory, queries, progress)

        for stage in (claim, embed, finish):
            _together(stage)
    if parallel.is_first():
        manifest = stored.read_manifest(directory)
        measured = manifest["parts"].get("scann")
        if measured:
            metrics.say(
                f"ScaNN: recall@3 {measured['recall_at_3']:.3f}, recall@10 {measured['recall_at_10']:.3f},"
                f" {measured['queries_per_s']:,.0f} queries/s on one thread ({measured['queries']} queries)"
            )
        metrics.say(f"{directory}: {len(corpus):,} passages, {time.time() - began:,.0f} s")


@contextlib.contextmanager
def _bars() -> Iterator[building.Progress]:
    """Yields what shows how much of something is done, one bar at a time."""
    with contextlib.ExitStack() as shown:
        bars: dict[str, metrics.Progress] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                shown.close()  # a terminal has room for one
                bars[what] = shown.enter_context(metrics.Progress(total, what=what))
            bars[what].reach(done)

        yield progress


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


class Estimate(NamedTuple):
    """What a part takes."""

    part: str
    disk_bytes: int
    building_bytes: int  # of memory
    serving_bytes: int  # of memory
    seconds: float | None  # None: who knows


def estimate(
    recipe: building.Recipe, corpus: corpora.Corpus, encoder: vectors.KnownEncoder | None, directory: pathlib.Path
) -> None:
    """Says what a build will take in all; what is already there is not subtracted.

    Raises:
      ValueError: where the disk has no room for it, or the machine too little memory.
    """
    estimates = []
    if encoder is not None:
        texts = [corpus.contents(int(row)) for row in np.linspace(0, len(corpus) - 1, _TRIED)]
        encoder.encode(texts, "passage")  # compiles
        began = time.perf_counter()
        encoder.encode(texts, "passage")
        seconds = (time.perf_counter() - began) / len(texts) * len(corpus)
        counting = FITTING_SHARE * seconds if recipe.encoder == stored.HASHED else 0.0  # by every process
        seconds = counting + seconds / jax.process_count()
        estimates += vector_rows(recipe.parts, len(corpus), encoder.dimensions, seconds=seconds)
    if "bm25" in recipe.parts:
        words = bm25.plan(corpus, tried=1000)
        estimates.append(Estimate("BM25", words.disk_bytes, words.build_bytes, words.disk_bytes, words.seconds))
    _print_plan(estimates)
    disk = sum(part.disk_bytes for part in estimates)
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free, taken = psutil.disk_usage(str(there)).free, _size(directory)
    if disk > free + taken:
        raise ValueError(
            f"the index takes {disk / 1e9:,.1f} GB and {there} has {free / 1e9:,.1f} GB free; make room, or name"
            " another --index"
        )
    memory, has = max(part.building_bytes for part in estimates), psutil.virtual_memory().total
    if memory > has:
        raise ValueError(
            f"building takes {memory / 1e9:,.1f} GB of memory and this machine has {has / 1e9:,.1f} GB; lower"
            " --memory_gb for scann, leave bm25 out of --parts, or build on a larger one"
        )


def vector_rows(parts: Sequence[str], rows: int, dimensions: int, *, seconds: float | None) -> list[Estimate]:
    """What vectors take, and what searches them.

    Args:
      seconds: of embedding.
    """
    size = rows * dimensions * exact_index.DTYPES[_DTYPE.value]
    estimates = [Estimate("vectors", size, 0, 0, seconds)]
    if "exact" in parts:
        held = exact_index.stored_bytes(rows, dimensions, _FLAGS.rows_dtype.value or _DTYPE.value)
        estimates.append(Estimate("exact search", 0, 0, held, 0.0))
    if "scann" in parts:
        shard = scann_plan.shard_rows(rows, memory_bytes=int(_MEMORY_GB.value * 1e9), dimensions=dimensions)
        plan = scann_plan.plan(rows, dimensions, shard_rows=shard, vectors_dtype=_DTYPE.value)
        name = f"ScaNN, {plan.shards} shard{'s' if plan.shards > 1 else ''}"
        building = SCANN_S * rows * dimensions / 768
        estimates.append(Estimate(name, plan.disk_bytes, plan.building_bytes, plan.serving_bytes, building))
    return estimates


def _print_plan(estimates: list[Estimate]) -> None:
    table = rich_table.Table("part", "disk", "memory to build", "memory to serve", "time")
    for part, *sizes, seconds in estimates:
        table.add_row(part, *(f"{size / 1e9:,.3f} GB" for size in sizes), "" if seconds is None else _duration(seconds))
    if parallel.is_first():
        _CONSOLE.print(table)


def _size(directory: pathlib.Path) -> int:
    """Bytes that its files take on disk; the vectors' file has holes where there are none yet."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36_000 else f"{seconds / 3600:,.0f} h"


def _read_questions(path: str) -> list[str]:
    """The questions of a jsonl file, at most TUNED_ON of them, evenly chosen.

    Raises:
      ValueError: where it holds fewer than two, or something else.
    """
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


def query(directory: pathlib.Path, queries: list[str]) -> None:
    """Prints what the index finds."""
    if not queries:
        raise ValueError('say what to look for: python -m searchr1_jax.index query --index=… "a query" …')
    retriever = _FLAGS.open()
    for text, passages in zip(queries, retriever.search(queries, _K.value), strict=True):
        table = rich_table.Table("score", "id", "passage", title=text, title_justify="left")
        for passage in passages:
            table.add_row(f"{passage.score:.4f}", passage.id, f"{passage.title}\n{passage.text}")
        _CONSOLE.print(table)


if __name__ == "__main__":
    command.run(main, required=("index",))
