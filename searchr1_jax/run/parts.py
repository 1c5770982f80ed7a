"""From settings to the parts of a run that several commands use."""

from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from searchr1_jax.core import parallel, settings as settings_lib, types
from searchr1_jax.data import qa
from searchr1_jax.models import config as model_config
from searchr1_jax.rollout import engine, environment as environment_lib, episodes, programs, sampling
from searchr1_jax.run import run_directory, tools
from searchr1_jax.text import protocol, stop_table, tokenizer


def questions(settings: settings_lib.Settings, split: str, workdir: pathlib.Path) -> list[qa.Questions]:
    """The data sets of a split: "train", "validation" or "test"."""
    given = getattr(settings.data, split)
    sets = dict(map(run_directory.name_and_path, given))
    if not given or len(sets) < len(given):
        raise ValueError(
            f"data.{split} is {given}; give at least one file, and each set a name of its own, which stands before the"
            " ids of its questions: 'nq=nq/test.jsonl' (without one it is the file's, 'test')"
        )
    return [
        qa.load(run_directory.find(path, workdir, f"data.{split}"), name=name, cache_dir=workdir / "data")
        for name, path in sets.items()
    ]


def tasks(
    settings: settings_lib.Settings, examples: Sequence[types.QAExample], tokens: tokenizer.Tokenizer, *, samples: int
) -> list[episodes.Task]:
    """Prompts of the questions; one that leaves no room for a turn is refused with its id."""
    room = settings.rollout.context_tokens - settings.rollout.max_turn_tokens
    return episodes.make_tasks(examples, tokens, settings.protocol, samples=samples, room=room)


def check_prompts(
    settings: settings_lib.Settings, examples: Sequence[types.QAExample], tokens: tokenizer.Tokenizer
) -> None:
    """Raises ValueError as `tasks` does; only what could be too long is tokenised."""
    room = settings.rollout.context_tokens - settings.rollout.max_turn_tokens
    around = len(tokens.encode_prompt("", settings.protocol))  # of a chat template
    # A token holds a byte at least, and no normalisation makes more than three of one.
    most = lambda example: around + 3 * len(protocol.render_prompt(settings.protocol, example.question).encode())
    tasks(settings, [example for example in examples if most(example) > room], tokens, samples=1)


def decoding(settings: settings_lib.Settings, name: str) -> sampling.Decoding:
    """ "greedy", or "sampled" as the rollout samples."""
    if name == "greedy":
        return sampling.Decoding(temperature=0.0)
    if name == "sampled":
        c = settings.rollout
        return sampling.Decoding(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    raise ValueError(f"decoding {name!r} is unknown; choose greedy or sampled")


def environment(settings: settings_lib.Settings, workdir: pathlib.Path) -> environment_lib.Environment:
    """What the policy acts in: the templates and the tools."""
    return environment_lib.Environment(settings.protocol, tools.make(settings, workdir))


class Actor(NamedTuple):
    """What answers questions with a policy."""

    engine: engine.Engine  # takes the weights
    rollout: episodes.Rollout  # the host loop over it


def actor(
    settings: settings_lib.Settings,
    environment: environment_lib.Environment,
    model: model_config.ModelConfig,
    tokens: tokenizer.Tokenizer,
    *,
    beside: int = 0,
) -> Actor:
    """An actor, still without weights; `beside` are bytes on each device that others need while it acts.

    Raises:
      ValueError: where the tokenizer has more tokens, or the context more places, than the model, or memory is short.
    """
    c = settings.rollout
    if tokens.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens.vocab_size} tokens but the model's embedding {model.vocab_size} rows;"
            " use the tokenizer that belongs to the model"
        )
    if c.context_tokens > model.max_positions:
        raise ValueError(
            f"rollout.context_tokens of {c.context_tokens} exceeds the {model.max_positions} positions of the model"
        )
    padding = [b""] * (model.vocab_size - tokens.vocab_size)  # embeddings are often padded beyond the vocabulary
    made = engine.Engine(
        model,
        programs.Shapes.of(c),
        stop_table.build([*tokens.token_bytes(), *padding], protocol.stop_tags(tuple(environment.tools))),
        hosts=parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=settings.mesh.actor_tensor),
        eos_ids=tokens.eos_ids,
        max_turn_tokens=c.max_turn_tokens,
        dtype=jnp.dtype(settings.model.actor_dtype),
        beside=beside,
    )
    limits = episodes.Limits(
        max_turns=c.max_turns, max_information_tokens=c.max_information_tokens, tool_threads=settings.retriever.threads
    )
    return Actor(made, episodes.Rollout(made, environment, tokens, limits))
