"""A command in which something goes wrong at a chosen moment, for `bench.faults`.

python -m searchr1_jax.bench.faulty train --workdir=… …     with FAULT=moment:call:process:action and FAULT_DONE=a file

At the `call`-th call of a moment's function, in one process, the action happens: once, as the file then tells.
"""

import functools
import importlib
import os
import pathlib
import signal
import sys
import time

import jax

from searchr1_jax.learning import update
from searchr1_jax.models import hf
from searchr1_jax.rollout import episodes
from searchr1_jax.rollout.tools import search
from searchr1_jax.run import checkpoint, command, kept

MOMENTS = {
    "rollout": (episodes.Run, "read"),
    "search": (search.Search, "call"),
    "update": (update.Learner, "update"),
    "save": (checkpoint.Checkpoints, "save"),
    "restore": (checkpoint.Checkpoints, "restore"),
    "evaluation": (kept.Kept, "add"),
    "export": (hf, "save"),
}


def _fail() -> None:
    raise RuntimeError("an error that was put in")


ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "error": _fail,
    "hang": lambda: time.sleep(1e6),
}


def arm(moment: str, call: int, process: int, action: str, done: pathlib.Path) -> None:
    """Puts the fault in."""
    place, name = MOMENTS[moment]
    function, calls = getattr(place, name), 0

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= call and jax.process_index() == process and not done.exists():
            done.touch()
            ACTIONS[action]()
        return function(*args, **kwargs)

    setattr(place, name, wrapped)


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        moment, call, process, action = os.environ["FAULT"].split(":")
        arm(moment, int(call), int(process), action, pathlib.Path(os.environ["FAULT_DONE"]))
    del sys.argv[0]  # the command is the program now
    module = importlib.import_module(f"searchr1_jax.{sys.argv[0]}")
    command.run(module.main, getattr(module, "define", command.define_settings))
