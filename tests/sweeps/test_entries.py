"""searchr1_jax/sweeps/entries.py: what a config file asks for, and what counts as done."""

import json
import pathlib
import sys
from unittest import mock

from absl import flags
from ml_collections import config_flags
import pytest

from configs import study
from searchr1_jax.core import settings as settings_lib
from searchr1_jax.sweeps import entries


def _parsed(entry: entries.Entry) -> settings_lib.Settings:
    """What a command makes of an entry's flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
    with mock.patch.object(sys, "argv", ["command", *entry.flags]):  # where it looks for the keys that are overridden
        values(sys.argv)
    return settings_lib.Settings.of(values.config)


def test_flags_say_what_the_changes_said(place):
    place.write(
        'add("a", "algorithm=rloo", seed=3, data=dict(train=["a.jsonl", "b c.jsonl"], demonstrations=()),'
        ' **{"learner.row_tokens": (192,), "policy.learning_rate": 1e-05, "log.compilation_cache": False,'
        ' "rollout.temperature": 2, "protocol.prompt": "Q: {question}\\n", "retriever.url": ""})'
    )
    (entry,) = entries.read(place.config)
    assert _parsed(entry) == entry.settings
    assert entry.settings.data.train == ("a.jsonl", "b c.jsonl") and entry.settings.protocol.prompt == "Q: {question}\n"
    assert entry.settings.rollout.temperature == 2.0 and entry.settings.algorithm.advantage == "leave_one_out"


def test_another_world_and_other_passages_have_a_base_of_their_own_and_other_limits_have_not(place):
    place.write(
        'add("a")',
        'add("b", **{"world.persons": 50})',
        'add("c", learner=dict(micro_batch_rows=8))',
        'add("d", rollout=dict(max_information_tokens=72, passages=3))',
    )
    a, b, c, d = (entry.base for entry in entries.read(place.config))
    assert a == c and len({a.name, b.name, d.name}) == 3
    assert a.flags == (f"--config={place.config}",)
    assert b.flags == (f"--config={place.config}", "--config.world.persons=50")
    assert d.settings.rollout.passages == 3 and d.settings.learner.micro_batch_rows == 16


def test_the_studys_runs_are_those_of_its_methods_from_two_bases():
    path = pathlib.Path(study.__file__)
    found = {entry.name: entry for entry in entries.read(path)}
    expected = {f"{name}-seed{seed}": seed for name, row in study.METHODS.items() for seed in range(row.seeds)}
    assert {name: entry.settings.seed for name, entry in found.items()} == expected and len(found) == 21
    assert all(_parsed(entry) == entry.settings for entry in found.values())
    bases = {name: entry.base.name for name, entry in found.items()}
    alone = bases.pop("top_3-seed0")  # passages are part of what a base is taught
    assert len(set(bases.values())) == 1 and alone not in bases.values()
    samples = [found[f"{name}-seed0"].settings.rollout.samples for name in ("grpo", "grpo_of_3", "grpo_of_1")]
    assert samples == [5, 3, 1]


# What is done.


def test_with_another_setting_that_a_run_may_go_on_with_its_commands_run_again(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    place.write('add("a", evaluation=dict(every=5))')
    assert do() == {} and place.asked() == ["a evaluate", "a train", "a evaluate"]


def test_a_base_is_not_made_again_for_settings_that_do_not_decide_it(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    place.write('add("a")', change="c.learner.steps = 90")
    assert do() == {} and place.asked() == ["a evaluate", "a train", "a evaluate"]


def test_what_was_done_before_a_key_was_there_or_had_its_name_is_not_done_again(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    old, new = "algorithm.trace_decay", "algorithm.gae_lambda"
    assert settings_lib.RENAMED[old] == new
    stamps = list(place.workdir.glob("*/done/*"))
    assert len(stamps) == 7  # two of the base, in its copy too, and three of the run
    for path in stamps:
        command, flags_, config = json.loads(path.read_text())
        assert config.pop("guard") == settings_lib.Settings().as_json()["guard"]
        config["algorithm"]["trace_decay"] = config["algorithm"].pop("gae_lambda")
        path.write_text(json.dumps([command, flags_, config]))
    assert do() == {} and place.asked() == []


# What is refused before anything runs.


@pytest.mark.parametrize(
    "calls, complaint",
    [
        (['add("a/b")'], "'a/b' cannot name a directory"),
        (['add("..")'], "'..' cannot name a directory"),
        (['add("a.log")'], "'a.log' cannot name a directory"),
        (['add("")'], "'' cannot name a directory"),
        (['add("_base-1")'], "'_base-1' cannot name a directory"),
        (['add("a" * 101)'], "use at most 100"),
        (['add("a")', 'add("A")'], "'A' is there twice"),
        (['add("a", rollout=dict(slotz=1))'], "'a': the config has no key rollout.slotz; did you mean rollout.slots"),
        (['add("a", **{"rollout.slotz": 1})'], "no key rollout.slotz"),
        (['add("a", rollout=3)'], "rollout is 3, and it is a section"),
        (['add("a", seed="one")'], "seed is 'one'; make it of type int"),
        (['add("a", rollout=dict(passages=0))'], "'a': rollout.passages is 0"),
        (['add("a", rollout=dict(max_turn_tokens=192))'], "'a': rollout.max_turn_tokens of 192 leaves no room"),
        (['add("a", "algorithm=a2c")'], "'a': config argument 'algorithm=a2c' is unknown"),
        (['add("a", model=dict(path="mine"))'], "model.path is 'mine', but runs of a sweep start from the base"),
        (["pass"], "adds nothing"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work_is_refused_by_name(place, do, calls, complaint):
    place.write('add("first")', *calls) if calls != ["pass"] else place.write(*calls)
    with pytest.raises(ValueError) as refused:
        do()
    assert complaint in str(refused.value)
    assert not place.workdir.exists() and place.asked() == []


def test_a_pattern_without_a_match_is_refused(place, do):
    place.write('add("a")', 'add("b")')
    with pytest.raises(ValueError, match="--only=c. matches none of the entries; they are a, b"):
        do(only=["a", "c*"])
    assert not place.workdir.exists()


def test_a_config_file_without_a_sweep_is_refused(place):
    (quiet := place.directory / "quiet.py").write_text("def get_config(arg): pass")
    with pytest.raises(ValueError, match="quiet.py defines no sweep; it needs get_config, sweep"):
        entries.read(quiet)
    with pytest.raises(ValueError, match="study.py:algorithm=grpo does not exist; name a file .* without an argument"):
        entries.read(pathlib.Path("study.py:algorithm=grpo"))


def test_a_run_that_began_with_another_base_is_refused_with_what_differs(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    place.write('add("a")', change="c.sft.drill_steps = 400")
    complaint = r"runs/a began with another base \(sft.drill_steps: 500 there, 400 now\); remove that directory, or"
    with pytest.raises(ValueError, match=complaint):
        do()
    assert place.asked() == []
