"""searchr1_jax/sweeps/finished_runs.py, on logs written by hand."""

import json

import pytest
import written_runs

from searchr1_jax.sweeps import finished_runs


def _read(workdir):
    return finished_runs.read(workdir, ["ppo", "grpo"])


def test_runs_that_did_not_end_are_named_and_left_out(tmp_path):
    written_runs.write(tmp_path, "ppo-seed0", em=0.9)
    (written_runs.write(tmp_path, "ppo-seed1", em=0.9) / "eval" / "final-sampled.json").unlink()
    run = written_runs.write(tmp_path, "grpo-seed0", em=0.9)
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]))
    methods, unfinished = _read(tmp_path)
    assert {method: [run.seed for run in runs] for method, runs in methods.items()} == {"ppo": [0]}
    assert unfinished == ["grpo-seed0", "ppo-seed1"]


def test_logs_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run in .*searchr1_jax.sweep with this --config"):
        _read(tmp_path)
    written_runs.write(tmp_path, "ppo-seed0", em=0.9, rollout={"passages": 1})
    odd = written_runs.write(tmp_path, "ppo-seed1", em=0.9, rollout={"passages": 3})
    with pytest.raises(ValueError, match="seeds 0 and 1 of ppo differ in rollout.passages: 1 there, 3 now"):
        _read(tmp_path)
    odd.rename(tmp_path / "ppo-seed2")
    with pytest.raises(ValueError, match="ppo-seed2 holds a run of seed 1; name it ppo-seed1"):
        _read(tmp_path)
    (tmp_path / "ppo-seed2").rename(tmp_path / "mine-seed1")
    with pytest.raises(ValueError, match="add 'mine' to METHODS"):
        _read(tmp_path)
    (tmp_path / "mine-seed1").rename(tmp_path / "grpo-seed1")
    few = {"n": 100, "em": 0.9, "em_by_hops": {}, "searches": 1.0}
    (tmp_path / "grpo-seed1" / "eval" / "final-greedy.json").write_text(json.dumps(few))
    with pytest.raises(ValueError, match=r"evaluations are of \[100, 800\] questions; evaluate all on the same"):
        _read(tmp_path)
