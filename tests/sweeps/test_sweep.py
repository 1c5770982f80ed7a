"""searchr1_jax/sweep.py: the command, with commands that only say they were asked, and once with the real ones."""

import json
import os
import subprocess
import sys
import types

import place as place_lib
import processes
import pytest

from searchr1_jax import sweep
from searchr1_jax.sweeps import entries, finished_runs


def test_listing_runs_nothing_and_says_how_far_each_is(place, do):
    place.write('add("a")', 'add("b")', 'add("c", seed=3)')
    place.tell("fail-b-train")
    assert do(only=["a", "b"]).keys() == {"b"}
    place.asked()
    lines = sweep.listing(place.workdir, sweep.plan(place.config, place.workdir)).splitlines()
    states = [line.split("--config")[0].split() for line in lines]
    assert states == [["a", "done"], ["b", "after", "evaluate-base"], ["c", "to", "do"]]
    assert lines[2].endswith(f"--config={place.config} --config.seed=3") and place.asked() == []


@pytest.mark.parametrize("told, status", [("none", 0), ("fail-a-train", 1), ("stop-a-train", 130)])
def test_the_status_says_how_it_ended(place, do, monkeypatch, capsys, told, status):
    place.write('add("a")')
    place.tell(told, "TERM")
    given = types.SimpleNamespace(config=place.config, workdir=place.workdir, only=[], jobs=1, list=False)
    monkeypatch.setattr(sweep.flags, "FLAGS", given)
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    assert ended.value.code == status
    assert ("start again with the same command" in capsys.readouterr().err) == (status == 130)


TINY = {
    "world.persons": 40, "world.companies": 40, "world.vocab_size": 300, "world.width": 32, "world.layers": 1,
    "world.mlp_width": 48, "rollout.questions": 2, "rollout.slots": 4, "rollout.extend_rows": 4,
    "rollout.extend_chunks": (32,), "rollout.context_tokens": 128, "rollout.max_turn_tokens": 12,
    "rollout.max_information_tokens": 24, "rollout.decode_tokens": 8, "learner.steps": 1, "learner.row_tokens": (128,),
    "learner.vocab_chunk": 128, "learner.micro_batch_rows": 2, "learner.updates_per_rollout": 1,
    "evaluation.questions": 2, "evaluation.first": False, "data.test": ("validation.jsonl",),
    "sft.drill_steps": 1, "sft.mixture_steps": 1, "sft.batch": 2,
}  # fmt: skip


@pytest.mark.slow
def test_a_real_run_goes_through_the_real_commands_started_from_any_directory(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "from configs import quickstart\n\ndef get_config(arg=''):\n    c = quickstart.get_config(arg)\n"
        f"    c.update_from_flattened_dict({TINY})\n    return c\n\n"
        "def sweep(add):\n    add('ppo-seed1', seed=1)\n"
    )
    command = [sys.executable, "-m", "searchr1_jax.sweep", "--config=tiny.py", "--workdir=runs"]
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": processes.COMPILED_QUICKLY}
    env = one_device | {"PYTHONPATH": str(place_lib.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "ppo-seed1"
    found = finished_runs.read_run(run)
    assert found.seed == 1 and [row["step"] for row in found.rows] == [1]
    assert json.loads((run / "eval" / "final-greedy.json").read_text())["n"] == found.evaluations["base-greedy"]["n"]
    assert all(step.is_done(entry, run) for entry in entries.read(tmp_path / "tiny.py") for step in entry.steps)
