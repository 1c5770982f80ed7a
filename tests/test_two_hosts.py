"""Acting per host, learning together: two processes of four devices each train as one process of four does."""

import http.server
import json
import shutil
import signal
import threading

import jax
import meshes
import miniature
import numpy as np
import processes
import pytest

from searchr1_jax.run import metrics

STEPS = 5
CHANGES = {
    "mesh.data": -1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.actor_tensor": 2, "learner.steps": STEPS,
    "evaluation.every": STEPS, "learner.micro_batch_rows": 8, "reward.name": "searches",
    "policy.learning_rate": 1e-5,  # Adam makes a whole step of a gradient that is nothing but rounding
}  # fmt: skip


def command(workdir, **changes):
    flags = [f"--config.{key}={value}" for key, value in (miniature.SMALL | CHANGES | changes).items()]
    config = "--config=configs/quickstart.py:algorithm=grpo"
    return ["-m", "searchr1_jax.train", config, f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workdir before its run; not to be written to."""
    workdir = tmp_path_factory.mktemp("world")
    with jax.set_mesh(meshes.make()):
        miniature.world(workdir, miniature.settings())
    return workdir


@pytest.fixture
def workdir(world, tmp_path):
    return shutil.copytree(world, tmp_path / "run")


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """The workdir of a run on two hosts, and what each process said."""
    workdir = shutil.copytree(world, tmp_path_factory.mktemp("two") / "run")
    return workdir, processes.finished(processes.start_verb_twice(command(workdir)))


def test_two_hosts_act_and_learn_as_one_does(two, workdir):
    """A device holds as many slots in both, so the first tokens are the same bits; learning differs in its last."""
    processes.finished([processes.start(command(workdir))])
    expected, rows = miniature.rows(workdir), miniature.rows(two[0])
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert sum(row["searches"] for row in rows[1:]) > 0 and rows[-1]["kl_to_reference"] != 0
    for row, one in zip(rows, expected, strict=True):
        assert row.keys() == one.keys()
        np.testing.assert_allclose(list(row.values()), list(one.values()), rtol=1e-4, atol=1e-5, err_msg=str(row))
    for step in range(1, STEPS + 1):
        mine, one = (miniature.trajectories(w, f"step{step:06d}.jsonl") for w in (two[0], workdir))
        assert len(mine) == 8  # four questions twice, whoever answered them
        logp = [[np.array(t.pop("behaviour_logp")) for t in trajectories] for trajectories in (mine, one)]
        assert mine == one
        for a, b in zip(*logp, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    names = {path.name for path in (workdir / "eval").glob("*.json")}
    assert names == {path.name for path in (two[0] / "eval").glob("*.json")} and len(names) >= 2
    for name in names:
        assert (two[0] / "eval" / name).read_text() == (workdir / "eval" / name).read_text()


def test_one_process_alone_speaks_and_writes(two):
    workdir, (first, second) = two
    assert f"step {STEPS}/{STEPS}" in first and "step" not in second
    assert len(metrics.read(workdir)) == STEPS + 1
    verbs = [json.loads(line)["verb"] for line in (workdir / "verbs.jsonl").read_text().splitlines()]
    assert verbs == ["prepare", "train"]


def test_a_signal_to_one_process_stops_both_with_a_checkpoint_from_which_they_go_on(two, workdir):
    running = processes.start_verb_twice(command(workdir))
    for line in running[0].stdout:
        if line.startswith("step 1/"):
            break
    running[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=processes.HANGS_S) for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, said
    done = metrics.read(workdir)[-1]["step"]
    assert 1 <= done < STEPS
    assert miniature.saved_steps(workdir) in ([done], [])  # none where it came while both were learning
    processes.finished(processes.start_verb_twice(command(workdir)))
    assert miniature.rows(workdir) == miniature.rows(two[0])


def test_a_reward_that_is_not_the_same_twice_is_one_for_both_hosts(workdir):
    """Which groups are dropped, and so how many updates there are, follows from it: the hosts have to agree."""
    chance = {"reward.name": "chance:reward", "algorithm.drop_equal_groups": True, "rollout.questions": 8}
    once = {"learner.steps": 2, "evaluation.every": 0, "evaluation.first": False, "learner.updates_per_rollout": 8}
    processes.finished(processes.start_verb_twice(command(workdir, **chance, **once)))
    for row in metrics.read(workdir):
        rewards = [t["reward"] for t in miniature.trajectories(workdir, f"step{row['step']:06d}.jsonl")]
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards)) and set(rewards) <= {0.0, 1.0}
        equal = [a == b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
        assert row["groups_without_variance"] == pytest.approx(sum(equal) / len(equal))


class _Forgetful(http.server.BaseHTTPRequestHandler):
    """Answers the first queries and then no more."""

    left = 6

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        type(self).left -= len(asked)
        document = {"document": {"id": "0", "contents": "a\nb"}, "score": 1.0}
        reply = json.dumps({"result": [[document]] * len(asked)}).encode()
        self.send_response(200 if self.left >= 0 else 500)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def test_a_search_that_fails_on_one_host_stops_both_and_the_work_of_both_is_kept(workdir):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"retriever.url": f"http://127.0.0.1:{server.server_port}", "retriever.attempts": 1}
    running = processes.start_verb_twice(command(workdir, **settings, **{"evaluation.first": False}))
    said = [process.communicate(timeout=processes.HANGS_S) for process in running]
    server.shutdown()
    assert [process.returncode for process in running] == [1, 1], said
    assert all("): the tool 'search' failed" in err and "failed after 1 attempt" in err for _, err in said), said
    (interrupted,) = (workdir / "trajectories").glob("interrupted-*.jsonl")
    before = len(list((workdir / "trajectories").glob("step*.jsonl")))
    assert interrupted.name == f"interrupted-step{before + 1:06d}.jsonl"
