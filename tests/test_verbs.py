"""The verbs as a user starts them: each in a process of its own, in a world of a few dozen entities."""

import contextlib
import http.server
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers

from configs import quickstart
from searchr1_jax import train
from searchr1_jax.core import types
from searchr1_jax.models import decoder
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.retrieval import exact_index
from searchr1_jax.rollout import episodes
from searchr1_jax.run import metrics
from searchr1_jax.run import retrievers
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup
from searchr1_jax.text import tokenizer

ROOT = pathlib.Path(quickstart.__file__).parent.parent
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


def _config(**changes):
    c = quickstart.get_config()
    c.update_from_flattened_dict(TINY | changes)
    return c


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and a compilation cache for all processes."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    cache = str(tmp_path_factory.mktemp("cache"))
    return env | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": cache, "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def start(environment):
    """start(verb, *flags) is a process of that verb in the tiny world."""

    def start(verb, *flags, config="configs/quickstart.py"):
        tiny = [f"--config={config}", *(f"--config.{key}={value}" for key, value in TINY.items())]
        return subprocess.Popen(
            [sys.executable, "-m", f"searchr1_jax.{verb}", *tiny, *flags],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def run(start):
    """run(verb, *flags) is what a verb that has to succeed wrote to stdout."""

    def run(verb, *flags, **kwargs):
        out, err = (process := start(verb, *flags, **kwargs)).communicate(timeout=120)
        assert process.returncode == 0, out + err
        return out

    return run


@pytest.fixture(scope="module")
def fails(start):
    """fails(verb, *flags) is the one line that a verb ends with that must not succeed."""

    def fails(verb, *flags, **kwargs):
        _, err = (process := start(verb, *flags, **kwargs)).communicate(timeout=120)
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


def _checkpoint(workdir):
    """All arrays of the last checkpoint, weights and optimizer states."""
    directory = workdir / "checkpoints" / str(STEPS)
    names = ("policy", "policy_optimizer", "value", "value_optimizer")
    return {name: jax.device_get(ocp.StandardCheckpointer().restore(directory / name)) for name in names}


def _files(directory):
    """Every file below a directory and its bytes."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def _assert_same_run(workdir, undisturbed):
    assert _rows(workdir) == _rows(undisturbed)
    actual, expected = _checkpoint(workdir), _checkpoint(undisturbed)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


def _signal_after(process, step, number):
    """Sends a signal a moment after a step was reported, and waits for the process to end."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            break
    time.sleep(random.Random(step).random() * 0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return out + err


# Training, and going on with it.


def test_training_changes_the_policy_and_reports_every_step(undisturbed):
    rows = _rows(undisturbed)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    evaluated = [row["step"] for row in rows if "eval/sampled/em" in row]
    assert evaluated == [0, 3, 6]
    assert sum(row["searches"] for row in rows[1:]) > 0  # else resuming would not be tried on retrieved text
    assert rows[-1]["kl_to_reference"] != 0 and rows[-1]["policy/gradient_norm"] > 0
    assert len({row["compiled_programs"] for row in rows[1:]}) == 1
    assert {path.name for path in (undisturbed / "trajectories").iterdir()} == {
        "step000003.jsonl",
        "step000006.jsonl",
    }
    assert (undisturbed / "learning_curve.png").stat().st_size > 1000


def test_killed_at_three_moments_and_started_again_a_run_ends_with_the_same_numbers(start, run, workdir, undisturbed):
    for step in (1, 2, 4):  # before there is a checkpoint, and while one is being written
        process = start("train", f"--workdir={workdir}")
        _signal_after(process, step, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    out = run("train", f"--workdir={workdir}")
    assert "resuming after step" in out
    _assert_same_run(workdir, undisturbed)


def test_ctrl_c_ends_with_a_checkpoint_from_which_the_run_goes_on(start, run, workdir, undisturbed):
    process = start("train", f"--workdir={workdir}")
    out = _signal_after(process, 2, signal.SIGINT)
    assert process.returncode == 130, out  # so that a script goes no further
    last = metrics.read(workdir)[-1]["step"]
    assert 2 <= last < STEPS and f"stopped after step {last}; start again with the same command" in out
    assert f"resuming after step {last} of {STEPS}" in run("train", f"--workdir={workdir}")
    _assert_same_run(workdir, undisturbed)


def test_ctrl_c_ends_a_command_at_once_though_a_search_hangs(environment):
    command = """
from concurrent import futures
import time
from searchr1_jax.run import command

def main(argv):
    search = futures.ThreadPoolExecutor(1).submit(time.sleep, 60)
    print("searching", flush=True)
    search.result()

command.run(main, required=())
"""
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, env=environment, **pipes)
    assert process.stdout.readline() == "searching\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
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


def test_an_export_is_the_checkpoint_as_a_hugging_face_directory(run, fails, undisturbed, tmp_path, laptop):
    workdir, output = tmp_path / "run", tmp_path / "exported" / "model"
    for name in ("checkpoints", run_directory.TOKENIZER):  # neither the base model nor the data
        shutil.copytree(undisturbed / name, workdir / name)
    run("export", f"--workdir={workdir}", f"--output={output}", "--value", "--max_shard_gb=0.00002")
    assert json.loads((output / "config.json").read_text())["model_type"] == "qwen2"
    loaded = transformers.AutoTokenizer.from_pretrained(output)
    ours = tokenizer.Tokenizer.load(undisturbed / "base")
    assert loaded("who founded X", add_special_tokens=False).input_ids == ours.encode("who founded X")
    trees = _checkpoint(undisturbed)
    loaded = {"policy": hf.load(output), "value": hf.load(output / "value", kind=decoder.Value)}
    for kind, params in loaded.items():
        for path, weight in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            np.testing.assert_array_equal(weight, trees[kind][name])
    assert len(list(output.glob("model-*.safetensors"))) > 1
    before = _files(output)
    line = fails("export", f"--workdir={workdir}", f"--output={output}")
    assert f"{output} exists; choose another --output or add --overwrite" in line
    assert _files(output) == before and list(output.parent.iterdir()) == [output]


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
    with _search_server() as (url, seen):
        out = run(
            "evaluate", f"--workdir={tmp_path}", f"--model={world}/base", f"--retriever={url}", "--name=theirs",
            "--decoding=sampled", f"--questions={questions}", f"--config.data.test={(str(world / 'test.jsonl'),)}",
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


def test_ask_prints_the_episode_of_one_question(run, undisturbed):
    out = run("ask", f"--workdir={undisturbed}", "--question=who founded Zarum Desar Labs")
    assert f"{undisturbed}/checkpoints/{STEPS}" in out
    assert "Question: who founded Zarum Desar Labs?" in out and "answer: " in out


# What cannot work is refused in one line, and leaves everything as it was.


def test_a_misspelt_key_is_refused_with_its_likely_spelling(fails, tmp_path):
    line = fails("train", f"--workdir={tmp_path / 'run'}", "--config.rollout.slotz=8")
    assert "no key 'slotz'" in line and '"slots"' in line
    line = fails("train", f"--workdir={tmp_path / 'run'}", "--config.rolout.slots=8")
    assert "no key 'rolout'" in line and '"rollout"' in line
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_flag_is_refused_by_name(fails):
    assert "--workdir" in fails("train")


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
    assert "rollout.max_turns: 3 there, 2 now; seed: 0 there, 1 now" in line and "another --workdir" in line
    assert _files(undisturbed) == before


def test_a_server_out_of_reach_is_reported_before_any_work(fails, world, tmp_path):
    flags = (f"--model={world}/base", "--config.retriever.attempts=1", "--retriever=http://127.0.0.1:9")
    data = f"--config.data.test={(str(world / 'test.jsonl'),)}"
    line = fails("evaluate", f"--workdir={tmp_path}", *flags, data)
    assert "http://127.0.0.1:9/retrieve" in line and "failed after 1 attempt" in line
    assert not (tmp_path / "eval").exists()


def test_the_traceback_is_shown_on_demand(start, tmp_path):
    _, err = start("train", f"--workdir={tmp_path}", "--config.rollout.temperature=0", "--traceback").communicate()
    assert "Traceback" in err and "ValueError: rollout.temperature" in err


# The same inside this process, where the verbs would get their errors from.


def test_free_keys_may_change_when_a_run_goes_on(tmp_path):
    run_directory.claim(_config(), tmp_path)
    run_directory.check(_config(**{"evaluation.every": 1, "checkpoint.keep": 5, "retriever.threads": 7}), tmp_path)
    with pytest.raises(ValueError, match=r"learner.row_tokens: \[128\] there, \[256\] now"):
        run_directory.check(_config(**{"learner.row_tokens": (256,)}), tmp_path)


def test_more_steps_go_on_from_fewer_only_where_the_learning_rate_does_not_depend_on_them(tmp_path):
    run_directory.claim(_config(), tmp_path)
    with pytest.raises(ValueError, match="learner.steps: 6 there, 20 now"):  # its rate falls until the last step
        run_directory.check(_config(**{"learner.steps": 20}), tmp_path)
    constant = {"policy.final_lr_fraction": 1.0}
    run_directory.claim(_config(**constant), tmp_path)
    run_directory.check(_config(**constant, **{"learner.steps": 20}), tmp_path)


def test_a_broken_corpus_line_is_named(world, tmp_path):
    lines = (world / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines[:2], '{"id": "3", "contents', *lines[3:]]))
    with pytest.raises(ValueError, match="corpus.jsonl: 1 of 200 lines are not .*line 3: not JSON"):
        retrievers.make(_config(), tmp_path)


def test_a_question_that_leaves_no_room_for_a_turn_is_named(world):
    tokens = tokenizer.Tokenizer.load(world / "base")
    question = types.QAExample(id="test/long", question="who founded " * 60, golden_answers=("x",))
    with pytest.raises(ValueError, match="'test/long' has [0-9]+ tokens, but only 112 leave room"):
        setup.tasks(_config(), [question], tokens, samples=1)


def test_without_a_checkpoint_the_remedies_are_told(world, tmp_path, laptop):
    with pytest.raises(ValueError, match=r"holds steps \[\]; run python -m searchr1_jax.train first, .*--model"):
        setup.policy(_config(**{"model.path": str(world / "base")}), tmp_path)


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(undisturbed, laptop):
    with pytest.raises(ValueError, match=r"holds steps \[4, 6\], not 2; .*another --step"):
        setup.policy(_config(), undisturbed, step=2)


def test_where_scann_has_no_wheel_the_exact_index_stands_in_and_asking_for_it_says_what_to_do(world, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "scann"] + ["scann"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert isinstance(retrievers.make(_config(), world).ranker.index, exact_index.ExactIndex)
    with pytest.raises(ImportError, match='"scann" cannot be imported here; .* set retriever.index = "exact"'):
        retrievers.make(_config(**{"retriever.index": "scann"}), world)


class _RolloutThatLosesItsServer:
    """Finishes one episode, then a search fails for good."""

    counts = episodes.Counts()

    def run(self, tasks, decoding, *, seed, step):
        yield types.Trajectory(
            example=types.QAExample(id="q", question="who", golden_answers=("x",)),
            sample=0, tokens=np.int32([5, 6]), sampled=np.array([False, True]), behaviour_logp=np.float32([0, -1]),
            prompt_tokens=1, turns=(), stop_reason="no_action", answer=None,
        )  # fmt: skip
        raise retrieval.RetrievalError("Mira Talon", "status 500", attempts=4)


def test_a_search_that_fails_for_good_stops_the_run_and_saves_the_episodes_that_were_finished(tmp_path):
    with pytest.raises(retrieval.RetrievalError, match="'Mira Talon' failed after 4 attempts: status 500"):
        run = mock.MagicMock(rollout=_RolloutThatLosesItsServer(), reward=lambda trajectory: 0.25)
        train.roll_out(_config(), run, [], step=6, workdir=tmp_path)
    (line,) = (tmp_path / "trajectories" / "interrupted-step000007.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens"] == [5, 6] and json.loads(line)["reward"] == 0.25


def test_a_server_out_of_reach_is_a_retrieval_error_that_names_it(tmp_path):
    config = _config(**{"retriever.url": "http://127.0.0.1:9", "retriever.attempts": 2, "retriever.backoff_s": 0.01})
    with pytest.raises(retrieval.RetrievalError, match="failed after 2 attempts: http://127.0.0.1:9/retrieve"):
        retrievers.make(config, tmp_path)
