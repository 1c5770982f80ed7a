"""Checks of a config: each fault is refused with its values and the remedy."""

import pytest

from configs import base
from configs import presets
from configs import quickstart
from configs import search_r1
from configs import world_hard
from searchr1_jax.core import settings
from searchr1_jax.run import checks

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
    ({"rollout.max_turn_tokens": 4096}, "rollout.max_turn_tokens of 4096 leaves no room for a prompt .* lower it or"),
    ({"rollout.temperature": 0.0}, "rollout.temperature is 0.0; set it above 0"),
    ({"rollout.extend_chunks": (64, 16)}, r"rollout.extend_chunks is \(64, 16\); .* each larger than the one before"),
    ({"learner.row_tokens": (4096, 1024)}, r"learner.row_tokens is \(4096, 1024\); .* each larger than the one before"),
    (
        {"algorithm.drop_equal_groups": True},
        "drop_equal_groups leaves nothing to learn from where rollout.samples is 1: .* raise rollout.samples",
    ),
    ({"rollout.extend_chunks": ()}, r"rollout.extend_chunks is \(\); give at least one number"),
    ({"rollout.extend_chunks": (0, 16)}, r"rollout.extend_chunks is \(0, 16\); set it to at least 1"),
    ({"sft.mixture_guess": 0.6}, r"sft.mixture_\* are \[0.3, 0.6, 0.05, 0.15\], which add up to 1.1; make it 1"),
    (
        {"algorithm.advantage": "group_standardised"},
        "algorithm.kl_in is 'reward', but group_standardised .* would leave the KL out; set it to \"loss\"",
    ),
    (
        {"algorithm.kl_in": "loss"},
        'algorithm.kl_estimator is "k1" with algorithm.kl_in "loss": .* use "k2" or "k3", or put it in the "reward"',
    ),
]


@pytest.mark.parametrize("changes, message", FAULTS)
def test_a_fault_is_refused_with_its_values_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        checks.check(settings.Settings().replace(changes))


@pytest.mark.parametrize("module", [base, quickstart, search_r1, world_hard])
def test_our_own_configs_pass(module):
    checks.check(settings.Settings.of(module.get_config()))


@pytest.mark.parametrize("module", [quickstart, search_r1, world_hard])
@pytest.mark.parametrize("algorithm", presets.ALGORITHMS)
def test_our_own_configs_pass_with_every_algorithm(module, algorithm):
    checks.check(settings.Settings.of(module.get_config(f"algorithm={algorithm}")))
