"""searchr1_jax/study.py, on logs written by hand, and the study that configs/study.py describes."""

import pytest
import written_runs

from configs import study as config
from searchr1_jax import study
from searchr1_jax.sweeps import finished_runs


def test_a_config_that_names_methods_it_does_not_describe_is_refused(tmp_path):
    (path := tmp_path / "mine.py").write_text(
        "from searchr1_jax.sweeps import claims\n"
        "METHODS = {'a': claims.Method(title='A', claims=(claims.Claim(against='b'),))}\n"
        "PAPERS, PANELS = 'Somebody.', {'all': ('a', 'c')}\n"
    )
    with pytest.raises(ValueError, match="claims or PANELS of .*mine.py name b, c, which METHODS lacks; it has a"):
        study.Study.read(path)
    path.write_text("METHODS = {}")
    with pytest.raises(ValueError, match="mine.py defines no PAPERS and no PANELS"):
        study.Study.read(path)


def test_the_table_has_means_and_where_seeds_differ_their_range(tmp_path):
    for seed, em in enumerate([0.9, 0.91, 0.95]):
        written_runs.write(tmp_path, f"ppo-seed{seed}", em=em)
    written_runs.write(tmp_path, "gspo-seed0", em=1.0)
    head, _, ppo, gspo = study.figures(config.METHODS, finished_runs.read(tmp_path, config.METHODS)[0]).splitlines()
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
        written_runs.write(runs, name, em=em)
    (runs / "rloo-seed0" / "config.json").unlink()
    (runs / "_base-12345678").mkdir()
    (runs / "_base-12345678" / "verbs.jsonl").write_text('{"verb": "sft", "seconds": 3600, "peak_memory_gb": 2}\n')
    (tmp_path / "README.md").write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    files = study.run("configs/study.py", "runs", readme="README.md")
    assert [str(path) for path in files] == ["docs/study.md", "docs/study.png", "README.md"]
    return tmp_path


def test_the_document_says_its_command_its_findings_and_what_is_missing(written):
    text = (written / "docs" / "study.md").read_text()
    assert text.startswith("# A study in the quickstart's world: one algorithm and one setting after another\n")
    made = "Written by `python -m searchr1_jax.study --workdir=runs` from the logs of the runs of `configs/study.py`;"
    assert made in text and config.PAPERS in text
    assert "![Held-out exact match and searches by step](study.png)" in text
    assert (written / "docs" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "All verbs together took 2.5 hours; the largest peak memory of one was 2.00 GB." in text
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
