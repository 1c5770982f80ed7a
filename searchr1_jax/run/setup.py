"""From a config to the parts of a run.

The ConfigDict ends here: the parts take plain arguments and small frozen dataclasses.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from typing import Any, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import ml_collections

from searchr1_jax.core import parallel
from searchr1_jax.core import types
from searchr1_jax.data import qa
from searchr1_jax.data.invented import world as world_lib
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.rollout import engine
from searchr1_jax.rollout import environment
from searchr1_jax.rollout import episodes
from searchr1_jax.rollout import programs
from searchr1_jax.rollout import sampling
from searchr1_jax.run import checkpoint
from searchr1_jax.run import run_directory
from searchr1_jax.text import protocol
from searchr1_jax.text import stop_table
from searchr1_jax.text import tokenizer

Config = ml_collections.ConfigDict


def model_directory(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A Hugging Face directory of the config: in the workdir, as it is, or from the hub where it reads like an id.

    Raises:
      ValueError: naming the config key.
    """
    if not any(path.exists() for path in (workdir / name, pathlib.Path(name))) and hf.is_hub_id(name):
        return hf.directory(name)
    return run_directory.find(name, workdir, key)


def questions(config: Config, split: str, workdir: pathlib.Path) -> list[qa.Questions]:
    """The data sets of a split: "train", "validation" or "test"."""
    names = getattr(config.data, split)
    sources = [str(pathlib.PurePath(name).with_suffix("")).lstrip("/") for name in names]  # before the ids
    if not names or len(set(sources)) < len(names):
        raise ValueError(
            f"data.{split} is {tuple(names)}; name at least one file, and each once (two that differ in their endings"
            " alone would give their questions the same ids)"
        )
    return [
        qa.load(run_directory.find(name, workdir, f"data.{split}"), name=source, cache_dir=workdir / "data")
        for name, source in zip(names, sources, strict=True)
    ]


def dtype(name: str) -> jnp.dtype:
    return jnp.dtype(name)


def texts(config: Config) -> protocol.Protocol:
    return protocol.Protocol(**config.protocol)


def world(config: Config) -> world_lib.World:
    """The invented world."""
    w = config.world
    return world_lib.make_world(
        seed=w.seed,
        persons=w.persons,
        companies=w.companies,
        hops=w.hops,
        namesakes=w.namesakes,
        paraphrased=w.paraphrased,
    )


def search_environment(config: Config, engine_: retrieval.Retriever) -> environment.SearchEnvironment:
    c = config.retriever
    return environment.SearchEnvironment(
        protocol=texts(config),
        retriever=engine_,
        passages_per_search=config.rollout.passages,
        timeout_s=None if c.url else c.timeout_s,  # a server's client has its own, and more than one attempt
    )


def rollout(
    config: Config,
    model: model_config.ModelConfig,
    tokens: tokenizer.Tokenizer,
    environment_: environment.Environment,
) -> tuple[engine.Engine, episodes.Rollout]:
    """The engine, still without weights, and the host loop over it.

    Raises:
      ValueError: where the tokenizer has more tokens than the model's embedding.
    """
    c = config.rollout
    if tokens.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens.vocab_size} tokens but the model's embedding {model.vocab_size} rows;"
            " use the tokenizer that belongs to the model"
        )
    if c.context_tokens > model.max_positions:
        raise ValueError(
            f"rollout.context_tokens of {c.context_tokens} exceeds the {model.max_positions} positions of the model"
        )
    pieces = tokens.token_bytes()
    pieces += [b""] * (model.vocab_size - len(pieces))  # embeddings are often padded beyond the vocabulary
    shapes = programs.Shapes(
        slots=c.slots,
        context=c.context_tokens,
        decode_tokens=c.decode_tokens,
        extend_rows=c.extend_rows,
        extend_chunks=tuple(c.extend_chunks),
        group=max(1, c.samples),
    )
    actor = engine.Engine(
        model,
        shapes,
        stop_table.build(pieces),
        hosts=parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=config.mesh.actor_tensor),
        eos_ids=tokens.eos_ids,
        max_turn_tokens=c.max_turn_tokens,
        dtype=dtype(config.model.actor_dtype),
    )
    limits = episodes.Limits(
        max_turns=c.max_turns,
        max_information_tokens=c.max_information_tokens,
        retrieval_threads=config.retriever.threads,
    )
    return actor, episodes.Rollout(actor, environment_, tokens, limits)


