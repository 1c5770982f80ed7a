"""Checks of a whole config, before any device work: what must fit together, and what to change where it does not."""

from __future__ import annotations

import functools

import ml_collections

from searchr1_jax.core import settings
from searchr1_jax.learning import checks as learning
from searchr1_jax.models import attention

_DTYPES = ("float32", "bfloat16", "float16")
_AT_LEAST_ONE = (
    "rollout.questions", "rollout.samples", "rollout.max_turn_tokens", "rollout.max_information_tokens",
    "rollout.context_tokens", "rollout.passages", "rollout.slots", "rollout.decode_tokens", "rollout.extend_rows",
    "learner.steps", "learner.updates_per_rollout", "learner.micro_batch_rows",
    "learner.vocab_chunk", "retriever.threads", "retriever.attempts", "retriever.dimensions", "sft.batch",
    "checkpoint.keep",
)  # fmt: skip


def check(c: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first thing that cannot work, with the values and the remedy."""
    for key in _AT_LEAST_ONE:
        value = functools.reduce(getattr, key.split("."), c)
        if value < 1:
            raise ValueError(f"{key} is {value}; it counts something that is needed, so set it to at least 1")
    for key in ("param_dtype", "compute_dtype", "reference_dtype", "actor_dtype"):
        if c.model[key] not in _DTYPES:
            raise ValueError(f"model.{key} is {c.model[key]!r}; choose from {list(_DTYPES)}")
    if c.model.attention not in ("auto", *attention.KERNELS):
        raise ValueError(f"model.attention is {c.model.attention!r}; choose auto or one of {list(attention.KERNELS)}")
    if c.rollout.max_turn_tokens >= c.rollout.context_tokens:
        raise ValueError(
            f"rollout.max_turn_tokens of {c.rollout.max_turn_tokens} leaves no room for a prompt in"
            f" rollout.context_tokens of {c.rollout.context_tokens}; lower it or raise the context"
        )
    if c.rollout.temperature <= 0:
        raise ValueError(
            f"rollout.temperature of {c.rollout.temperature} is greedy and explores nothing; use a positive one"
            " (evaluation.decoding chooses greedy decoding for evaluation)"
        )
    chunks = tuple(c.rollout.extend_chunks)
    if not chunks or list(chunks) != sorted(chunks) or chunks[0] < 1:
        raise ValueError(f"rollout.extend_chunks of {chunks} must be ascending positive numbers of tokens")
    shares = [c.sft[f"mixture_{k}"] for k in ("right", "guess", "wrong_entity", "stopped_early")]
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"sft.mixture_* are {shares}, which add up to {sum(shares):g}; make it 1")
    learning.check(settings.Settings.of(c))
