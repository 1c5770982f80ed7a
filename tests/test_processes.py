"""A pod on one machine: two processes with four virtual devices each, against one process with eight."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import one_step
from safetensors import numpy as safetensors_numpy

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "golden" / "qwen2_tied_grouped"
ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def test_two_processes_load_train_a_step_and_export_what_one_process_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "one_step.py", MODEL, tmp_path / "two", str(process), "2", str(port)],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    alone = one_step.run(MODEL, tmp_path / "one", data=2, fsdp=2, tensor=2)
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for out, _ in said:  # every process knows the same figures
        together = json.loads(out.splitlines()[-1])  # Gloo talks on the same stream
        assert together.keys() == alone.keys()
        np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=1e-5, atol=1e-6)
    before = safetensors_numpy.load_file(MODEL / "model.safetensors")
    for part in (".", "value"):
        one, two = (
            safetensors_numpy.load_file(tmp_path / run / part / "model.safetensors") for run in ("one", "two")
        )
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
        # Adam's first step is the learning rate, 1e-2; a value model's is its head's alone, which began at zero.
        moved = max(np.abs(one[name] - before.get(name, 0.0)).max() for name in one)
        assert moved > 5e-3
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
