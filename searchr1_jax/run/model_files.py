"""Policies in and out: from a checkpoint of a run or a Hugging Face directory, and as such a directory again."""

from collections.abc import Sequence
import contextlib
import functools
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from searchr1_jax.core import files, parallel, settings as settings_lib
from searchr1_jax.models import catalog, config as model_config, decoder, hf
from searchr1_jax.run import checkpoint, progress, run_directory
from searchr1_jax.text import protocol, tokenizer


def find(name: str, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """A Hugging Face directory of the settings: in the workdir, as it is, or from the hub where it reads like an id.

    Raises:
      ValueError: naming the key.
    """
    if not any(path.exists() for path in (workdir / name, pathlib.Path(name))) and hf.is_hub_id(name):
        return hf.directory(name)
    return run_directory.find(name, workdir, key)


class Loaded(NamedTuple):
    """A policy to act with or to export."""

    model: model_config.ModelConfig
    tokens: tokenizer.Tokenizer
    params: decoder.Params
    origin: str  # where it is from, in words
    about: progress.About | None  # what its checkpoint says of it
    identity: list[Any]  # tells it from what else may lie in the same place


def load(
    settings: settings_lib.Settings, workdir: pathlib.Path, *, model: str | None = None, step: int | None = None
) -> Loaded:
    """A policy with its tokenizer, from a checkpoint alone or from a Hugging Face directory.

    Args:
      model: Hugging Face directory or hub id; None takes the workdir's checkpoint.
      step: of the checkpoint; None takes the newest.
    Raises:
      ValueError: where there is no such checkpoint.
    """
    if model:
        path = hf.directory(model)
        shape = hf.read_config(path, settings.model.family)
        params = hf.load(path, shape, dtype=jnp.dtype(settings.model.param_dtype))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.glob("*.safetensors")]
        return Loaded(shape, tokenizer.Tokenizer.load(path), params, str(model), None, sorted(stats))
    about, shape, params, origin = restore(settings, workdir, "policy", step=step)
    tokens = tokenizer.Tokenizer.load(workdir / run_directory.TOKENIZER)
    return Loaded(shape, tokens, params, origin, about, [about.step, about.base, about.stream])


KINDS = {"policy": decoder.Policy, "value": decoder.Value}


def restore(
    settings: settings_lib.Settings, workdir: pathlib.Path, name: str, *, step: int | None = None
) -> tuple[progress.About, model_config.ModelConfig, decoder.Params, str]:
    """One model of a checkpoint, of KINDS: what the checkpoint says of itself, shape, weights, and origin in words.

    Raises:
      ValueError: where there is no such checkpoint.
    """
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep) as checkpoints:
        chosen = checkpoints.latest if step is None else step
        if chosen is None or chosen not in checkpoints.steps:
            raise ValueError(
                f"{workdir}/checkpoints holds steps {checkpoints.steps}"
                + ("" if step is None else f", not {step}")
                + "; run python -m searchr1_jax.train first, choose another --step, or name a --model"
            )
        checkpoints.check(chosen)
        about = progress.About.of(checkpoints.restore(chosen, {})[1])
        if name == "value" and not about.has_value_model:
            raise ValueError(f"{workdir}/checkpoints/{chosen} has no value model; leave out --value")
        dtype = jnp.dtype(settings.model.param_dtype)
        shape = catalog.from_hf(about.model, settings.model.family)
        _, abstract = decoder.abstract(KINDS[name], shape, dtype)
        params = checkpoints.restore(chosen, {name: abstract})[0][name]
    return about, shape, params, f"{workdir}/checkpoints/{chosen}"


def save(
    output: pathlib.Path,
    model: model_config.ModelConfig,
    tokens: tokenizer.Tokenizer,
    params: decoder.Params,
    *,
    tools: Sequence[str],
    value: decoder.Params | None = None,
    dtype: jnp.dtype | None = None,
    max_shard_gb: float = 5.0,
    card: str | None = None,
) -> None:
    """Writes a policy as a Hugging Face directory, which appears when it is whole and replaces what was there.

    Args:
      tools: names of those that it may call; its turns end at their closing tags and at that of an answer.
      value: a value model, written beside it into `value/`.
      dtype: of the files; None keeps the weights' own.
      card: text of its README.md.
    """
    write = functools.partial(
        hf.save,
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * 1e9),
        eos_ids=tokens.eos_ids,
        stop_strings=protocol.stop_tags(tools),
    )
    with files.whole(output) if parallel.is_first() else contextlib.nullcontext(output) as temporary:
        if parallel.is_first():
            temporary.mkdir()
            tokens.save(temporary)
            if card is not None:
                (temporary / "README.md").write_text(card)
        write(temporary, model, params)
        if value is not None:
            write(temporary / "value", model, value, kind=decoder.Value)
