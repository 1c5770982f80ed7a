"""searchr1_jax/sweep.py, with verbs that only say they were asked, and once with the real ones."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

from absl import flags
from ml_collections import config_flags
import pytest

from configs import study as study_config
from searchr1_jax import sweep
from searchr1_jax.run import metrics
from searchr1_jax.sweeps import finished_runs

ROOT = pathlib.Path(sweep.__file__).parent.parent
PYTHON = sys.executable
FAKE_PYTHON = """#!/usr/bin/env bash
# `python -m searchr1_jax.<verb> --workdir=… …`: notes verb and run, makes what the sweep looks at.
verb="${2#searchr1_jax.}" workdir="${3#--workdir=}"
run="$(basename "$workdir")"
echo "$run $verb" >> "$FAKE/asked"
while [ -e "$FAKE/hold-$run-$verb" ]; do sleep 0.05; done
if [ -e "$FAKE/fail-$run-$verb" ]; then echo "error: the loss is nan"; exit 1; fi
mkdir -p "$workdir/eval"
case "$verb" in
  sft) mkdir -p "$workdir/base" && echo weights > "$workdir/base/model" ;;
  evaluate)
    for decoding in greedy sampled; do
      for name in base final; do echo '{"em": 0.5, "searches": 1}' > "$workdir/eval/$name-$decoding.json"; done
    done ;;
