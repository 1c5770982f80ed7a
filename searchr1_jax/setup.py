"""From a config to the parts of a run; what the verbs share before their first line of work.

The ConfigDict ends here: the parts take plain arguments and small frozen dataclasses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import sys
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_flags

from searchr1_jax import checkpoint
from searchr1_jax import parallel
from searchr1_jax import preflight
from searchr1_jax import types
from searchr1_jax.data import qa
from searchr1_jax.learning import optimizer
from searchr1_jax.learning import update
from searchr1_jax.models import attention
from searchr1_jax.models import config as model_config
from searchr1_jax.models import decoder
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.retrieval import local
from searchr1_jax.retrieval import remote
from searchr1_jax.retrieval import scann_index
from searchr1_jax.rollout import engine
from searchr1_jax.rollout import environment
from searchr1_jax.rollout import episodes
from searchr1_jax.text import protocol
from searchr1_jax.text import stop_table
from searchr1_jax.text import tokenizer

Config = ml_collections.ConfigDict
RUN_TOKENIZER = "tokenizer"  # of a workdir: the files of its policy's tokenizer


@functools.cache  # several verbs in one process share them
def define_flags() -> tuple[Any, Any]:
    """--config and --workdir; the config is locked, so a misspelt key fails by name."""
    config = config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py[:key=value,…]", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "directory of the run; what is missing is made")
    return config, workdir


# What a wrong input, a missing file or package, or a server out of reach raises. Anything else is a fault of ours.
_WRONG_INPUT = (ValueError, OSError, ImportError, FloatingPointError, retrieval.RetrievalError)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error came from")


def run(main: Callable[[list[str]], None], *, required: Sequence[str] = ("config", "workdir")) -> None:
    """Runs a verb. A wrong input ends it with one line, "error: …", and status 1; Ctrl-C with status 130.

    Args:
      required: flags without which it does not start.
    """
    flags.mark_flags_as_required(required)

    def parsed(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:  # where a config file raised, the last line of a whole traceback
            sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
        except ModuleNotFoundError as error:  # config files import each other as `configs.…`
            sys.exit(f"error: {error}; start from the repository's root, or put it on PYTHONPATH")
        except (AttributeError, KeyError) as error:  # a key that the locked config lacks
            cause = error.args[0].args[0] if isinstance(error, AttributeError) else error.args[0]
            sys.exit("error: the config has no key " + " ".join(cause.split()))

    def told(argv):
        try:
            main(argv)
        except _WRONG_INPUT as error:
            if _TRACEBACK.value:
                raise
            sys.exit(f"error: {error}\n(--traceback shows where it arose)")
        except KeyboardInterrupt:
            sys.stdout.flush()
            os._exit(130)  # at once: a search that hangs in a thread would hold up an ordinary exit

    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # so that a verb's --help shows them too
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(told, flags_parser=parsed)


@contextlib.contextmanager
def session(config: Config, workdir: str | os.PathLike, *, create: bool = True) -> Iterator[pathlib.Path]:
    """Checks the config, makes the workdir, and puts the mesh in use. Yields the workdir.

    Raises:
      ValueError: for a config that cannot work, or, without `create`, a workdir that does not exist.
    """
    logging.set_verbosity(logging.WARNING)  # libraries tell of every file they touch; we have a voice of our own
    preflight.check(config)
    if not create and not os.path.isdir(workdir):
        raise ValueError(
            f"--workdir {workdir} does not exist; name the directory of a run, or train one first"
        )
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    if config.log.compilation_cache:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "searchr1_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes are running, but acting needs all devices in one process; start one"
            " process on one host"
        )
    mesh = parallel.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    with jax.set_mesh(mesh):
        yield directory


def config_of_run(workdir: pathlib.Path) -> Config:
    """The config that a run wrote into its workdir.

    Raises:
      ValueError: where there is none.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the --workdir of a run, or its --config")
    return ml_collections.ConfigDict(json.loads(path.read_text())).lock()


def find(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A file or directory of the config: in the workdir, else as it is.

    Raises:
      ValueError: naming the config key and both places.
    """
    for path in (workdir / name, pathlib.Path(name)):
        if path.exists():
            return path
    raise ValueError(
        f"{key} is {name!r}, but neither {workdir / name} nor {pathlib.Path(name).absolute()} exists;"
        " set it, or make the files first (in the invented world: python -m searchr1_jax.prepare, then sft)"
    )


def model_directory(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A Hugging Face directory of the config: in the workdir, as it is, or from the hub where it reads like an id.

    Raises:
      ValueError: naming the config key.
    """
    if not any(path.exists() for path in (workdir / name, pathlib.Path(name))) and hf.is_hub_id(name):
        return hf.directory(name)
    return find(name, workdir, key)


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
        qa.load(find(name, workdir, f"data.{split}"), name=source, cache_dir=workdir / "data")
        for name, source in zip(names, sources, strict=True)
    ]


def dtype(name: str) -> jnp.dtype:
    return jnp.dtype(name)


def compute(config: Config) -> decoder.Compute:
    c = config.model
    compute_dtype = dtype(c.compute_dtype)
    attention.choose(c.attention, compute_dtype)  # refuses an unknown name before there is work to lose
    return decoder.Compute(dtype=compute_dtype, remat=c.remat, attention=c.attention)


def texts(config: Config) -> protocol.Protocol:
    return protocol.Protocol(**config.protocol)


