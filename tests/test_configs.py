"""The configs: every key once, in base.py; arguments are refused by name; nothing heavy is imported."""

import pathlib
import subprocess
import sys

import pytest

from configs import base, presets, quickstart, search_r1, world_hard

ROOT = pathlib.Path(base.__file__).parent.parent


def _types(config, prefix=""):
    """{"rollout.slots": int, …}"""
    found = {}
    for key, value in config.items():
        nested = hasattr(value, "items")
        found |= _types(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": type(value)}
    return found


@pytest.mark.parametrize("module", [quickstart, search_r1, world_hard])
@pytest.mark.parametrize("arg", ["", "algorithm=ppo", "algorithm=grpo"])
def test_a_config_has_the_keys_and_types_of_base_and_no_others(module, arg):
    assert _types(module.get_config(arg)) == _types(base.get_config())


def test_the_argument_chooses_the_algorithm():
    ppo, grpo = (quickstart.get_config(f"algorithm={name}") for name in ("ppo", "grpo"))
    assert (ppo.algorithm.advantage, ppo.algorithm.kl_in) == ("gae", "reward")
    assert (grpo.algorithm.advantage, grpo.algorithm.kl_in) == ("group_standardised", "loss")
    assert ppo.rollout.samples == 1 and grpo.rollout.samples > 1
    assert quickstart.get_config().to_dict() == ppo.to_dict()


@pytest.mark.parametrize("arg", ["algorithm=a2c", "algoritm=ppo", "grpo", "algorithm=ppo,model=x"])
def test_an_argument_that_no_preset_has_is_refused_by_name(arg):
    culprit = arg.split(",")[-1]
    with pytest.raises(ValueError, match=rf"config argument '{culprit}' is unknown; use algorithm=ppo\|grpo\|rloo"):
        quickstart.get_config(arg)
    assert list(presets.ALGORITHMS)[:3] == ["ppo", "grpo", "rloo"]


def test_a_config_is_read_without_importing_anything_heavy():
    heavy = ("jax", "flax", "optax", "transformers", "tensorflow_datasets", "grain", "orbax")
    program = (
        "import sys; from configs import quickstart, search_r1; quickstart.get_config('algorithm=grpo');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
