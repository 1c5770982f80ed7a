"""Checks of the settings of learning: each fault is refused with its values and the remedy."""

import pytest

from searchr1_jax.core import settings
from searchr1_jax.learning import checks

GROUPS = {"algorithm.advantage": "group_mean", "algorithm.kl_in": "loss", "algorithm.kl_estimator": "k3"}
TURNS = GROUPS | {"algorithm.advantage": "turn_returns"}
FAULTS = [
    (
        {"learner.row_tokens": (512, 2048)},
        r"learner.row_tokens of \(512, 2048\) end at less than rollout.context_tokens of 4096; .* raise",
    ),
    (
        {"learner.vocab_chunk": 500},
        r"learner.vocab_chunk of 500 does not divide all learner.row_tokens of \(1024, 2048, 4096\); use a div",
    ),
    ({"rollout.questions": 511}, "511 questions of a rollout do not divide into learner.updates_per_rollout = 2 mini-"),
    (
        {"rollout.questions": 3, "rollout.samples": 3, "learner.minibatch_by": "trajectories"},
        "9 trajectories of a rollout do not divide into learner.updates_per_rollout = 2 mini-",
    ),
    (
        {"algorithm.drop_equal_groups": True},
        "drop_equal_groups leaves nothing to learn from where rollout.samples is 1: .* raise rollout.samples",
    ),
    (
        {"algorithm.advantage": "group_standardised"},
        "algorithm.kl_in is 'reward', but group_standardised .* would leave the KL out; set it to \"loss\"",
    ),
    ({"algorithm.advantage": "turn_returns"}, "algorithm.kl_in is 'reward', but turn_returns .* leave the KL out"),
    (
        {"algorithm.kl_in": "loss"},
        'algorithm.kl_estimator is "k1" with algorithm.kl_in "loss": .* use "k2" or "k3", or put it in the "reward"',
    ),
    ({"algorithm.kl_estimator": "k4"}, "algorithm.kl_estimator names 'k4'; make it one of k1, k2, k3, or package"),
    ({"algorithm.advantage": "gea"}, "algorithm.advantage names 'gea'; make it one of gae, return, group_.*package"),
    (
        {"algorithm.policy_loss": "ppo"},
        "algorithm.policy_loss names 'ppo'; make it one of ppo_clip, gspo_clip, or pack",
    ),
    (
        {"algorithm.kl_coefficient": 0.0, "algorithm.kl_target": 0.5},
        "algorithm.kl_coefficient of 0 stays 0, .* algorithm.kl_target of 0.5 by factors; set a start above 0, or",
    ),
    (
        {"algorithm.kl_target": 0.5, "algorithm.kl_horizon": 102},  # five times 102 are less than 512
        "step of 512 trajectories could bring the KL coefficient to 0 with .*kl_horizon 102; set it to more than 102",
    ),
    ({"algorithm.kl_horizon": 99}, "algorithm.kl_horizon of 99 has no effect without algorithm.kl_target; .* at 10000"),
    ({"algorithm.dual_clip": 0.9}, "dual_clip of 0.9 would stop bad tokens .*; set it above 1 .*, or to 0 for none"),
    (
        {"algorithm.dual_clip": 3.0, "algorithm.policy_loss": "gspo_clip"},
        "algorithm.dual_clip of 3.0 has no effect with algorithm.policy_loss = 'gspo_clip'; leave it at 0.0",
    ),
    (
        GROUPS | {"learner.value_warmup_steps": 2},
        "learner.value_warmup_steps of 2 has no effect with algorithm.advantage = 'group_mean'; leave it at 0",
    ),
    (GROUPS | {"algorithm.gae_lambda": 0.9}, "algorithm.gae_lambda of 0.9 has no effect with .* 'group_mean'; .* 1.0"),
    (TURNS | {"algorithm.gae_lambda": 0.9}, "algorithm.gae_lambda of 0.9 has no effect with .* 'turn_returns'"),
    (
        {"algorithm.advantage": "return", "algorithm.gae_lambda": 0.9},
        "algorithm.gae_lambda of 0.9 has no effect with algorithm.advantage = 'return'",
    ),
    (GROUPS | {"algorithm.discount": 0.9}, "algorithm.discount of 0.9 has no effect with .* 'group_mean'"),
    (GROUPS | {"algorithm.mask_estimates": False}, "algorithm.mask_estimates of False has no effect .* at True"),
    (TURNS | {"algorithm.whiten": False}, "algorithm.whiten of False has no effect with .* 'turn_returns'; .* at True"),
    (GROUPS | {"algorithm.value_clip": 0.2}, "algorithm.value_clip of 0.2 has no effect with .* 'group_mean'"),
    (
        {"algorithm.constant_tokens": 9},
        "algorithm.constant_tokens of 9 has no effect with algorithm.aggregation = 'token_mean'; leave it at 0",
    ),
    (
        {"algorithm.kl_coefficient": 0.0, "guard.kl": 0.5},
        "guard.kl of 0.5 has no effect with algorithm.kl_coefficient = 0, as there is no reference; leave it at 0.0",
    ),
    ({"model.param_dtype": "bfloat16"}, "model.param_dtype is bfloat16, .* rounded away: .* kept in float32"),
    ({"model.param_dtype": "float16"}, "model.param_dtype is float16, .* rounded away: .* kept in float32"),
    ({"model.compute_dtype": "float16"}, "model.compute_dtype is float16, .* use bfloat16 or float32"),
    ({"guard.rollbacks": 2}, "guard.rollbacks of 2 has no effect without a limit in the section guard; leave it at 0"),
]


@pytest.mark.parametrize("changes, message", FAULTS)
def test_a_fault_is_refused_with_its_values_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check(settings.Settings().replace(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GROUPS,
        TURNS | {"algorithm.discount": 0.9},
        {"algorithm.advantage": "return", "algorithm.discount": 0.9, "algorithm.whiten": False},
        {"algorithm.gae_lambda": 0.9, "learner.value_warmup_steps": 2, "algorithm.dual_clip": 3.0},
        {"algorithm.kl_target": 0.5, "algorithm.kl_horizon": 103},
        {"guard.kl": 0.5, "guard.rollbacks": 2},
    ],
)
def test_what_has_an_effect_passes(changes):
    checks.check(settings.Settings().replace(changes))
