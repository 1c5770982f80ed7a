"""searchr1_jax/study.py and the band of curves.py, on logs written by hand."""

import json
import pathlib
import types

import pytest

from searchr1_jax import study
from searchr1_jax.run import curves
from searchr1_jax.sweeps import claims
from searchr1_jax.sweeps import finished_runs

STEPS = 40


def _write(
    workdir: pathlib.Path,
    name: str,
    *,
    em: float,
    validations=(0.2, 0.5, 0.7, 0.8, 0.9),
    searches=1.5,
    **config,
) -> pathlib.Path:
    """A finished run, greedy and sampled alike: 800 test questions, and 200 validation questions every tenth step."""
    run = workdir / name
    (run / "eval").mkdir(parents=True)
    settings = {"seed": int(name[-1]), "learner": {"steps": STEPS}} | config
    (run / "config.json").write_text(json.dumps(settings))
    figures = {"base": (0.1, 0.25), "final": (em, searches)}
    for which, (value, asked) in figures.items():
        for decoding in ("greedy", "sampled"):
            hops = {"1": value, "2": value}
            found = {"n": 800, "em": value, "em_by_hops": hops, "searches": asked}
            (run / "eval" / f"{which}-{decoding}.json").write_text(json.dumps(found))
    (run / "eval" / "validation-sampled-step000000.json").write_text('{"n": 200}')
    rows = [{"step": 0}] + [{"step": i, "seconds/rollout": 0.25, "seconds/learning": 1.0} for i in range(1, STEPS + 1)]
    for row, value in zip(rows[::10], validations, strict=True):
        row |= {"eval/sampled/em": value, "eval/sampled/searches": 2 * value}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "verbs.jsonl").write_text('{"verb": "train", "seconds": 1800.0, "peak_memory_gb": 1.25}\n')
    return run


def _finding(workdir: pathlib.Path, method: str, title: str) -> claims.Finding | None:
    (claim,) = [c for c in claims.CLAIMS if c.method == method and c.title == title]
    return claims.judge(claim, finished_runs.read(workdir)[0])


# The rule.


def test_masking_agrees_where_every_seed_shows_it_by_more_than_the_spread(tmp_path):
    for seed, (masked, unmasked) in enumerate([(0.92, 0.82), (0.90, 0.80), (0.91, 0.78)]):
        _write(tmp_path, f"ppo-seed{seed}", em=masked)
        _write(tmp_path, f"unmasked-seed{seed}", em=unmasked)
    found = _finding(tmp_path, "unmasked", "masking helps")
    # Spreads: .02 and .04. Errors: sqrt(.91 x .09 / 800 + .8 x .2 / 800) = .01739, twice that .03478.
    assert found.margin == pytest.approx(0.04)
    assert found.pairs == {0: (0.82, 0.92), 1: (0.80, 0.90), 2: (0.78, 0.91)}
    assert found.verdict == "agrees"
    assert ".820 and .920 (seed 0), .800 and .900 (seed 1), .780 and .910 (seed 2); margin .040" in found.sentence()


def test_one_seed_within_the_margin_is_enough_not_to_see_it(tmp_path):
    for seed, (masked, unmasked) in enumerate([(0.92, 0.82), (0.90, 0.80), (0.91, 0.875)]):
        _write(tmp_path, f"ppo-seed{seed}", em=masked)
        _write(tmp_path, f"unmasked-seed{seed}", em=unmasked)
    found = _finding(tmp_path, "unmasked", "masking helps")
    assert found.margin == pytest.approx(0.075)  # the spread of the unmasked
    assert found.verdict == "not seen here"


def test_where_the_other_way_holds_the_opposite_is_told(tmp_path):
    _write(tmp_path, "ppo-seed0", em=0.7)
    _write(tmp_path, "unmasked-seed0", em=0.8)
    found = _finding(tmp_path, "unmasked", "masking helps")
    assert found.margin == pytest.approx(2 * ((0.7 * 0.3 + 0.8 * 0.2) / 800) ** 0.5)  # .043: one seed has no spread
    assert found.verdict == "the opposite" and "**the opposite**" in found.sentence()


def test_a_difference_that_so_few_questions_show_by_chance_does_not_count(tmp_path):
    _write(tmp_path, "ppo-seed0", em=0.7)
    _write(tmp_path, "unmasked-seed0", em=0.66)  # .04 < .043
    assert _finding(tmp_path, "unmasked", "masking helps").verdict == "not seen here"


