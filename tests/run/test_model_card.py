"""What a model's card says of how it was trained."""

import pytest

from configs import base, presets
from searchr1_jax.core import settings
from searchr1_jax.run import model_card, progress

NAMES = {
    "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++", "dr_grpo": "Dr. GRPO", "dapo": "DAPO",
    "gspo": "GSPO", "turn_grpo": "GRPO with rewards of turns",
}  # fmt: skip
ABOUT = progress.About(
    model={}, base="Ada/base", has_value_model=False, stream={}, step=4, owed=None,
    course=progress.Course(kl_coefficient=0.0),
)  # fmt: skip


def test_every_preset_has_a_name():
    assert NAMES.keys() == presets.ALGORITHMS.keys()


@pytest.mark.parametrize("preset, name", NAMES.items())
def test_a_card_names_the_algorithm_of_the_run(tmp_path, preset, name):
    config = base.get_config()
    presets.ALGORITHMS[preset](config)
    card = model_card.text(tmp_path, settings.Settings.of(config), ABOUT, name="model")
    assert f"`Ada/base`, trained by {name} for 4 steps" in card


def test_a_card_names_what_a_user_has_written_though_it_is_not_at_hand(tmp_path):
    own = {"algorithm.advantage": "not.here:mine"}
    card = model_card.text(tmp_path, settings.Settings().replace(own), ABOUT, name="model")
    assert "trained by not.here:mine for 4 steps" in card
