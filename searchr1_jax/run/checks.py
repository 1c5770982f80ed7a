"""Checks of settings as a whole, before any device work: what must fit together, and what to change where it does not.

What must hold of one key by itself stands beside it, in `core.settings`.
"""

import datetime

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.learning import checks as learning
from searchr1_jax.models import attention
from searchr1_jax.text import protocol


def check(settings: settings_lib.Settings, *, learns: bool = True) -> None:
    """Raises ValueError for the first thing that cannot work, with the values and the remedy.

    Without `learns` what decides learning alone is not looked at.
    """
    for each in CHECKS:
        each(settings)
    if learns:
        learning.check(settings)


def _attention(s: settings_lib.Settings) -> None:
    if s.model.attention not in (choices := ("auto", *attention.KERNELS)):
        raise ValueError(f"model.attention is {s.model.attention!r}; choose from {list(choices)}")


def _room_for_a_prompt(s: settings_lib.Settings) -> None:
    if s.rollout.max_turn_tokens >= s.rollout.context_tokens:
        raise ValueError(
            f"rollout.max_turn_tokens of {s.rollout.max_turn_tokens} leaves no room for a prompt in"
            f" rollout.context_tokens of {s.rollout.context_tokens}; lower it or raise the context"
        )


def _chat_template(s: settings_lib.Settings) -> None:
    protocol.template_arguments(s.protocol)
    try:
        datetime.date.fromisoformat(s.protocol.template_date)
    except ValueError as error:
        raise ValueError(f"protocol.template_date is {s.protocol.template_date!r}; write it 2024-07-26") from error


def _shares_of_the_mixture(s: settings_lib.Settings) -> None:
    shares = [getattr(s.sft, f"mixture_{kind}") for kind in ("right", "guess", "wrong_entity", "stopped_early")]
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"sft.mixture_* are {shares}, which add up to {sum(shares):g}; make it 1")


CHECKS = (_attention, _room_for_a_prompt, _chat_template, _shares_of_the_mixture)