def test_only_seeds_that_both_have_are_compared(tmp_path):
    _write(tmp_path, "ppo-seed0", em=0.9)
    _write(tmp_path, "ppo-seed1", em=0.9)
    _write(tmp_path, "unmasked-seed1", em=0.5)
    assert list(_finding(tmp_path, "unmasked", "masking helps").pairs) == [1]
    assert _finding(tmp_path, "top_3", "three passages beat one") is None


def test_a_faster_start_is_the_mean_over_the_first_quarter(tmp_path):
    _write(tmp_path, "ppo-seed0", em=0.9, validations=(0.2, 0.4, 0.9, 0.9, 0.9))
    _write(tmp_path, "grpo-seed0", em=0.9, validations=(0.2, 0.8, 0.9, 0.9, 0.9))
    found = _finding(tmp_path, "grpo", "starts faster")  # a quarter of 40 steps: the evaluation at step 10
    assert found.pairs == {0: (0.8, 0.4)} and found.verdict == "agrees"
    assert found.margin == pytest.approx(2 * ((0.8 * 0.2 + 0.4 * 0.6) / 200) ** 0.5)


@pytest.mark.parametrize("last, verdict", [(0.4, "agrees"), (0.85, "not seen here")])
def test_a_collapse_is_an_end_below_the_best_on_the_way(tmp_path, last, verdict):
    _write(tmp_path, "grpo-seed0", em=0.9, validations=(0.2, 0.7, 0.9, 0.8, last))
    found = _finding(tmp_path, "grpo", "collapses later")
    assert found.pairs == {0: (last, 0.9)} and found.verdict == verdict


def test_what_the_papers_did_not_try_neither_agrees_nor_not(tmp_path):
    _write(tmp_path, "grpo-seed0", em=0.7)
    for method, em, verdict in (
        ("rloo", 0.9, "above"),
        ("dapo", 0.5, "below"),
        ("gspo", 0.7, "no difference seen"),
    ):
        _write(tmp_path, f"{method}-seed0", em=em)
        assert _finding(tmp_path, method, "against GRPO, groups of 5").verdict == verdict


def test_every_claim_is_about_methods_that_are_described():
    named = {name for claim in claims.CLAIMS for name in (claim.method, claim.against)}
    drawn = {name for names in study.PANELS.values() for name in names}
    assert named == drawn == finished_runs.METHODS.keys()


# Reading.


def test_runs_that_did_not_end_are_named_and_left_out(tmp_path):
    _write(tmp_path, "ppo-seed0", em=0.9)
    (_write(tmp_path, "ppo-seed1", em=0.9) / "eval" / "final-sampled.json").unlink()
    run = _write(tmp_path, "grpo-seed0", em=0.9)
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]))
    methods, unfinished = finished_runs.read(tmp_path)
    assert {method: [run.seed for run in runs] for method, runs in methods.items()} == {"ppo": [0]}
    assert unfinished == ["grpo-seed0", "ppo-seed1"]


def test_logs_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run in .*searchr1_jax/sweep.py --config=configs/study.py"):
        finished_runs.read(tmp_path)
    _write(tmp_path, "ppo-seed0", em=0.9, rollout={"passages": 1})
    odd = _write(tmp_path, "ppo-seed1", em=0.9, rollout={"passages": 3})
    with pytest.raises(ValueError, match="seeds 0 and 1 of ppo differ in rollout.passages: 1 there, 3 now"):
        finished_runs.read(tmp_path)
    odd.rename(tmp_path / "ppo-seed2")
    with pytest.raises(ValueError, match="ppo-seed2 holds a run of seed 1; name it ppo-seed1"):
        finished_runs.read(tmp_path)
    (tmp_path / "ppo-seed2").rename(tmp_path / "mine-seed1")
    with pytest.raises(ValueError, match="add 'mine' to METHODS"):
        finished_runs.read(tmp_path)
    (tmp_path / "mine-seed1").rename(tmp_path / "grpo-seed1")
    few = {"n": 100, "em": 0.9, "em_by_hops": {}, "searches": 1.0}
    (tmp_path / "grpo-seed1" / "eval" / "final-greedy.json").write_text(json.dumps(few))
    with pytest.raises(ValueError, match=r"evaluations are of \[100, 800\] questions; evaluate all on the same"):
        finished_runs.read(tmp_path)