def retriever(config: Config, workdir: pathlib.Path) -> retrieval.Retriever:
    """The server that the config names, after a first search, or an index in this process."""
    c = config.retriever
    if c.url:
        client = remote.RemoteRetriever(
            c.url, timeout_s=c.timeout_s, attempts=c.attempts, backoff_s=c.backoff_s
        )
        client.check()
        return client
    corpus, index = find(config.data.corpus, workdir, "data.corpus"), c.index
    if index == "auto":
        index = "scann" if scann_index.available() else "exact"
    return local.build(corpus, index=index, dimensions=c.dimensions, cache_dir=workdir / "data")


def search_environment(config: Config, engine_: retrieval.Retriever) -> environment.SearchEnvironment:
    return environment.SearchEnvironment(
        protocol=texts(config), retriever=engine_, passages_per_search=config.rollout.passages
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
    shapes = engine.Shapes(
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


def policy(
    config: Config, workdir: pathlib.Path, *, model: str | None = None, step: int | None = None
) -> Policy:
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
    tokens = tokenizer.Tokenizer.load(workdir / RUN_TOKENIZER)
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


def decoding(config: Config, name: str) -> engine.Decoding:
    """ "greedy", or "sampled" as the rollout samples."""
    if name == "greedy":
        return engine.Decoding(temperature=0.0)
    if name == "sampled":
        c = config.rollout
        return engine.Decoding(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
    raise ValueError(f"decoding {name!r} is unknown; choose greedy or sampled")


def tasks(
    config: Config, examples: Sequence[types.QAExample], tokens: tokenizer.Tokenizer, *, samples: int
) -> list[episodes.Task]:
    """Prompts of the questions; one that leaves no room for a turn is refused with its id."""
    room = config.rollout.context_tokens - config.rollout.max_turn_tokens
    return episodes.make_tasks(examples, tokens, texts(config), samples=samples, room=room)


def optimizer_config(c: Config, total_steps: int) -> optimizer.OptimizerConfig:
    return optimizer.OptimizerConfig(**c, total_steps=total_steps)


def learner(config: Config, model: model_config.ModelConfig) -> update.Learner:
    """The jitted programs of learning.

    Raises:
      ValueError: where the rows of a micro-batch do not divide over the mesh.
    """
    a, steps, rows = config.algorithm, config.learner.steps, config.learner.micro_batch_rows
    if rows % (shards := parallel.axis_size("batch")):
        raise ValueError(
            f"learner.micro_batch_rows of {rows} does not divide over {shards} shards (mesh.data x mesh.fsdp); use a"
            " multiple of it"
        )
    return update.Learner(
        model,
        update.UpdateConfig(
            advantage=a.advantage,
            discount=a.discount,
            trace_decay=a.trace_decay,
            whiten=a.whiten,
            clip=a.clip,
            value_clip=a.value_clip,
            kl_coefficient=a.kl_coefficient,
            kl_in=a.kl_in,
            entropy_coefficient=a.entropy_coefficient,
            value_warmup_steps=config.learner.value_warmup_steps,
            temperature=config.rollout.temperature,
            vocab_chunk=config.learner.vocab_chunk,
            compute=compute(config),
            policy_optimizer=optimizer_config(config.policy, steps),
            value_optimizer=optimizer_config(config.value, steps),
        ),
    )


# Keys that may change when a run goes on in its workdir: they do not change what is learned from a given step on,
# but for the last bits on another mesh.
_FREE = (
    "log.", "evaluation.", "checkpoint.", "mesh.", "sft.", "data.test", "data.validation", "data.demonstrations",
    "retriever.url", "retriever.threads", "retriever.timeout_s", "retriever.attempts", "retriever.backoff_s",
)  # fmt: skip


def as_json(config: Config) -> dict[str, Any]:
    """The resolved config as JSON has it: tuples are lists."""
    return json.loads(config.to_json_best_effort())


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two JSON objects, by dotted key, in words."""
    before, now = flatten(before), flatten(now)
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return {key: f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys}


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Compares the config with that of the run that lives here, if one does.

    Raises:
      ValueError: naming the keys in which an earlier run in this workdir differs.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    free = _FREE
    if config.policy.final_share == config.value.final_share == 1:
        free += ("learner.steps",)  # else the learning rate of every step depends on their number
    found = differences(json.loads(path.read_text()), as_json(config))
    changed = [words for key, words in found.items() if not key.startswith(free)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}); go on with that config or choose"
            " another --workdir"
        )


def acting_differences(config: Config, workdir: pathlib.Path) -> list[str]:
    """In which keys that decide how a policy acts the config differs from that of the run in the workdir, in words."""
    path = workdir / "config.json"
    if not path.exists():
        return []
    found = differences(json.loads(path.read_text()), as_json(config))
    return [words for key, words in found.items() if key.startswith(("protocol.", "rollout.", "retriever."))]


def invented_world(config: Config) -> dict[str, Any]:
    """All that the files of the invented world depend on, as JSON."""
    return as_json(config)["world"] | {"protocol": as_json(config)["protocol"]}


def claim_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Writes config.json, the resolved config of the run that lives here from now on."""
    temporary = workdir / ".config.json"
    temporary.write_text(json.dumps(as_json(config), indent=2) + "\n")
    temporary.replace(workdir / "config.json")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
