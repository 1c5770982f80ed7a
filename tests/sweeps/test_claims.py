"""searchr1_jax/sweeps/claims.py: the rule, on logs written by hand and the claims of configs/study.py."""

import pathlib

import pytest
import written_runs

from configs import study
from searchr1_jax.sweeps import claims, finished_runs


def _finding(workdir: pathlib.Path, method: str, title: str) -> claims.Finding:
    runs, _ = finished_runs.read(workdir, study.METHODS)
    (found,) = [finding for finding in claims.judge(study.METHODS, runs)[method] if finding.title == title]
    return found


def test_masking_agrees_where_every_seed_shows_it_by_more_than_the_spread(tmp_path):
    for seed, (masked, unmasked) in enumerate([(0.92, 0.82), (0.90, 0.80), (0.91, 0.78)]):
        written_runs.write(tmp_path, f"ppo-seed{seed}", em=masked)
        written_runs.write(tmp_path, f"unmasked-seed{seed}", em=unmasked)
    found = _finding(tmp_path, "unmasked", "masking helps")
    # Spreads: .02 and .04. Errors: sqrt(.91 x .09 / 800 + .8 x .2 / 800) = .01739, twice that .03478.
    assert found.margin == pytest.approx(0.04)
    assert found.pairs == {0: (0.82, 0.92), 1: (0.80, 0.90), 2: (0.78, 0.91)}
    assert found.verdict == "agrees"
    assert ".820 and .920 (seed 0), .800 and .900 (seed 1), .780 and .910 (seed 2); margin .040" in found.sentence()


def test_one_seed_within_the_margin_is_enough_not_to_see_it(tmp_path):
    for seed, (masked, unmasked) in enumerate([(0.92, 0.82), (0.90, 0.80), (0.91, 0.875)]):
        written_runs.write(tmp_path, f"ppo-seed{seed}", em=masked)
        written_runs.write(tmp_path, f"unmasked-seed{seed}", em=unmasked)
    found = _finding(tmp_path, "unmasked", "masking helps")
    assert found.margin == pytest.approx(0.075)  # the spread of the unmasked
    assert found.verdict == "not seen here"


def test_where_the_other_way_holds_the_opposite_is_told(tmp_path):
    written_runs.write(tmp_path, "ppo-seed0", em=0.7)
    written_runs.write(tmp_path, "unmasked-seed0", em=0.8)
    found = _finding(tmp_path, "unmasked", "masking helps")
    assert found.margin == pytest.approx(2 * ((0.7 * 0.3 + 0.8 * 0.2) / 800) ** 0.5)  # .043: one seed has no spread
    assert found.verdict == "the opposite" and "**the opposite**" in found.sentence()


def test_a_difference_that_so_few_questions_show_by_chance_does_not_count(tmp_path):
    written_runs.write(tmp_path, "ppo-seed0", em=0.7)
    written_runs.write(tmp_path, "unmasked-seed0", em=0.66)  # .04 < .043
    assert _finding(tmp_path, "unmasked", "masking helps").verdict == "not seen here"


def test_only_seeds_that_both_have_are_compared(tmp_path):
    written_runs.write(tmp_path, "ppo-seed0", em=0.9)
    written_runs.write(tmp_path, "ppo-seed1", em=0.9)
    written_runs.write(tmp_path, "unmasked-seed1", em=0.5)
    assert list(_finding(tmp_path, "unmasked", "masking helps").pairs) == [1]
    assert _finding(tmp_path, "top_3", "three passages beat one").pairs == {}


def test_a_faster_start_is_the_mean_over_the_first_quarter(tmp_path):
    written_runs.write(tmp_path, "ppo-seed0", em=0.9, validations=(0.2, 0.4, 0.9, 0.9, 0.9))
    written_runs.write(tmp_path, "grpo-seed0", em=0.9, validations=(0.2, 0.8, 0.9, 0.9, 0.9))
    found = _finding(tmp_path, "grpo", "starts faster")  # a quarter of 40 steps: the evaluation at step 10
    assert found.pairs == {0: (0.8, 0.4)} and found.verdict == "agrees"
    assert found.margin == pytest.approx(2 * ((0.8 * 0.2 + 0.4 * 0.6) / 200) ** 0.5)


@pytest.mark.parametrize("last, verdict", [(0.4, "agrees"), (0.85, "not seen here")])
def test_a_collapse_is_an_end_below_the_best_on_the_way(tmp_path, last, verdict):
    written_runs.write(tmp_path, "grpo-seed0", em=0.9, validations=(0.2, 0.7, 0.9, 0.8, last))
    found = _finding(tmp_path, "grpo", "collapses later")
    assert found.pairs == {0: (last, 0.9)} and found.verdict == verdict


def test_what_the_papers_did_not_try_neither_agrees_nor_not(tmp_path):
    written_runs.write(tmp_path, "grpo-seed0", em=0.7)
    for method, em, verdict in (("rloo", 0.9, "above"), ("dapo", 0.5, "below"), ("gspo", 0.7, "no difference seen")):
        written_runs.write(tmp_path, f"{method}-seed0", em=em)
        assert _finding(tmp_path, method, "against GRPO, groups of 5").verdict == verdict