# Writing.


def test_the_table_has_means_and_where_seeds_differ_their_range(tmp_path):
    for seed, em in enumerate([0.9, 0.91, 0.95]):
        _write(tmp_path, f"ppo-seed{seed}", em=em)
    _write(tmp_path, "gspo-seed0", em=1.0)
    head, _, ppo, gspo = study.figures(finished_runs.read(tmp_path)[0]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in row.split("|")[1:-1]] for row in (head, ppo)), strict=True))
    assert cells == {
        "method": "PPO", "seeds": "0, 1, 2", "base, greedy": ".100", "base, sampled": ".100",
        "greedy": ".920 (.900–.950)", "sampled": ".920 (.900–.950)", "1-hop, sampled": ".920 (.900–.950)",
        "2-hop, sampled": ".920 (.900–.950)", "searches, greedy": "1.50", "searches, sampled": "1.50",
        "seconds": "50",
    }  # fmt: skip
    assert gspo == "| GSPO | 0 | .100 | .100 | 1.000 | 1.000 | 1.000 | 1.000 | 1.50 | 1.50 | 50 |"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """What the command makes of two methods and an unfinished run, the README too; the base took an hour."""
    runs = tmp_path / "runs"
    for name, em in (("ppo-seed0", 0.9), ("unmasked-seed0", 0.6), ("rloo-seed0", 0.9)):
        _write(runs, name, em=em)
    (runs / "rloo-seed0" / "config.json").unlink()
    (runs / "_base-12345678").mkdir()
    (runs / "_base-12345678" / "verbs.jsonl").write_text('{"verb": "sft", "seconds": 3600, "peak_memory_gb": 2}\n')
    (tmp_path / "README.md").write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    given = {"_WORKDIR": "runs", "_DOCUMENT": "docs/study.md", "_README": True}
    for flag, value in given.items():
        monkeypatch.setattr(study, flag, types.SimpleNamespace(value=value, default="docs/study.md"))
    study.main([])
    return tmp_path


def test_the_document_says_its_command_its_findings_and_what_is_missing(written):
    text = (written / "docs" / "study.md").read_text()
    assert "`python -m searchr1_jax.study --workdir=runs`" in text
    assert "![Held-out exact match and searches by step](study.png)" in text
    assert (written / "docs" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "All verbs together took 2.0 hours; the largest peak memory of one was 2.00 GB." in text
    assert "**PPO, retrieved tokens not masked**\n\n* *masking helps*" in text and "**agrees**" in text
    assert "RLOO: against GRPO, groups of 5" in text.split("Not measured: ")[1]
    assert text.endswith("Not finished, and left out: rloo-seed0.\n")


def test_only_the_block_of_the_readme_changes(written):
    text = (written / "README.md").read_text()
    assert text.startswith("before\n<!-- study -->\n| exact match on 800 test questions |")
    assert text.endswith("|\n<!-- /study -->\nafter\n") and "old" not in text
    rows = text.splitlines()
    assert "| the base | 0 | .100 | .100 | 0.25 |  |  |" in rows
    assert "| PPO, retrieved tokens not masked | 0 | .600 | .600 | 1.50 | 50 | masking helps: agrees |" in rows
    study.update_block(written / "README.md", "new")
    assert (written / "README.md").read_text() == "before\n<!-- study -->\nnew\n<!-- /study -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- /study --><!-- study -->", "<!-- study --><!-- study --><!-- /study -->"])
def test_a_readme_without_its_marks_is_left_as_it_is(tmp_path, text):
    (path := tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="README.md needs <!-- study --> and, after it, <!-- /study -->, once each"):
        study.update_block(path, "new")
    assert path.read_text() == text


def test_a_band_holds_the_steps_that_all_runs_have():
    first = [{"step": 0, "em": 0.25}, {"step": 1}, {"step": 2, "em": 0.5}, {"step": 4, "em": 1.0}]
    second = [{"step": 0, "em": 0.75}, {"step": 1, "em": 0.3}, {"step": 2, "em": 0.5}]
    assert curves.band([first, second], "em") == curves.Band(
        steps=[0, 2], mean=[0.5, 0.5], low=[0.25, 0.5], high=[0.75, 0.5]
    )
