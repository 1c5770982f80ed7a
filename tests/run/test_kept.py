"""Episodes of an evaluation that is ended early: none is lost, none is played twice, and the figures are the same."""

import pytest

from searchr1_jax.bench import evaluation as bench
from searchr1_jax.run import kept


def test_what_was_added_is_there_after_a_kill_and_a_line_cut_short_is_not(tmp_path):
    path = tmp_path / "eval" / "final.jsonl"
    first = kept.Kept(path, {"seed": 0})
    first.add(("b/2", 0), {"em": 1.0}, {"id": "b/2", "text": "é\t\n"})
    first.add(("b/1", 1), {"em": 0.0}, {"id": "b/1"})
    part = path.with_suffix(".parts") / "00000.jsonl"
    whole = part.read_bytes()
    for length in (1, 12, 40):  # of a third line that is being written
        part.write_bytes(whole + whole[:length])
        again = kept.Kept(path, {"seed": 0})
        assert again.figures == {("b/2", 0): {"em": 1.0}, ("b/1", 1): {"em": 0.0}}
        again.close()
        assert part.read_bytes() == whole
    again = kept.Kept(path, {"seed": 0})
    again.add(("a/3", 0), {"em": 1.0}, {"id": "a/3"})
    again.merge(write=True)
    assert path.read_text() == '{"id": "a/3"}\n{"id": "b/1"}\n{"id": "b/2", "text": "\\u00e9\\t\\n"}\n'
    assert [p.name for p in path.parent.iterdir()] == ["final.jsonl"]


def test_parts_of_more_processes_than_there_are_now_count_too(tmp_path):
    path = tmp_path / "final.jsonl"
    kept.Kept(path, {}).close()
    for number in (1, 2):
        (path.with_suffix(".parts") / f"0000{number}.jsonl").write_text(f'[["q/{number}", 0], {{}}]\t{number}\n')
    again = kept.Kept(path, {})
    assert again.figures == {("q/1", 0): {}, ("q/2", 0): {}}
    again.merge(write=True)
    assert path.read_text() == "1\n2\n"


def test_episodes_of_another_policy_are_dropped(tmp_path):
    first = kept.Kept(tmp_path / "final.jsonl", {"step": 1})
    first.add(("q/1", 0), {}, {})
    first.close()
    assert kept.Kept(tmp_path / "final.jsonl", {"step": 2}).figures == {}


@pytest.mark.slow
def test_an_evaluation_that_is_killed_at_random_ends_with_the_same_bytes(tmp_path):
    figures = bench.measure(tmp_path, 400, 200, kills=2)
    assert figures["same_figures"] == 1.0 and figures["written_gb"] > 0
