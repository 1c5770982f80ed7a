"""Checks of a config: each fault is refused with its values and the remedy."""

import pytest

from configs import base, presets, quickstart, search_r1, world_hard
from searchr1_jax.core import settings
from searchr1_jax.run import checks

FAULTS = [
    ({"rollout.max_turn_tokens": 4096}, "rollout.max_turn_tokens of 4096 leaves no room for a prompt .* lower it or"),
    ({"sft.mixture_guess": 0.6}, r"sft.mixture_\* are \[0.3, 0.6, 0.05, 0.15\], which add up to 1.1; make it 1"),
    ({"protocol.template_date": "26 Jul"}, "protocol.template_date is '26 Jul'; write it 2024-07-26"),
    ({"protocol.template_arguments": ("thinking",)}, "protocol.template_arguments holds 'thinking'; write name=value"),
    ({"model.attention": "flash"}, r"model.attention is 'flash'; choose from \['auto', 'xla', "),
    ({"rollout.questions": 511}, "511 questions of a rollout do not divide"),  # of learning: see its own tests
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
