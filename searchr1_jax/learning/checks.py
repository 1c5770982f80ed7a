"""What must hold between the settings of learning, before any device work; of one key, `core.settings` says it.

A setting that would change nothing beside the others is refused, too, where it is not at its default.
"""

from __future__ import annotations

from collections.abc import Iterable

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.learning import advantages
from searchr1_jax.learning import losses

Settings = settings_lib.Settings


def check(settings: Settings) -> None:
    """Raises ValueError for the first thing that cannot work, with the values and the remedy."""
    for check_ in CHECKS:
        check_(settings)


def rows_hold_every_trajectory(s: Settings) -> None:
    rows, context = s.learner.row_tokens, s.rollout.context_tokens
    if rows[-1] < context:
        raise ValueError(
            f"learner.row_tokens of {rows} end at less than rollout.context_tokens of {context}; a trajectory must fit"
            " a row, so raise the last to at least that"
        )


def chunks_divide_the_rows(s: Settings) -> None:
    rows, chunk = s.learner.row_tokens, s.learner.vocab_chunk
    if any(n % chunk for n in rows):
        raise ValueError(
            f"learner.vocab_chunk of {chunk} does not divide all learner.row_tokens of {rows}; use a divisor of them"
        )


def a_rollout_divides_into_mini_batches(s: Settings) -> None:
    by, updates = s.learner.minibatch_by, s.learner.updates_per_rollout
    units = s.rollout.questions * (s.rollout.samples if by == "trajectories" else 1)
    if units % updates:
        raise ValueError(
            f"{units} {by} of a rollout do not divide into learner.updates_per_rollout = {updates} mini-batches; use a"
            " divisor of them"
        )


def some_group_has_variance(s: Settings) -> None:
    if s.algorithm.drop_equal_groups and s.rollout.samples == 1:
        raise ValueError(
            "algorithm.drop_equal_groups leaves nothing to learn from where rollout.samples is 1: a group of one has no"
            " variance; raise rollout.samples or set it to False"
        )


def the_kl_is_felt(s: Settings) -> None:
    a = s.algorithm
    losses.find_kl(a.kl_estimator)
    if not a.kl_coefficient:
        return
    if a.kl_in == "reward" and not advantages.find(a.advantage).of_tokens:
        raise ValueError(
            f"algorithm.kl_in is {a.kl_in!r}, but {a.advantage} advantages are made of the rewards of whole"
            ' trajectories or turns and would leave the KL out; set it to "loss"'
        )
    if a.kl_in == "loss" and a.kl_estimator == "k1":
        raise ValueError(
            'algorithm.kl_estimator is "k1" with algorithm.kl_in "loss": its gradient there is zero on average and'
            ' holds nothing back; use "k2" or "k3", or put it in the "reward"'
        )


def the_kl_target_can_be_met(s: Settings) -> None:
    a, trajectories = s.algorithm, s.rollout.questions * s.rollout.samples
    if not a.kl_target:
        _without_effect(s, ["algorithm.kl_horizon"], "without algorithm.kl_target")
        return
    if not a.kl_coefficient:
        raise ValueError(
            f"algorithm.kl_coefficient of 0 stays 0, as it adapts to algorithm.kl_target of {a.kl_target:g} by factors;"
            " set a start above 0, or algorithm.kl_target to 0"
        )
    if trajectories >= 5 * a.kl_horizon:
        raise ValueError(
            f"a step of {trajectories} trajectories could bring the KL coefficient to 0 with algorithm.kl_horizon"
            f" {a.kl_horizon}; set it to more than {trajectories // 5}"
        )


def the_dual_clip_is_beyond_the_ratio(s: Settings) -> None:
    if 0 < s.algorithm.dual_clip <= 1:
        raise ValueError(
            f"algorithm.dual_clip of {s.algorithm.dual_clip} would stop bad tokens from getting less likely; set it"
            " above 1 (3 is common), or to 0 for none"
        )


def what_the_advantage_ignores_is_left_alone(s: Settings) -> None:
    row, ignored = advantages.find(s.algorithm.advantage), []
    if not row.of_tokens:
        ignored += ["algorithm.whiten", "algorithm.mask_estimates"]
    if row.of_trajectories:
        ignored += ["algorithm.discount", "algorithm.gae_lambda"]
    if not row.needs_value:
        ignored += ["algorithm.value_clip", "learner.value_warmup_steps"]
    ignored += [f"algorithm.{name}" for name in row.ignores]
    _without_effect(s, ignored, f"with algorithm.advantage = {s.algorithm.advantage!r}")


def what_the_policy_loss_ignores_is_left_alone(s: Settings) -> None:
    ignored = losses.find_policy_loss(s.algorithm.policy_loss).ignores
    beside = f"with algorithm.policy_loss = {s.algorithm.policy_loss!r}"
    _without_effect(s, [f"algorithm.{name}" for name in ignored], beside)


def what_the_aggregation_ignores_is_left_alone(s: Settings) -> None:
    if s.algorithm.aggregation != "constant":
        beside = f"with algorithm.aggregation = {s.algorithm.aggregation!r}"
        _without_effect(s, ["algorithm.constant_tokens"], beside)


def the_guard_has_something_to_guard(s: Settings) -> None:
    if not s.algorithm.kl_coefficient:
        _without_effect(s, ["guard.kl"], "with algorithm.kl_coefficient = 0, as there is no reference")
    if not any((s.guard.kl, s.guard.entropy_low, s.guard.entropy_high, s.guard.gradient_norm)):
        _without_effect(s, ["guard.rollbacks"], "without a limit in the section guard")


CHECKS = (
    rows_hold_every_trajectory,
    chunks_divide_the_rows,
    a_rollout_divides_into_mini_batches,
    some_group_has_variance,
    the_kl_is_felt,
    the_kl_target_can_be_met,
    the_dual_clip_is_beyond_the_ratio,
    what_the_advantage_ignores_is_left_alone,
    what_the_policy_loss_ignores_is_left_alone,
    what_the_aggregation_ignores_is_left_alone,
    the_guard_has_something_to_guard,
)


def _without_effect(settings: Settings, names: Iterable[str], beside: str) -> None:
    """Raises ValueError where one of these keys is not at its default."""
    values, defaults = ({key.name: key.value for key in settings_lib.keys(s)} for s in (settings, Settings()))
    for name in names:
        if values[name] != defaults[name]:
            raise ValueError(f"{name} of {values[name]} has no effect {beside}; leave it at {defaults[name]}")
