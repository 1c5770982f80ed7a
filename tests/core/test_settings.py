"""Settings: every key once, with rules that are kept; what config files and JSON hold becomes settings, or an error."""

import dataclasses
import json

import ml_collections
import pytest

from configs import base
from searchr1_jax.core import settings

DEFAULT = settings.Settings()
KEYS = {key.name: key for key in settings.keys(DEFAULT)}


def test_a_config_dict_and_json_give_the_same_settings_back():
    assert settings.Settings.of(base.get_config()) == DEFAULT
    changed = DEFAULT.replace({"rollout.extend_chunks": (8, 9), "policy.learning_rate": 1, "seed": 3})
    assert settings.Settings.of(json.loads(json.dumps(changed.as_json()))) == changed
    assert changed.rollout.extend_chunks == (8, 9) and type(changed.policy.learning_rate) is float
    assert settings.Settings.of(ml_collections.ConfigDict(dataclasses.asdict(changed))) == changed


def test_what_is_left_out_has_its_default():
    assert settings.Settings.of({"rollout": {"slots": 8}}) == DEFAULT.replace({"rollout.slots": 8})


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("rollout.slotz", 8, r"the config has no key rollout.slotz; did you mean rollout.slots\?"),
        ("algorithm.trace_decay", 1.0, "the key algorithm.trace_decay is now called algorithm.gae_lambda"),
        ("sft.optimizer.final_share", 1.0, "now called sft.optimizer.final_lr_fraction"),
        ("rollout.slots", 8.5, "rollout.slots is 8.5; make it of type int"),
        ("rollout.slots", True, "rollout.slots is True; make it of type int"),
        ("model.remat", 1, "model.remat is 1; make it of type bool"),
        ("model.path", None, "model.path is None; make it of type str"),
        ("data.train", "train.jsonl", "data.train is 'train.jsonl'; make it a tuple of type str"),
        ("learner.row_tokens", (64, "x"), "learner.row_tokens is 'x'; make it of type int"),
        ("rollout", 3, "rollout is 3, and it is a section"),
        ("rollout.slots", 0, "rollout.slots is 0; set it to at least 1"),
        ("rollout.max_turns", -1, "rollout.max_turns is -1; set it to at least 0"),
        ("algorithm.clip_low", -0.2, "algorithm.clip_low is -0.2; set it to at least 0"),
        ("rollout.temperature", 0.0, "rollout.temperature is 0.0; set it above 0"),
        ("rollout.top_p", 1.5, "rollout.top_p is 1.5; set it to at most 1"),
        ("policy.learning_rate", float("nan"), "policy.learning_rate is nan; set a finite number"),
        ("model.actor_dtype", "bf16", r"is 'bf16'; choose from \['float32', 'bfloat16', 'float16'\]"),
        (
            "learner.offload",
            ("weights",),
            r"learner.offload is \('weights',\); choose from \['reference', 'optimizer'\]",
        ),
        ("rollout.extend_chunks", (16, 16), "each larger than the one before"),
        ("protocol.information", "none", r"protocol.information is 'none'; put \{docs\} into it, exactly once"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_remedy(name, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        DEFAULT.replace({name: value})


def test_every_key_that_had_another_name_is_known_by_the_new_one():
    assert set(settings.RENAMED.values()) <= KEYS.keys() and not settings.RENAMED.keys() & KEYS.keys()


def test_every_key_says_whether_it_may_change_when_a_run_goes_on():
    kinds = {name: key.rules["resume"] for name, key in KEYS.items()}
    assert set(kinds.values()) == {settings.FREE, settings.LAST_BITS, settings.ACCEPTED, settings.FIXED}
    expected = {
        "checkpoint.keep": settings.FREE, "retriever.url": settings.FREE, "sft.optimizer.b1": settings.FREE,
        "rollout.slots": settings.LAST_BITS, "learner.micro_batch_rows": settings.LAST_BITS,
        "policy.learning_rate": settings.ACCEPTED, "guard.kl": settings.ACCEPTED,
        "model.path": settings.FIXED, "data.train": settings.FIXED, "seed": settings.FIXED,
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected
