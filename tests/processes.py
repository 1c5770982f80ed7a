"""Two processes on one machine, four virtual devices each, for tests of what a pod would do."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(arguments, environment=lambda process: {}) -> list[subprocess.Popen]:
    """Starts `python …` twice.

    Args:
      arguments: of each, given the process's number.
      environment: variables of each, likewise.
    """
    common = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments(process))],
            env=os.environ | common | environment(process),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for process in range(2)
    ]


def finished(started: list[subprocess.Popen]) -> list[str]:
    """What each wrote to standard output; all must have ended well."""
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [out for out, _ in said]
