"""The example of a command, started as its users start it; what it counts in a run is in test_together.py."""

import json
import subprocess
import sys

from examples import command


def written(workdir, step, events):
    path = workdir / "trajectories" / f"step{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"turns": [{"event": event} for event in events]}) + "\n")


def test_turns_of_the_last_step_are_counted(tmp_path):
    written(tmp_path, 9, ["invalid"])
    written(tmp_path, 10, ["search", "search", "answer"])
    assert command.run(tmp_path) == {"search": 2, "answer": 1}


def test_a_wrong_workdir_is_one_line_of_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.command", f"--workdir={tmp_path}"],
        cwd=command.command.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "has no trajectories; train with" in done.stderr and "Traceback" not in done.stderr
