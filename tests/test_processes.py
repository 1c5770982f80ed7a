"""A pod on one machine: two processes with four virtual devices each, against one process with eight."""

import json
import pathlib

import numpy as np
import one_step
import processes
from safetensors import numpy as safetensors_numpy

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "golden" / "qwen2_tied_grouped"


def test_two_processes_load_train_a_step_and_export_what_one_process_does(tmp_path):
    port = processes.free_port()
    two = processes.start_two(lambda i: [HERE / "one_step.py", MODEL, tmp_path / "two", i, 2, port])
    alone = one_step.run(MODEL, tmp_path / "one", data=2, fsdp=2, tensor=2)
    for out in processes.finished(two):  # every process knows the same figures
        together = json.loads(out.splitlines()[-1])  # Gloo talks on the same stream
        assert together.keys() == alone.keys()
        np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=1e-5, atol=1e-6)
    before = safetensors_numpy.load_file(MODEL / "model.safetensors")
    for part in (".", "value"):
        one, two = (safetensors_numpy.load_file(tmp_path / run / part / "model.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys()
        # Adam's first step is the learning rate, 1e-2; a value model's is its head's alone, which began at zero. It
        # makes a step of any size of a gradient that is nothing but rounding, so steps are compared as a whole.
        moved = {name: one[name] - before.get(name, 0.0) for name in one}
        assert max(np.abs(step).max() for step in moved.values()) > 5e-3
        norm = lambda arrays: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))
        assert norm(two[name] - one[name] for name in one) < 1e-4 * norm(moved.values())
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
