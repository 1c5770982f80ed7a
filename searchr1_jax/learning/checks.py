"""What must hold between the settings of learning, before any device work; of one key, `core.settings` says it.

A setting that would change nothing beside the others is refused, too, where it is not at its default.
"""

from searchr1_jax.core import settings as settings_lib
from searchr1_jax.learning import advantages, losses

Settings = settings_lib.Settings


def check(settings: Settings) -> None:
    """Raises ValueError for the first thing that cannot work, with the values and the remedy."""
    _check_dtypes(settings)
    _check_sizes(settings)
    _check_kl(settings)
    _check_effects(settings)


def _check_dtypes(s: Settings) -> None:
    if s.model.param_dtype != "float32":
        raise ValueError(
            f"model.param_dtype is {s.model.param_dtype}, in which the steps of a small learning rate are rounded away:"
            " learned weights are kept in float32 (model.compute_dtype and actor_dtype may be bfloat16)"
        )
    if s.model.compute_dtype == "float16":
        raise ValueError(
            "model.compute_dtype is float16, whose gradients underflow and overflow without loss scaling; use bfloat16"
            " or float32"
        )


def _check_sizes(s: Settings) -> None:
    c, rows, context = s.learner, s.learner.row_tokens, s.rollout.context_tokens
    if rows[-1] < context:
        raise ValueError(
            f"learner.row_tokens of {rows} end at less than rollout.context_tokens of {context}; a trajectory must fit"
            " a row, so raise the last to at least that"
        )
    if any(n % c.vocab_chunk for n in rows):
        raise ValueError(
            f"learner.vocab_chunk of {c.vocab_chunk} does not divide all learner.row_tokens of {rows}; use a divisor of"
            " them"
        )
    units = s.rollout.questions * (s.rollout.samples if c.minibatch_by == "trajectories" else 1)
    if units % c.updates_per_rollout:
        raise ValueError(
            f"{units} {c.minibatch_by} of a rollout do not divide into learner.updates_per_rollout ="
            f" {c.updates_per_rollout} mini-batches; use a divisor of them"
        )
    if s.algorithm.drop_equal_groups and s.rollout.samples == 1:
        raise ValueError(
            "algorithm.drop_equal_groups leaves nothing to learn from where rollout.samples is 1: a group of one has no"
            " variance; raise rollout.samples or set it to False"
        )


def _check_kl(s: Settings) -> None:
    a, trajectories = s.algorithm, s.rollout.questions * s.rollout.samples
    losses.find_kl(a.kl_estimator)
    if a.kl_coefficient and a.kl_in == "reward" and not advantages.find(a.advantage).of_tokens:
        raise ValueError(
            f"algorithm.kl_in is {a.kl_in!r}, but {a.advantage} advantages are made of the rewards of whole"
            ' trajectories or turns and would leave the KL out; set it to "loss"'
        )
    if a.kl_coefficient and a.kl_in == "loss" and a.kl_estimator == "k1":
        raise ValueError(
            'algorithm.kl_estimator is "k1" with algorithm.kl_in "loss": its gradient there is zero on average and'
            ' holds nothing back; use "k2" or "k3", or put it in the "reward"'
        )
    if a.kl_target and not a.kl_coefficient:
        raise ValueError(
            f"algorithm.kl_coefficient of 0 stays 0, as it adapts to algorithm.kl_target of {a.kl_target:g} by factors;"
            " set a start above 0, or algorithm.kl_target to 0"
        )
    if a.kl_target and trajectories >= 5 * a.kl_horizon:
        raise ValueError(
            f"a step of {trajectories} trajectories could bring the KL coefficient to 0 with algorithm.kl_horizon"
            f" {a.kl_horizon}; set it to more than {trajectories // 5}"
        )


def _check_effects(s: Settings) -> None:
    if 0 < s.algorithm.dual_clip <= 1:
        raise ValueError(
            f"algorithm.dual_clip of {s.algorithm.dual_clip} would stop bad tokens from getting less likely; set it"
            " above 1 (3 is common), or to 0 for none"
        )
    beside = without_effect(s)
    for key, plain in zip(settings_lib.keys(s), settings_lib.keys(Settings()), strict=True):
        if key.name in beside and key.value != plain.value:
            raise ValueError(f"{key.name} of {key.value} has no effect {beside[key.name]}; leave it at {plain.value}")


def without_effect(s: Settings) -> dict[str, str]:
    """The keys that change nothing beside the others, and beside what.

    Raises:
      ValueError: where the advantage or the policy loss is none.
    """
    a, guard, found = s.algorithm, s.guard, {}
    row, loss = advantages.find(a.advantage), losses.find_policy_loss(a.policy_loss)
    ignored = [] if row.of_tokens else ["algorithm.whiten", "algorithm.mask_estimates"]
    ignored += ["algorithm.discount", "algorithm.gae_lambda"] if row.of_trajectories else []
    ignored += [] if row.needs_value else ["algorithm.value_clip", "learner.value_warmup_steps"]
    ignored += [f"algorithm.{name}" for name in row.ignores]
    found |= dict.fromkeys(ignored, f"with algorithm.advantage = {a.advantage!r}")
    ignored = [f"algorithm.{name}" for name in loss.ignores]
    found |= dict.fromkeys(ignored, f"with algorithm.policy_loss = {a.policy_loss!r}")
    if not a.kl_target:
        found["algorithm.kl_horizon"] = "without algorithm.kl_target"
    if a.aggregation != "constant":
        found["algorithm.constant_tokens"] = f"with algorithm.aggregation = {a.aggregation!r}"
    if not a.kl_coefficient:
        found["guard.kl"] = "with algorithm.kl_coefficient = 0, as there is no reference"
    if not any((guard.kl, guard.entropy_low, guard.entropy_high, guard.gradient_norm)):
        found["guard.rollbacks"] = "without a limit in the section guard"
    return found
