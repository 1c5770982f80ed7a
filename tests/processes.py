"""Processes of four virtual devices each, one or two of them, for tests of what a pod would do."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# Most of the suite's time is the compiler's, and programs this small gain nothing from its optimizations.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0"
HANGS_S = 1800  # after which a process is taken to hang; whatever the machine does besides, none takes so long


def default_sigint() -> None:
    """Run in a child before it begins: a background job of a script ignores Ctrl-C, and its children would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(arguments, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts `python …` with more variables."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    common = {
        "XLA_FLAGS": f"{COMPILED_QUICKLY} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | common | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def start_two(arguments, environment=lambda process: {}) -> list[subprocess.Popen]:
    """Starts `python …` twice.

    Args:
      arguments: of each, given the process's number.
      environment: variables of each, likewise.
    """
    return [start(arguments(process), environment(process)) for process in range(2)]


def start_verb_twice(arguments) -> list[subprocess.Popen]:
    """Starts a verb as the two processes of one job."""
    return start_two(lambda _: [*arguments, "--distributed"], slurm_variables())


def slurm_variables():
    """Variables by process, from which two find each other as those of a Slurm step do."""
    port = free_port()

    def variables(process):
        slurm = {"SLURM_JOB_ID": 1, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
        slurm |= {"SLURM_PROCID": process, "SLURM_LOCALID": process}
        return {name: str(value) for name, value in slurm.items()} | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}

    return variables


def finished(started: list[subprocess.Popen]) -> list[str]:
    """What each wrote to standard output; all must have ended well."""
    try:
        said = [process.communicate(timeout=HANGS_S) for process in started]
    finally:
        for process in started:
            process.kill()  # one that waits for the other would wait for ever
    assert [process.returncode for process in started] == [0] * len(started), said
    return [out for out, _ in said]
