"""Checks of settings as a whole, before any device work: what must fit together, and what to change where it does not.

What must hold of one key by itself stands beside it, in `core.settings`.
"""

from __future__ import annotations

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.models import attention


def check(settings: settings_lib.Settings) -> None:
    """Raises ValueError for the first thing that cannot work, with the values and the remedy."""
    for each in CHECKS:
        each(settings)


def _attention(s: settings_lib.Settings) -> None:
    if s.model.attention not in (choices := ("auto", *attention.KERNELS)):
        raise ValueError(f"model.attention is {s.model.attention!r}; choose from {list(choices)}")


def _room_for_a_prompt(s: settings_lib.Settings) -> None:
    if s.rollout.max_turn_tokens >= s.rollout.context_tokens:
        raise ValueError(
            f"rollout.max_turn_tokens of {s.rollout.max_turn_tokens} leaves no room for a prompt in"
            f" rollout.context_tokens of {s.rollout.context_tokens}; lower it or raise the context"
        )


def _shares_of_the_mixture(s: settings_lib.Settings) -> None:
    shares = [getattr(s.sft, f"mixture_{kind}") for kind in ("right", "guess", "wrong_entity", "stopped_early")]
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"sft.mixture_* are {shares}, which add up to {sum(shares):g}; make it 1")


def _rows(s: settings_lib.Settings) -> None:
    rows, context, chunk = s.learner.row_tokens, s.rollout.context_tokens, s.learner.vocab_chunk
    if rows[-1] < context:
        raise ValueError(
            f"learner.row_tokens of {rows} end at less than rollout.context_tokens of {context}; a trajectory must fit"
            " a row, so raise the last to at least that"
        )
    if any(n % chunk for n in rows):
        raise ValueError(
            f"learner.vocab_chunk of {chunk} does not divide all learner.row_tokens of {rows}; use a divisor of them"
        )


def _minibatches(s: settings_lib.Settings) -> None:
    by, updates = s.learner.minibatch_by, s.learner.updates_per_rollout
    units = s.rollout.questions * (s.rollout.samples if by == "trajectories" else 1)
    if units % updates:
        raise ValueError(
            f"{units} {by} of a rollout do not divide into learner.updates_per_rollout = {updates} mini-batches; use a"
            " divisor of them"
        )
    if s.algorithm.drop_equal_groups and s.rollout.samples == 1:
        raise ValueError(
            "algorithm.drop_equal_groups leaves nothing to learn from where rollout.samples is 1: a group of one has no"
            " variance; raise rollout.samples or set it to False"
        )


def _kl(s: settings_lib.Settings) -> None:
    a = s.algorithm
    if a.advantage not in ("gae", "return") and a.kl_in == "reward" and a.kl_coefficient:
        raise ValueError(
            f"algorithm.kl_in is {a.kl_in!r}, but {a.advantage} advantages are made of the rewards of whole"
            ' trajectories and would leave the KL out; set it to "loss"'
        )
    if a.kl_in == "loss" and a.kl_estimator == "k1" and a.kl_coefficient:
        raise ValueError(
            'algorithm.kl_estimator is "k1" with algorithm.kl_in "loss": its gradient there is zero on average and'
            ' holds nothing back; use "k2" or "k3", or put it in the "reward"'
        )


CHECKS = (_attention, _room_for_a_prompt, _rows, _minibatches, _kl, _shares_of_the_mixture)
