"""Commands as a user starts them: each in a process of its own, in a world of a few dozen entities."""

import contextlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import bits
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest

from searchr1_jax.run import command, metrics

STEPS = 6
TINY = {
    "world.persons": 120, "world.companies": 80, "world.vocab_size": 400, "world.width": 32, "world.layers": 2,
    "world.mlp_width": 48, "rollout.questions": 8, "rollout.slots": 8, "rollout.extend_rows": 4,
    "rollout.context_tokens": 128, "rollout.max_turn_tokens": 16, "learner.row_tokens": (128,),
    "learner.vocab_chunk": 128, "learner.micro_batch_rows": 4, "learner.steps": STEPS, "checkpoint.every": 2,
    "evaluation.questions": 4, "evaluation.every": 3, "log.trajectories_every": 3, "sft.drill_steps": 60,
    "sft.mixture_steps": 60, "sft.batch": 16, "sft.mixture_right": 0.75, "sft.mixture_guess": 0.1,
    "algorithm.entropy_coefficient": 0.01,  # so that there is a gradient where no answer is right yet
}  # fmt: skip
TINY_FLAGS = [f"--config.{key}={value}" for key, value in TINY.items()]


@pytest.fixture(scope="module")
def environment():
    """One device."""
    one = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": processes.COMPILED_QUICKLY}
    return os.environ | one | {"NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def start(environment):
    """start(name, *flags) is a process of that command, in the tiny world unless `own` flags are all it gets."""

    def start(name, *flags, config="configs/quickstart.py", own=False, cwd=processes.ROOT):
        tiny = [] if own else [f"--config={config}", *TINY_FLAGS]
        return subprocess.Popen(
            [sys.executable, "-m", f"searchr1_jax.{name}", *tiny, *flags],
            cwd=cwd, env=environment | {"PYTHONPATH": str(processes.ROOT)}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=processes.default_sigint,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def run(start):
    """run(name, *flags) is what a command that has to succeed wrote to stdout."""

    def run(name, *flags, **kwargs):
        out, err = (process := start(name, *flags, **kwargs)).communicate(timeout=processes.HANGS_S)
        assert process.returncode == 0, out + err
        return out

    return run


@pytest.fixture(scope="module")
def fails(start):
    """fails(name, *flags) is the one line that a command ends with that must not succeed."""

    def fails(name, *flags, **kwargs):
        _, err = (process := start(name, *flags, **kwargs)).communicate(timeout=processes.HANGS_S)
        assert process.returncode == 1, err
        told = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and "Traceback" not in err, err
        return told[0]

    return fails


@pytest.fixture(scope="module")
def world(run, tmp_path_factory):
    """A workdir with the world, and a base that sometimes searches; not to be written to."""
    workdir = tmp_path_factory.mktemp("world")
    run("prepare", f"--workdir={workdir}")
    run("sft", f"--workdir={workdir}")
    return workdir


@pytest.fixture
def workdir(world, tmp_path):
    """A copy of the world."""
    return shutil.copytree(world, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(world, run, tmp_path_factory):
    """A workdir in which training ran to its end; not to be written to."""
    workdir = shutil.copytree(world, tmp_path_factory.mktemp("undisturbed") / "run")
    run("train", f"--workdir={workdir}")
    return workdir


def _rows(workdir):
    """metrics.jsonl without what a clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "rollout/"))}
        for row in metrics.read(workdir)
    ]


def _assert_same_run(workdir, undisturbed):
    assert _rows(workdir) == _rows(undisturbed)
    names = ("policy", "policy_optimizer", "value", "value_optimizer")
    checkpoints = [
        {
            name: jax.device_get(ocp.StandardCheckpointer().restore(d / "checkpoints" / str(STEPS) / name))
            for name in names
        }
        for d in (workdir, undisturbed)
    ]
    bits.assert_equal(*checkpoints)


def _files(directory):
    """Every file below a directory and its bytes, but for those that say who is at work."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in found}


def _signal_after(process, step, number):
    """Sends a signal a moment after a step was reported, and waits for the process to end."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            break
    time.sleep(random.Random(step).random() * 0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=processes.HANGS_S)
    return out + err


# Training, and going on with it.


def test_training_changes_the_policy_and_reports_every_step(undisturbed):
    rows = _rows(undisturbed)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/sampled/em" in row] == [0, 3, 6]
    assert sum(row["searches"] for row in rows[1:]) > 0  # else resuming would not be tried on retrieved text
    assert rows[-1]["kl_to_reference"] != 0 and rows[-1]["policy/gradient_norm"] > 0
    assert len({row["compiled_programs"] for row in rows[1:]}) == 1
    kept = {path.name for path in (undisturbed / "trajectories").iterdir()}
    assert kept == {"step000003.jsonl", "step000006.jsonl"}
    assert (undisturbed / "learning_curve.png").stat().st_size > 1000


def test_killed_at_three_moments_and_started_again_a_run_ends_with_the_same_numbers(start, run, workdir, undisturbed):
    for step in (1, 2, 4):  # before there is a checkpoint, and while one is being written
        process = start("train", f"--workdir={workdir}")
        _signal_after(process, step, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert "resuming after step" in run("train", f"--workdir={workdir}")
    _assert_same_run(workdir, undisturbed)


def test_ctrl_c_ends_with_a_checkpoint_from_which_the_run_goes_on_with_its_own_config_from_anywhere(
    start, run, workdir, undisturbed, tmp_path
):
    process = start("train", f"--workdir={workdir}")
    out = _signal_after(process, 2, signal.SIGINT)
    assert process.returncode == 130, out  # so that a script goes no further
    last = metrics.read(workdir)[-1]["step"]
    out = run("train", f"--workdir={workdir.name}", own=True, cwd=workdir.parent)
    assert f"resuming after step {last} of {STEPS}" in out
    _assert_same_run(workdir, undisturbed)


def test_ctrl_c_ends_a_command_at_once_though_a_search_hangs(environment):
    program = """
from concurrent import futures
import threading
from searchr1_jax.run import command

def main():
    search = futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
    print("searching", flush=True)
    search.result()

command.run(main, lambda: None, required=())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=processes.ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=processes.default_sigint,
    )  # fmt: skip
    assert process.stdout.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=processes.HANGS_S)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_grpo_and_the_ablation_without_a_mask_train(run, workdir):
    flags = (
        "--config.learner.steps=1", "--config.evaluation.first=False", "--config.evaluation.every=0",
        "--config.rollout.samples=4", "--config.rollout.questions=4", "--config.algorithm.mask_environment=False",
    )  # fmt: skip
    run("train", f"--workdir={workdir}", *flags, config="configs/quickstart.py:algorithm=grpo")
    (row,) = _rows(workdir)
    assert row["step"] == 1 and np.isfinite(row["policy/loss"]) and "value/loss" not in row
    trees = {path.name for path in (workdir / "checkpoints" / "1").iterdir() if path.is_dir()}
    assert trees == {"policy", "policy_optimizer", "extra"}


# What can be done with a run.


@contextlib.contextmanager
def _search_server():
    """Answers every query with the same passage. Yields its url and the requests it has seen."""
    seen = []
    document = {"id": "1", "contents": '"Mira Talon"\nMira Talon is a poet born in Kelu.'}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, request))
            answer = {"result": [[{"document": document, "score": 1.0}] for _ in request["queries"]]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_published_checkpoint_is_judged_against_somebody_elses_server(run, world, tmp_path):
    questions = 12
    shutil.copy(world / "test.jsonl", tmp_path)  # ids, and so what is sampled, come from names in the workdir
    with _search_server() as (url, seen):
        out = run(
            "evaluate", f"--workdir={tmp_path}", f"--model={world}/base", f"--retriever={url}", "--name=theirs",
            "--decoding=sampled", f"--questions={questions}",
        )  # fmt: skip
    assert {path for path, _ in seen} == {"/retrieve"}
    assert all(request["topk"] == 1 and request["return_scores"] for _, request in seen)
    results = json.loads((tmp_path / "eval" / "theirs-sampled.json").read_text())
    assert results["n"] == questions == sum(results["stop_reasons"].values()) and 0 <= results["em"] <= 1
    assert "exact match" in out and "theirs-sampled.json" in out
    episodes = [json.loads(line) for line in (tmp_path / "eval" / "theirs-sampled.jsonl").read_text().splitlines()]
    replies = [turn["reply"] for row in episodes for turn in row["turns"] if turn["event"] == "search"]
    assert len(episodes) == questions and any("Mira Talon is a poet born in Kelu." in reply for reply in replies)
    assert sum(len(request["queries"]) for _, request in seen) == 1 + sum(reply != "" for reply in replies)


def test_ask_and_export_need_the_workdir_alone(run, fails, undisturbed, tmp_path):
    out = run("ask", f"--workdir={undisturbed}", "--question=who founded Zarum Desar Labs", own=True, cwd=tmp_path)
    assert f"{undisturbed}/checkpoints/{STEPS}" in out
    assert "Question: who founded Zarum Desar Labs?" in out and "answer: " in out
    export = ("export", f"--workdir={undisturbed}", "--output=model", "--dtype=bfloat16", "--config.checkpoint.keep=9")
    run(*export, own=True, cwd=tmp_path)
    assert {str(x.dtype) for x in bits.stored(tmp_path / "model").values()} == {"bfloat16"}
    assert "model exists; choose another --output or add --overwrite" in fails(*export, own=True, cwd=tmp_path)


def test_all_commands_are_listed(environment):
    command_line = [sys.executable, "-m", "searchr1_jax"]
    out = subprocess.run(command_line, cwd=processes.ROOT, env=environment, capture_output=True, text=True, check=True)
    told = {line.split()[2].removeprefix("searchr1_jax."): line for line in out.stdout.splitlines()}
    assert {"prepare", "sft", "train", "evaluate", "export", "ask", "compare", "index", "serve", "sweep"} <= told.keys()
    assert told.keys() == command.commands().keys() and "Reinforcement learning" in told["train"]


# What cannot work is refused in one line, and leaves everything as it was.


def test_a_key_that_there_is_not_is_refused_with_its_likely_or_its_new_name(fails, tmp_path):
    line = fails("train", f"--workdir={tmp_path / 'run'}", "--config.rollout.slotz=8")
    assert "no key rollout.slotz; did you mean rollout.slots?" in line
    line = fails("train", f"--workdir={tmp_path / 'run'}", "--config.algorithm.trace_decay=1")
    assert "algorithm.trace_decay is now called algorithm.gae_lambda" in line
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_asked_for_by_name(fails, tmp_path):
    assert "--workdir" in fails("train")
    line = fails("train", f"--workdir={tmp_path}", own=True)
    assert "--config is missing" in line and "holds no run" in line
    line = fails("train", f"--workdir={tmp_path}", "--config=configs/nowhere.py", own=True)
    assert "--config names configs/nowhere.py, but neither" in line


def test_words_beside_the_flags_are_refused(fails, tmp_path):
    assert "'quickstart' is no flag" in fails("train", "quickstart", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_wrong_config_argument_is_refused_in_the_configs_own_words(fails, tmp_path):
    line = fails("train", f"--workdir={tmp_path / 'run'}", config="configs/quickstart.py:algorithm=a2c")
    assert "'algorithm=a2c' is unknown; use algorithm=ppo|grpo" in line


def test_a_run_that_cannot_start_claims_nothing(fails, workdir):
    before = _files(workdir)
    line = fails("train", f"--workdir={workdir}", "--config.model.path=nowhere")
    assert "model.path is 'nowhere'" in line and "make the files first" in line
    assert _files(workdir) == before  # no config.json above all


def test_another_config_in_the_workdir_of_a_run_is_refused_with_the_keys(fails, undisturbed):
    before = _files(undisturbed)
    line = fails("train", f"--workdir={undisturbed}", "--config.seed=1", "--config.rollout.max_turns=2")
    assert "seed: 0 there, 1 now" in line and "another --workdir" in line
    assert _files(undisturbed) == before


def test_the_traceback_is_shown_on_demand(start, tmp_path):
    process = start("train", f"--workdir={tmp_path}", "--config.rollout.temperature=0", "--traceback")
    _, err = process.communicate(timeout=processes.HANGS_S)
    assert "Traceback" in err and "ValueError: rollout.temperature" in err
