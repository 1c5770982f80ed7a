"""Two processes: whatever happens to one of them, both end, and both say which one it was and why."""

import processes
import pytest

PROGRAM = """
import sys, time
import jax
from searchr1_jax.core import cluster, parallel, settings
from searchr1_jax.run import command

def main():
    parallel.gather("both are here")
    if jax.process_index() == {who}:
        {what}
    parallel.gather("and go on")
    print("never")

Cluster = settings.Cluster
command.settings_lib.Cluster = lambda: Cluster(stalled_s={stalled_s})
command.run(main, lambda: None, required=())
"""


def _both(who: int, what: str, stalled_s: float = 600.0):
    """Exit statuses, and what each wrote to stderr."""
    program = PROGRAM.format(who=who, what=what, stalled_s=stalled_s)
    started = processes.start_verb_twice(["-c", program])
    said = [process.communicate(timeout=processes.HANGS_S) for process in started]
    assert not any("never" in out for out, _ in said)
    return [process.returncode for process in started], [err for _, err in said]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    "what, cause",
    [
        ("raise ValueError('reward.name is wrong')", "reward.name is wrong"),
        ("raise KeyError('a fault of ours')", "KeyError: 'a fault of ours'"),
    ],
)
def test_an_error_in_one_process_ends_both_with_its_cause(who, what, cause):
    statuses, said = _both(who, what)
    assert statuses == [1, 1], said
    for err in said:
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: process {who} of 2 (") and line.endswith(f"): {cause}")
    assert "Traceback" not in said[1 - who] and ("Traceback" in said[who]) == ("KeyError" in what)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_hangs_is_named_and_both_end(who):
    statuses, said = _both(who, "time.sleep(100_000)", stalled_s=4.0)
    assert statuses == [1, 1], said
    for err in said:
        assert f"process {who} of 2 (" in err and "has done nothing for" in err and "cluster.stalled_s" in err


@pytest.mark.slow
def test_what_one_is_asked_all_are_asked():
    wait = "while not cluster.asked_to_stop():\n        time.sleep(0.1)"
    statuses, said = _both(1, f"cluster.ask_to_stop(143)\n    {wait}\n    sys.exit(cluster.asked_to_stop())")
    assert statuses == [143, 143], said


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_or_another_config_is_refused_on_both(tmp_path):
    session = """
import sys
import jax
from searchr1_jax.core import settings
from searchr1_jax.run import command

def main():
    c = settings.Settings().replace({"mesh.fsdp": 1, "log.compilation_cache": False})
    if jax.process_index() == 1:
        c = c.replace(%r)
    with command.session(c, sys.argv[1] + (%r if jax.process_index() else "")):
        print("never")

command.run(lambda _: main(), lambda: None, required=(), words=True)
"""
    for changes, suffix, cause in (
        ({}, "elsewhere", "is not shared: process 1 of 2 ("),
        ({"seed": 1}, "", "the config is not the same on process 1 of 2 ("),
    ):
        started = processes.start_verb_twice(["-c", session % (changes, suffix), tmp_path / "run"])
        said = [process.communicate(timeout=processes.HANGS_S) for process in started]
        assert [process.returncode for process in started] == [1, 1], said
        assert all(cause in err and "never" not in out for out, err in said), said


@pytest.mark.slow
def test_values_of_any_size_are_exchanged_in_rounds():
    program = """
import jax
from searchr1_jax.core import cluster, parallel, settings

cluster.start(settings.Cluster())
parallel._EXCHANGED = 64
value = lambda process: list(range(process * 300))
assert parallel.gather(value(jax.process_index())) == [value(0), value(1)]
assert parallel.gather(None) == [None, None]
"""
    processes.finished(processes.start_two(lambda _: ["-c", program], processes.slurm_variables()))
