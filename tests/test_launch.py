"""What launch/setup.sh asks of Python, told by a Python that only says so; nothing is installed."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CHECK = "-m pip --version"
FAKE_PYTHON = """#!/usr/bin/env bash
# Makes environments of copies of itself, and says what it was asked.
echo "$*" >> "$ASKED"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pip" ;;
  "-m pip --version") [ -e "$(dirname "$0")/../pip" ] ;;
esac
"""
INSTALL = "-m pip install --quiet --disable-pip-version-check -e .[test]"


@pytest.fixture
def sourced(tmp_path):
    """sourced(**environment) sources setup.sh in a folder of the caller's.

    Returns what it leaves in VENV and WORKDIR, and what it asked of Python.
    """
    repository, caller, asked = tmp_path / "repository", tmp_path / "caller", tmp_path / "asked"
    shutil.copytree(ROOT / "launch", repository / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, repository)
    caller.mkdir()
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def sourced(**environment):
        asked.write_text("")
        script = f'set -euo pipefail; source "{repository}/launch/setup.sh" >&2; echo "$PWD|$VENV|${{WORKDIR:-}}"'
        known = dict(PATH=os.environ["PATH"], PYTHON=str(python), ASKED=str(asked))
        out = subprocess.run(
            ["bash", "-c", script], cwd=caller, env=known | environment, text=True, check=True, stdout=subprocess.PIPE
        ).stdout  # fmt: skip
        place, *paths = out.strip().split("|")
        assert place == str(repository)
        return paths, asked.read_text().splitlines()

    return sourced


def test_an_environment_is_made_and_filled_once(sourced):
    assert sourced() == ([".venv", ""], ["-m venv .venv", INSTALL])
    assert sourced() == ([".venv", ""], [CHECK])
    assert sourced(EXTRAS="gpu")[1] == [CHECK, INSTALL.replace("[test]", "[test,gpu]")]


def test_an_environment_without_pip_is_repaired_and_filled_again(sourced, tmp_path):
    sourced()
    (tmp_path / "repository" / ".venv" / "pip").unlink()
    assert sourced()[1] == [CHECK, "-m venv .venv", INSTALL]
    assert sourced()[1] == [CHECK]


def test_paths_are_relative_to_the_callers_directory(sourced, tmp_path):
    caller = tmp_path / "caller"
    paths, asked = sourced(VENV="env", WORKDIR="runs/a")
    assert paths == [f"{caller}/env", f"{caller}/runs/a"] and asked[0] == f"-m venv {caller}/env"
    assert sourced(VENV=f"{caller}/env", WORKDIR="/tmp/b") == ([f"{caller}/env", "/tmp/b"], [CHECK])