class Policy(NamedTuple):
    """A policy to act with or to export."""

    model: model_config.ModelConfig
    tokens: tokenizer.Tokenizer
    params: decoder.Params
    origin: str  # where it is from, in words
    extra: dict[str, Any]  # what its checkpoint says of it; empty without one


def policy(config: Config, workdir: pathlib.Path, *, model: str | None = None, step: int | None = None) -> Policy:
    """A policy with its tokenizer, from a checkpoint alone or from a Hugging Face directory.

    Args:
      model: Hugging Face directory or hub id; None takes the workdir's checkpoint.
      step: of the checkpoint; None takes the newest.
    Raises:
      ValueError: where there is no such checkpoint.
    """
    weights = dtype(config.model.param_dtype)
    if model:
        path = hf.directory(model)
        shape, tokens = hf.read_config(path), tokenizer.Tokenizer.load(path)
        return Policy(shape, tokens, hf.load(path, dtype=weights), str(model), {})
    shape, restored, origin, extra = restore(config, workdir, "policy", decoder.Policy, step=step)
    tokens = tokenizer.Tokenizer.load(workdir / run_directory.TOKENIZER)
    return Policy(shape, tokens, restored, origin, extra)


def restore(
    config: Config, workdir: pathlib.Path, name: str, kind: type, *, step: int | None = None
) -> tuple[model_config.ModelConfig, decoder.Params, str, dict[str, Any]]:
    """One model of a checkpoint ("policy" or "value"): its shape, weights, origin in words, and the extra JSON.

    Raises:
      ValueError: where there is no such checkpoint.
    """
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    chosen = checkpoints.latest if step is None else step
    if chosen is None or chosen not in checkpoints.steps:
        raise ValueError(
            f"{workdir}/checkpoints holds steps {checkpoints.steps}"
            + ("" if step is None else f", not {step}")
            + "; run python -m searchr1_jax.train first, choose another --step, or name a --model"
        )
    _, extra = checkpoints.restore(chosen, {})
    shape = model_config.from_hf(extra["model"])
    if name == "value" and not extra["has_value_model"]:
        raise ValueError(f"{workdir}/checkpoints/{chosen} has no value model; leave out --value")
    _, abstract = decoder.abstract(kind, shape, dtype(config.model.param_dtype))
    params = checkpoints.restore(chosen, {name: abstract})[0][name]
    checkpoints.close()
    return shape, params, f"{workdir}/checkpoints/{chosen}", extra


def save_model(
    output: pathlib.Path,
    model: model_config.ModelConfig,
    tokens: tokenizer.Tokenizer,
    params: decoder.Params,
    *,
    value: decoder.Params | None = None,
    dtype: jnp.dtype | None = None,
    max_shard_gb: float = 5.0,
    card: str | None = None,
) -> None:
    """Writes a policy as a Hugging Face directory, which appears when it is whole and replaces what was there.

    Args:
      value: a value model, written beside it into `value/`.
      dtype: of the files; None keeps the weights' own.
      card: text of its README.md.
    """
    options = dict(
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * 1e9),
        eos_ids=tokens.eos_ids,
        stop_strings=protocol.STOP_TAGS,
    )
    with _whole(output) as temporary:
        if jax.process_index() == 0:
            tokens.save(temporary)
            if card is not None:
                (temporary / "README.md").write_text(card)
        hf.save(temporary, model, params, **options)
        if value is not None:
            hf.save(temporary / "value", model, value, kind=decoder.Value, **options)


@contextlib.contextmanager
def _whole(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to write to, which takes the place of `output` at the end; after an error nothing is left."""
    temporary = output.with_name(f".{output.name}.partial")
    if jax.process_index() != 0:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def decoding(config: Config, name: str) -> sampling.Decoding:
    """ "greedy", or "sampled" as the rollout samples."""
    if name == "greedy":
        return sampling.Decoding(temperature=0.0)
    if name == "sampled":
        c = config.rollout
        return sampling.Decoding(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    raise ValueError(f"decoding {name!r} is unknown; choose greedy or sampled")


def tasks(
    config: Config, examples: Sequence[types.QAExample], tokens: tokenizer.Tokenizer, *, samples: int
) -> list[episodes.Task]:
    """Prompts of the questions; one that leaves no room for a turn is refused with its id."""
    room = config.rollout.context_tokens - config.rollout.max_turn_tokens
    return episodes.make_tasks(examples, tokens, texts(config), samples=samples, room=room)
