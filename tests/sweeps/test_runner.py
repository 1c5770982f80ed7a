"""searchr1_jax/sweeps/runner.py: what is done, in which order, and how it ends."""

import os
import signal
import subprocess
import sys

import place as place_lib
import pytest

from searchr1_jax.sweeps import entries, runner

PYTHON = sys.executable
PROGRAM = """
import sys
from searchr1_jax import sweep
sys.executable = sys.argv[1]
sweep.run(sys.argv[2], sys.argv[3])
"""


def _of(run: str) -> list[str]:
    return [f"{run} {command}" for command in ("evaluate", "train", "evaluate")]


BASE = ["base prepare", "base sft"]


def test_runs_go_through_the_commands_each_in_its_directory_from_copies_of_one_base(place, do, capsys):
    place.write('add("a", seed=1)', 'add("b", "algorithm=grpo", seed=2)')
    assert do() == {}
    assert place.asked() == [*BASE, *_of("a"), *_of("b")]
    a, b = (place.workdir / name / "base" / "model" for name in "ab")
    a.write_text("other weights")
    assert b.read_text() == "weights\n"
    log = (place.workdir / "b.log").read_text()
    assert f"--config={place.config}:algorithm=grpo --config.seed=2 --model={b.parent} --name=base" in log
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("b: ") and "sampled 0.500 → 0.500; 1.00 searches" in out[-1] and "(2 of 2)" in out[-1]


def test_started_again_a_finished_sweep_runs_nothing(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    assert do() == {} and place.asked() == []


def test_a_finished_sweep_may_be_moved(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    place.workdir = place.workdir.rename(place.directory / "elsewhere")
    assert do() == {} and place.asked() == []


def test_only_what_matches_is_run(place, do):
    place.write('add("ppo-seed0")', 'add("ppo-seed1")', 'add("grpo-seed0")', 'add("rloo-seed0")')
    assert do(only=["ppo*1", "rloo-seed0"]) == {}
    assert place.asked() == [*BASE, *_of("ppo-seed1"), *_of("rloo-seed0")]


def test_after_a_command_that_has_to_run_again_all_later_ones_do(place, do):
    place.write('add("a")')
    assert do() == {} and len(place.asked()) == 5
    (place.workdir / "a" / "done" / "train").unlink()
    assert do() == {} and place.asked() == ["a train", "a evaluate"]


def test_a_failed_run_is_told_at_the_end_with_its_log_and_the_others_go_on(place, do, capsys):
    place.write('add("a")', 'add("b")')
    broken = place.tell("fail-a-train")
    (why,) = do().values()
    assert place.asked() == [*BASE, "a evaluate", "a train", *_of("b")]
    err = capsys.readouterr().err
    assert "searchr1_jax.train ended with status 1" in why and "the loss is nan" in why
    assert f"a failed; all of it: {place.workdir}/a.log\n{why}" in err and "b failed" not in err
    broken.unlink()
    assert do() == {} and place.asked() == ["a train", "a evaluate"]


def test_runs_whose_base_failed_are_not_begun(place, do):
    place.write('add("a")', 'add("b", **{"world.persons": 50})')
    base = entries.read(place.config)[0].base.name
    place.tell(f"fail-{base}-sft")
    failed = do()
    assert place.asked() == [*BASE, *BASE, *_of("b")]
    assert failed.keys() == {base, "a"} and failed["a"] == f"not begun, because {base} failed"


def test_two_jobs_run_at_once(place, do):
    place.write('add("a")', 'add("b")')
    for name in "ab":
        place.tell(f"meet-{name}-train")  # each ends when both have begun
    assert do(jobs=2) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_twice_it_passes_that_on_twice_and_goes_on_there_when_started_again(place, do, number, capsys):
    place.write('add("a")', 'add("b")')
    stop = place.tell("stop-a-train", number.name)
    with pytest.raises(runner.Stopped):
        do()
    assert signal.getsignal(number) == {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
    out, err = capsys.readouterr()
    assert "stopping; once more to stop at once" in out and "failed" not in out + err
    assert place.asked() == [*BASE, "a evaluate", "a train"]
    stop.unlink()
    assert do() == {} and place.asked() == ["a train", "a evaluate", *_of("b")]


def test_a_signal_that_is_ignored_as_nohup_has_it_does_not_stop_it(place, do):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    place.write('add("a")')
    place.tell("signal-a-train", "HUP")
    assert do() == {} and place.asked() == [*BASE, *_of("a")]


def test_what_a_killed_sweep_left_running_is_waited_for(place, do, monkeypatch):
    place.write('add("a")')
    hold = place.tell("hold-a-train")
    command = [PYTHON, "-c", PROGRAM, place.python, place.config, place.workdir]
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(place_lib.ROOT)})
    place.wait_for("a train")
    first.kill()
    first.wait()
    said, say = [], runner.Runner.say

    def released(self, text):
        say(self, text)
        said.append(text)
        if text == "a: waiting for another process that works on it":
            assert place.lines()[-1] == "a train"  # still the first
            hold.unlink()

    monkeypatch.setattr(runner.Runner, "say", released)
    assert do() == {} and len(said) == 3
    lines = place.lines()
    assert lines[lines.index("a train ends") + 1 :][:2] == ["a train", "a train ends"]


def test_a_copy_cut_short_is_made_again(place, do):
    place.write('add("a")')
    (place.workdir / ".a.partial" / "base").mkdir(parents=True)
    assert do() == {}
    assert (place.workdir / "a" / "base" / "model").read_text() == "weights\n"
    assert not (place.workdir / ".a.partial").exists()
