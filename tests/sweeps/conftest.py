"""A sweep in a directory of its own, with commands that only say they were asked."""

import sys

import place as place_lib
import pytest

from searchr1_jax import sweep
from searchr1_jax.sweeps import runner


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", str(tmp_path))
    yield place_lib.Place(tmp_path)
    for hold in tmp_path.glob("hold-*"):  # so that no command waits on
        hold.unlink()


@pytest.fixture
def do(place, monkeypatch):
    """do(**arguments) does what is left of the sweep, in this process."""
    monkeypatch.setattr(sys, "executable", str(place.python))
    monkeypatch.setattr(runner, "_LOOK_EVERY_S", 0.02)
    signals = place_lib.undisturbed_signals()
    next(signals)
    yield lambda **arguments: sweep.run(place.config, place.workdir, **arguments)
    next(signals, None)
