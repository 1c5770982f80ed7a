"""metrics.jsonl and verbs.jsonl."""

import json
import math
import time

import psutil
import pytest

from searchr1_jax.run import metrics


def _write(workdir, steps, *, resumed_at=0):
    writer = metrics.Writer(workdir, step=resumed_at)
    for step in steps:
        writer.write(step, {"reward": step / 10, "compiled_programs": 6})
    writer.close()


def _steps(workdir):
    return [row["step"] for row in metrics.read(workdir)]


def test_a_row_holds_the_step_and_its_values(tmp_path):
    _write(tmp_path, [0, 1])
    assert metrics.read(tmp_path) == [
        {"step": 0, "reward": 0.0, "compiled_programs": 6},
        {"step": 1, "reward": 0.1, "compiled_programs": 6},
    ]


def test_a_figure_that_is_no_number_is_valid_json_and_read_back_as_nan(tmp_path):
    with metrics.Writer(tmp_path, step=0) as writer:
        writer.write(0, {"reward": 1.0})
        writer.write(1, {"reward": math.nan, "policy/loss": -math.inf})
    for resumed in (False, True):
        if resumed:
            _write(tmp_path, [], resumed_at=1)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        never = lambda name: pytest.fail(f"{name} is no JSON")
        rows = [json.loads(line, parse_constant=never) for line in lines]
        assert rows[1] == {"step": 1, "reward": None, "policy/loss": None}
    assert math.isnan(metrics.read(tmp_path)[1]["reward"]) and metrics.read(tmp_path)[0]["reward"] == 1.0


def test_there_are_no_rows_before_the_first_run(tmp_path):
    assert metrics.read(tmp_path) == []


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    _write(tmp_path, [0, 1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    _write(tmp_path, [], resumed_at=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:3])
    _write(tmp_path, [3, 4], resumed_at=2)
    assert _steps(tmp_path) == [0, 1, 2, 3, 4]


def test_a_run_without_a_checkpoint_starts_the_file_anew(tmp_path):
    _write(tmp_path, [0, 1, 2])
    _write(tmp_path, [0])
    assert _steps(tmp_path) == [0]


@pytest.mark.parametrize("length", [1, 9, 30])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, length):
    _write(tmp_path, [0, 1, 2])
    whole = (tmp_path / "metrics.jsonl").read_text()
    last = whole.splitlines()[-1]
    (tmp_path / "metrics.jsonl").write_text(whole[: -len(last) - 1] + last[:length])
    assert _steps(tmp_path) == [0, 1]
    _write(tmp_path, [2], resumed_at=1)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_a_verb_that_ends_or_is_interrupted_leaves_its_seconds_and_memory_and_one_that_fails_does_not(tmp_path):
    for name in ("prepare", "train"):
        with metrics.booked(tmp_path, name):
            pass
    with pytest.raises(RuntimeError), metrics.booked(tmp_path, "export"):
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), metrics.booked(tmp_path, "train"):
        raise KeyboardInterrupt
    rows = [json.loads(line) for line in (tmp_path / "verbs.jsonl").read_text().splitlines()]
    assert [row["verb"] for row in rows] == ["prepare", "train", "train"]
    assert rows[0]["seconds"] > 0  # since this process began
    assert sum(row["seconds"] for row in rows) <= time.time() - psutil.Process().create_time() + 1  # none counts twice
    assert 0.05 < rows[0]["peak_memory_gb"] < 100


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with metrics.Progress(5, what="rollout 3") as progress:
        for seconds in (1, 30, 30, 1, 61):  # 61 s after the start, and 61 s after that
            now[0] += seconds
            progress.advance("2 searches, 7 tokens/s")
    assert capsys.readouterr().out.splitlines() == [
        "rollout 3: 3 of 5  2 searches, 7 tokens/s",
        "rollout 3: 5 of 5  2 searches, 7 tokens/s",
    ]


def test_rows_after_a_step_are_dropped_where_a_run_goes_back(tmp_path):
    with metrics.Writer(tmp_path, step=0) as writer:
        for step in range(4):
            writer.write(step, {"reward": step / 10})
        writer.rewind(1)
        writer.write(2, {"reward": 0.7})
    assert [row["reward"] for row in metrics.read(tmp_path)] == [0.0, 0.1, 0.7]