esac
echo "$run $verb ends" >> "$FAKE/asked"
"""
PROGRAM = """
import sys
from searchr1_jax import sweep
sys.executable = sys.argv[1]
sys.exit(sweep.main(sys.argv[2:]))
"""
RUN = ("evaluate", "train", "evaluate")


class Place:
    """A sweep's config and workdir, and verbs that can be made to fail or to wait."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.workdir = directory, directory / "runs"
        self.config = directory / "tiny.py"
        self.python = directory / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.started: subprocess.Popen | None = None

    def write(self, *calls: str, change: str = "") -> None:
        """The sweep of these calls of add, over the quickstart's config with a change."""
        body = "".join(f"    {call}\n" for call in calls)
        make = f"def get_config(arg=''):\n    c = quickstart.get_config(arg)\n    {change}\n    return c\n"
        self.config.write_text(f"from configs import quickstart\n{make}\ndef sweep(add):\n{body}")

    def flags(self, *more: str) -> list[str]:
        return [f"--config={self.config}", f"--workdir={self.workdir}", *more]

    def start(self, *more: str) -> subprocess.Popen:
        """A sweep in a process of its own."""
        self.started = subprocess.Popen(
            [PYTHON, "-c", PROGRAM, self.python, *self.flags(*more)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self.started

    def asked(self) -> list[str]:
        """ "<run> <verb>" of each verb that was begun since the last call; bases are called base."""
        path = self.directory / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return ["base " + line.split()[1] if line.startswith("_base-") else line
                for line in lines if not line.endswith("ends")]  # fmt: skip

    def wait_for(self, line: str) -> None:
        """Until a verb has noted so."""
        path, deadline = self.directory / "asked", time.monotonic() + 60
        while not (path.exists() and line in path.read_text().splitlines()):
            assert time.monotonic() < deadline, f"{line} did not come"
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", str(tmp_path))
    yield (made := Place(tmp_path))
    for hold in tmp_path.glob("hold-*"):  # so that no verb waits on
        hold.unlink()
    if made.started and made.started.poll() is None:
        made.started.terminate()
        made.started.communicate(timeout=60)


@pytest.fixture
def do(place, monkeypatch):
    """do(*flags) runs the sweep in this process. Returns its status."""
    monkeypatch.setattr(sweep.sys, "executable", str(place.python))
    monkeypatch.setattr(sweep, "_LOOK_EVERY_S", 0.02)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield lambda *more: sweep.main(place.flags(*more))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _of(run: str) -> list[str]:
    return [f"{run} {verb}" for verb in RUN]


# What is done.


def test_runs_go_through_the_verbs_each_in_its_directory_from_copies_of_one_base(place, do, capsys):
    place.write('add("a", seed=1)', 'add("b", "algorithm=grpo", seed=2)')
    assert do() == 0
    assert place.asked() == ["base prepare", "base sft", *_of("a"), *_of("b")]
    a, b = (place.workdir / name / "base" / "model" for name in "ab")
    a.write_text("other weights")
    assert b.read_text() == "weights\n"
    log = (place.workdir / "b.log").read_text()
    assert f"--config={place.config}:algorithm=grpo --config.seed=2 --model={b.parent} --name=base" in log
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("b: ") and "sampled 0.500 → 0.500; 1.00 searches" in out[-1] and "(2 of 2)" in out[-1]


def test_started_again_a_finished_sweep_runs_nothing(place, do):
    place.write('add("a")')
    assert do() == 0 and len(place.asked()) == 5
    assert do() == 0 and place.asked() == []


def test_only_what_matches_is_run(place, do):
    place.write('add("ppo-seed0")', 'add("ppo-seed1")', 'add("grpo-seed0")', 'add("rloo-seed0")')
    assert do("--only=ppo*1,rloo-seed0") == 0
    assert place.asked() == ["base prepare", "base sft", *_of("ppo-seed1"), *_of("rloo-seed0")]


def test_another_world_and_other_passages_have_a_base_of_their_own_and_other_limits_have_not(place, do):
    place.write(
        'add("a")',
        'add("b", **{"world.persons": 50})',
        'add("c", learner=dict(micro_batch_rows=8))',
        'add("d", rollout=dict(max_information_tokens=72, passages=3))',
    )
    assert do() == 0
    assert place.asked()[:6] == ["base prepare", "base sft"] * 3
    bases = {name: (place.workdir / name / "done" / "base").read_text() for name in "abcd"}
    assert bases["a"] == bases["c"] and len(set(bases.values())) == 3
    logs = {name: (place.workdir / f"{bases[name]}.log").read_text() for name in "ab"}
    assert "--config.world.persons=50" in logs["b"] and "world.persons" not in logs["a"]


def test_with_another_setting_that_a_run_may_go_on_with_its_verbs_run_again(place, do):
    place.write('add("a")')
    assert do() == 0 and len(place.asked()) == 5
    place.write('add("a", evaluation=dict(every=5))')
    assert do() == 0 and place.asked() == _of("a")


def test_after_a_verb_that_has_to_run_again_all_later_ones_do(place, do):
    place.write('add("a")')
    assert do() == 0 and len(place.asked()) == 5
    (place.workdir / "a" / "done" / "train").unlink()
    assert do() == 0 and place.asked() == ["a train", "a evaluate"]


def test_a_failed_run_is_told_at_the_end_with_its_log_and_the_others_go_on(place, do, capsys):
    place.write('add("a")', 'add("b")')
    (broken := place.directory / "fail-a-train").touch()
    assert do() == 1
    assert place.asked() == ["base prepare", "base sft", "a evaluate", "a train", *_of("b")]
    err = capsys.readouterr().err
    assert "a failed" in err and "searchr1_jax.train ended with status 1" in err and "the loss is nan" in err
    assert "b failed" not in err
    broken.unlink()
    assert do() == 0 and place.asked() == ["a train", "a evaluate"]


def test_runs_whose_base_failed_are_not_begun(place, do, capsys, monkeypatch):
    place.write('add("a")', 'add("b", **{"world.persons": 50})')
    path, module = place.config, sweep.load(place.config)
    base = sweep.base_of(sweep.entries(path)[0], path, module.get_config).name
    (place.directory / f"fail-{base}-sft").touch()
    assert do() == 1
    assert place.asked() == ["base prepare", "base sft", "base prepare", "base sft", *_of("b")]
    assert f"not begun, because {base} failed" in capsys.readouterr().err


def test_two_jobs_run_at_once(place):
    place.write('add("a")', 'add("b")')
    holds = [place.directory / f"hold-{run}-train" for run in "ab"]
    for hold in holds:
        hold.touch()
    process = place.start("--jobs=2")
    place.wait_for("a train")
    place.wait_for("b train")  # else one would wait for the other without end
    for hold in holds:
        hold.unlink()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out


# Interrupted.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_stops_the_verb_and_goes_on_there_when_started_again(place, do, number):
    place.write('add("a")', 'add("b")')
    (hold := place.directory / "hold-a-train").touch()
    process = place.start()
    place.wait_for("a train")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "start again with the same command" in out and "failed" not in out
    assert place.asked() == ["base prepare", "base sft", "a evaluate", "a train"]
    hold.unlink()
    assert do() == 0 and place.asked() == ["a train", "a evaluate", *_of("b")]


def test_what_a_killed_sweep_left_running_is_waited_for(place):
    place.write('add("a")')
    (hold := place.directory / "hold-a-train").touch()
    first = place.start()
    place.wait_for("a train")
    first.kill()
    first.wait()
    second = place.start()
    lines = [second.stdout.readline() for _ in range(2)]
    assert lines[1] == "a: waiting for another process that works on it\n"
    assert (place.directory / "asked").read_text().splitlines()[-1] == "a train"  # still the first
    hold.unlink()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0, out
    lines = (place.directory / "asked").read_text().splitlines()
    end = lines.index("a train ends")
    assert lines[end + 1 :][:2] == ["a train", "a train ends"]


def test_a_copy_cut_short_is_made_again(place, do):
    place.write('add("a")')
    (place.workdir / ".a.partial" / "base").mkdir(parents=True)
    assert do() == 0
    assert (place.workdir / "a" / "base" / "model").read_text() == "weights\n"
    assert not (place.workdir / ".a.partial").exists()


# Refused before anything runs.


@pytest.mark.parametrize(
    "calls, complaint",
    [
        (['add("a/b")'], "'a/b' cannot name a directory"),
        (['add("..")'], "'..' cannot name a directory"),
        (['add("a.log")'], "'a.log' cannot name a directory"),
        (['add("")'], "'' cannot name a directory"),
        (['add("_base-1")'], "'_base-1' cannot name a directory"),
        (['add("a" * 101)'], "use at most 100"),
        (['add("a")', 'add("A")'], "'A' is there twice"),
        (['add("a", rollout=dict(slotz=1))'], "'a': the config has no key 'rollout.slotz'; did you mean"),
        (['add("a", **{"rollout.slotz": 1})'], "no key 'rollout.slotz'"),
        (['add("a", rollout=3)'], "no key 'rollout'"),
        (['add("a", seed="one")'], "seed is 'one'; make it of type int, as 0 is"),
        (['add("a", seed=None)'], "seed is None; make it of type int"),
        (['add("a", rollout=dict(passages=0))'], "'a': rollout.passages is 0"),
        (['add("a", "algorithm=a2c")'], "'a': config argument 'algorithm=a2c' is unknown"),
        (['add("a", model=dict(path="mine"))'], "model.path is 'mine', but runs of a sweep start from the base"),
        (["pass"], "adds nothing"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work_is_refused_by_name(place, do, calls, complaint):
    place.write('add("first")', *calls) if calls != ["pass"] else place.write(*calls)
    with pytest.raises(SystemExit) as refused:
        do()
    assert str(refused.value).startswith("error: ") and complaint in str(refused.value)
    assert not place.workdir.exists() and place.asked() == []


def test_a_pattern_without_a_match_and_no_jobs_are_refused(place, do):
    place.write('add("a")', 'add("b")')
    with pytest.raises(SystemExit, match="--only=c. matches none of the entries; they are a, b"):
        do("--only=a,c*")
    with pytest.raises(SystemExit, match="--jobs=0 runs nothing"):
        do("--jobs=0")
    assert not place.workdir.exists()


def test_a_config_without_a_sweep_is_refused(place):
    workdir = f"--workdir={place.workdir}"
    with pytest.raises(SystemExit, match="quickstart.py defines no sweep"):
        sweep.main([f"--config={ROOT}/configs/quickstart.py", workdir])
    with pytest.raises(SystemExit, match="does not exist; name a file"):
        sweep.main(["--config=configs/study.py:algorithm=grpo", workdir])


def test_a_run_that_began_with_another_base_is_refused(place, do):
    place.write('add("a")')
    assert do() == 0 and len(place.asked()) == 5
    place.write('add("a")', change="c.sft.drill_steps = 400")
    with pytest.raises(
        SystemExit, match="runs/a began with _base-.*remove that directory, or choose another --workdir"
    ):
        do()
    assert place.asked() == []


def test_listing_runs_nothing_and_says_how_far_each_is(place, do, capsys):
    place.write('add("a")', 'add("b")', 'add("c", seed=3)')
    (place.directory / "fail-b-train").touch()
    do("--only=a,b")
    assert len(place.asked()) == 7
    capsys.readouterr()
    assert do("--list") == 0 and place.asked() == []
    states = [line.split("--config")[0].split() for line in capsys.readouterr().out.splitlines()]
    assert states == [["a", "done"], ["b", "after", "evaluate-base"], ["c", "to", "do"]]


# The verbs get what was meant.


def _parsed(entry: sweep.Entry):
    """What a verb makes of an entry's flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
    with mock.patch.object(sys, "argv", ["verb", *entry.flags]):  # where it looks for the keys that are overridden
        values(sys.argv)
    return values.config


def test_flags_say_what_the_overrides_said(place):
    place.write(
        'add("a", "algorithm=rloo", seed=3, data=dict(train=("a.jsonl", "b c.jsonl"), demonstrations=()),'
        ' **{"learner.row_tokens": (192,), "policy.learning_rate": 1e-05, "log.compilation_cache": False,'
        ' "protocol.prompt": "Q: {question}\\n", "retriever.url": ""})'
    )
    (entry,) = sweep.entries(place.config)
    assert _parsed(entry).to_dict() == entry.config.to_dict()
    assert entry.config.data.train == ("a.jsonl", "b c.jsonl") and entry.config.protocol.prompt == "Q: {question}\n"


def test_the_study_has_the_methods_that_its_table_describes():
    found = sweep.entries(pathlib.Path(study_config.__file__))
    seeds = {}
    for entry in found:
        name = finished_runs.RUN_NAME.fullmatch(entry.name)
        seeds.setdefault(name["method"], []).append(entry.config.seed)
        assert entry.config.seed == int(name["seed"])
        assert _parsed(entry).to_dict() == entry.config.to_dict()
    assert seeds.keys() == finished_runs.METHODS.keys()
    assert seeds["ppo"] == [0, 1, 2, 3, 4] and seeds["grpo"] == seeds["unmasked"] == [0, 1, 2]
    bases = {e.name: sweep.base_of(e, pathlib.Path(study_config.__file__), study_config.get_config).name for e in found}
    alone = bases.pop("top_3-seed0")  # passages are part of what a base is taught
    assert len(set(bases.values())) == 1 and alone not in bases.values()
    samples = {e.name: e.config.rollout.samples for e in found if e.name.startswith("grpo")}
    assert samples["grpo-seed0"] == 5 and samples["grpo_of_3-seed0"] == 3 and samples["grpo_of_1-seed0"] == 1


# With the real verbs.

TINY = {
    "world.persons": 40, "world.companies": 40, "world.vocab_size": 300, "world.width": 32, "world.layers": 2,
    "world.mlp_width": 48, "rollout.questions": 4, "rollout.slots": 8, "rollout.extend_rows": 4,
    "rollout.context_tokens": 128, "rollout.max_turn_tokens": 12, "rollout.max_information_tokens": 24,
    "rollout.decode_tokens": 8, "learner.steps": 12, "learner.row_tokens": (128,), "learner.vocab_chunk": 128,
    "learner.micro_batch_rows": 4, "evaluation.questions": 4, "evaluation.every": 6, "checkpoint.every": 100,
    "sft.drill_steps": 2, "sft.mixture_steps": 2, "sft.batch": 4,
}  # fmt: skip


def test_a_real_run_stopped_while_it_trains_goes_on_to_its_end(tmp_path):
    config, workdir = tmp_path / "tiny.py", tmp_path / "runs"
    config.write_text(
        "from configs import quickstart\n\ndef get_config(arg=''):\n    c = quickstart.get_config(arg)\n"
        f"    c.update_from_flattened_dict({TINY})\n    return c\n\n"
        "def sweep(add):\n    add('ppo-seed1', seed=1)\n"
    )
    command = [PYTHON, "searchr1_jax/sweep.py", f"--config={config}", f"--workdir={workdir}"]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    pipes = dict(cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process, run = subprocess.Popen(command, **pipes), workdir / "ppo-seed1"
    while process.poll() is None and not any(row["step"] == 1 for row in metrics.read(run)):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    stopped = metrics.read(run)[-1]["step"]
    assert 1 <= stopped < TINY["learner.steps"] and finished_runs.read_run(run) is None
    subprocess.run(command, timeout=300, check=True, **pipes)
    log = (workdir / "ppo-seed1.log").read_text()
    assert f"resuming after step {stopped} of 12" in log and log.count("--name=base") == 1
    found = finished_runs.read_run(run)
    assert found.seed == 1 and [row["step"] for row in found.rows] == list(range(13))
    assert json.loads((run / "eval" / "final-greedy.json").read_text())["n"] == found.evaluations["base-greedy"]["n"]
