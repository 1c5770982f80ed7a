"""The example of a study: what its sweep would run, and the document that is made of finished runs."""

from sweeps import written_runs

from examples import study as example
from searchr1_jax import study, sweep

CONFIG = "examples/study.py"


def test_every_run_has_the_settings_of_its_method(tmp_path):
    runs = {run.name: run.settings for run in sweep.plan(CONFIG, tmp_path)}
    assert sorted(runs) == [f"{method}-seed{seed}" for method in ("outcome", "turns") for seed in range(3)]
    chosen = {name: (s.algorithm.advantage, s.reward.name) for name, s in runs.items()}
    assert chosen["outcome-seed2"] == ("group_standardised", "exact_match")
    assert chosen["turns-seed2"] == ("turn_returns", "examples.turn_reward:found_then_answered")


def test_finished_runs_become_a_table_a_picture_and_a_verdict(tmp_path):
    for seed in range(3):
        written_runs.write(tmp_path, f"outcome-seed{seed}", em=0.5)
        written_runs.write(tmp_path, f"turns-seed{seed}", em=0.9)
    files = study.run(CONFIG, tmp_path, document=tmp_path / "study.md")
    text = files[0].read_text()
    assert text.startswith("# A study of one's own") and files[1].stat().st_size > 10_000
    assert all(method.title in text for method in example.METHODS.values())
    assert "ends higher" in text
