"""Which run lives in a workdir, and which may go on there."""

import json
import pathlib

import pytest

from searchr1_jax.core import settings
from searchr1_jax.run import run_directory

DECAYING = settings.Settings().replace({"policy.final_lr_fraction": 0.1})


@pytest.fixture
def workdir(tmp_path):
    """Of a run whose learning rate decays."""
    run_directory.claim(DECAYING, tmp_path)
    return tmp_path


def _check(workdir, changes, *, accept_changes=False):
    return run_directory.check(DECAYING.replace(changes), workdir, accept_changes=accept_changes)


def test_a_run_reads_its_own_settings_back(workdir):
    assert run_directory.settings_of(workdir) == DECAYING
    assert _check(workdir, {}) == []


def test_an_empty_workdir_refuses_nothing(tmp_path):
    assert run_directory.check(DECAYING, tmp_path, accept_changes=False) == []


def test_what_is_learned_from_decides_what_may_change(workdir):
    free = {"evaluation.every": 1, "checkpoint.keep": 5, "retriever.threads": 7, "retriever.url": "http://b"}
    assert _check(workdir, free) == []
    noted = _check(workdir, {"learner.micro_batch_rows": 8, "rollout.slots": 16, "model.actor_dtype": "bfloat16"})
    assert [change.key for change in noted] == ["model.actor_dtype", "rollout.slots", "learner.micro_batch_rows"]
    with pytest.raises(ValueError, match=r"policy.learning_rate: 1e-06 there, 2e-06 now\); .*add --accept_changes, or"):
        _check(workdir, {"policy.learning_rate": 2e-6})
    (accepted,) = _check(workdir, {"policy.learning_rate": 2e-6}, accept_changes=True)
    assert (accepted.key, accepted.before, accepted.now) == ("policy.learning_rate", 1e-6, 2e-6)
    for changes in ({"seed": 1}, {"model.path": "other"}, {"data.train": ("other.jsonl",)}):
        with pytest.raises(ValueError, match=r"there, .* now\); go on with that config, or choose another --workdir"):
            _check(workdir, changes, accept_changes=True)


def test_a_second_job_is_kept_out_by_name_and_let_in_when_the_first_ended(workdir):
    with run_directory.locked(workdir, "train"):
        with pytest.raises(ValueError, match=r"process [0-9]+ on .* runs train in .* already; wait for it, or choose"):
            with run_directory.locked(workdir, "train"):
                pass
        with run_directory.locked(workdir, "sft"):
            pass
    with run_directory.locked(workdir, "train"):
        pass


def test_a_data_set_may_move_but_not_change(workdir):
    assert _check(workdir, {"data.train": ("/elsewhere/train.jsonl",)}) == []
    assert _check(workdir, {"data.train": ("train=other.jsonl",)}) == []
    run_directory.claim(DECAYING, workdir, {"train": "c0ffee", "nq": "beef"})
    run_directory.check_questions({"train": "c0ffee"}, workdir)
    with pytest.raises(ValueError, match="the questions of nq are not those with which the run .* began"):
        run_directory.check_questions({"train": "c0ffee", "nq": "b0a7"}, workdir)


@pytest.mark.parametrize(
    "given, name, path",
    [
        ("train.jsonl", "train", "train.jsonl"),
        ("/data/nq/test.jsonl", "test", "/data/nq/test.jsonl"),
        ("nq=/data/nq/test.jsonl", "nq", "/data/nq/test.jsonl"),
        ("a/b=c.jsonl", "b=c", "a/b=c.jsonl"),
    ],
)
def test_a_data_set_is_called_as_it_is_named_or_as_its_file(given, name, path):
    assert run_directory.name_and_path(given) == (name, path)


def test_more_steps_go_on_from_fewer_where_the_learning_rate_does_not_depend_on_them(workdir, tmp_path_factory):
    with pytest.raises(ValueError, match="learner.steps: 500 there, 900 now"):
        _check(workdir, {"learner.steps": 900})
    other = tmp_path_factory.mktemp("constant")
    run_directory.claim(settings.Settings(), other)
    longer = settings.Settings().replace({"learner.steps": 900})
    assert run_directory.check(longer, other, accept_changes=False) == []


def test_a_run_that_lacks_a_key_goes_on_with_its_default(workdir):
    path = workdir / "config.json"
    written = json.loads(path.read_text())
    del written["reward"]["threads"], written["tools"], written["guard"]
    path.write_text(json.dumps(written))
    assert _check(workdir, {}) == []
    with pytest.raises(ValueError, match="guard.kl: 0.0 there, 1.0 now"):
        _check(workdir, {"guard.kl": 1.0})


def test_a_run_whose_keys_had_other_names_goes_on(workdir):
    path = workdir / "config.json"
    written = json.loads(path.read_text())
    written["algorithm"]["trace_decay"] = written["algorithm"].pop("gae_lambda")
    written["policy"]["final_share"] = written["policy"].pop("final_lr_fraction")
    written["learner"]["cut_by"] = written["learner"].pop("minibatch_by")
    path.write_text(json.dumps(written))
    assert _check(workdir, {}) == []
    with pytest.raises(ValueError, match="policy.final_lr_fraction: 0.1 there, 0.5 now"):
        _check(workdir, {"policy.final_lr_fraction": 0.5})


def test_a_run_with_a_setting_that_had_no_effect_goes_on(workdir):
    grpo = {"algorithm.advantage": "group_standardised", "algorithm.kl_in": "loss", "algorithm.kl_estimator": "k3"}
    now = DECAYING.replace(grpo)
    run_directory.claim(now.replace({"learner.value_warmup_steps": 2}), workdir)  # of a value model that there is not
    assert run_directory.settings_of(workdir) == now
    assert run_directory.check(now, workdir, accept_changes=False) == []


def test_a_run_of_a_version_with_other_keys_is_refused_in_one_line(workdir):
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warp": {"factor": 9}}))
    with pytest.raises(ValueError, match="config.json is of another version: the config has no key warp") as error:
        _check(workdir, {})
    assert "\n" not in str(error.value)


def test_changes_are_recorded_with_their_step(workdir):
    found = _check(workdir, {"guard.kl": 1.0, "learner.micro_batch_rows": 8}, accept_changes=True)
    run_directory.record(workdir, found, 7)
    rows = list(map(json.loads, (workdir / run_directory.CHANGES).read_text().splitlines()))
    assert {"step": 7, "key": "guard.kl", "before": 0.0, "now": 1.0} in rows and len(rows) == 2


def test_how_acting_differs_is_told_of_what_decides_it_alone(workdir):
    now = DECAYING.replace({"rollout.max_turns": 1, "retriever.dimensions": 16, "learner.steps": 9})
    told = run_directory.acting_differences(now, workdir)
    assert told == ["retriever.dimensions: 256 there, 16 now", "rollout.max_turns: 4 there, 1 now"]


def test_a_file_is_found_in_the_workdir_then_where_we_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text("")
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert run_directory.find("here.jsonl", workdir, "data.train") == pathlib.Path("here.jsonl")
    (workdir / "here.jsonl").write_text("")
    assert run_directory.find("here.jsonl", workdir, "data.train") == workdir / "here.jsonl"
    with pytest.raises(ValueError, match=r"data.train is 'gone.jsonl', but neither .*run/gone.jsonl nor .* exists"):
        run_directory.find("gone.jsonl", workdir, "data.train")
