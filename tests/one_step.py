"""Loads a model, trains it one step on fixed trajectories, and exports it: on one process or on one of several.

python tests/one_step.py MODEL OUTPUT [PROCESS COUNT PORT]
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np

from searchr1_jax.core import parallel, settings, types
from searchr1_jax.data import packing
from searchr1_jax.learning import update
from searchr1_jax.models import decoder, hf

ROWS, ROW_TOKENS = 8, 32


def trajectory(i: int, vocab_size: int) -> types.Trajectory:
    """A prompt of 4 tokens, some of the policy's, some retrieved, some of the policy's again."""
    rng = np.random.default_rng(i)
    sampled = np.repeat([False, True, False, True], [4, *rng.integers(2, 8, 3)])
    return types.Trajectory(
        example=types.QAExample(id=str(i), question="", golden_answers=()),
        sample=0,
        tokens=rng.integers(vocab_size, size=len(sampled)).astype(np.int32),
        sampled=sampled,
        behaviour_logp=np.where(sampled, -1.0, 0.0).astype(np.float32),
        prompt_tokens=4,
        turns=(),
        stop_reason="answered",
        answer=None,
    )


def run(model: pathlib.Path, output: pathlib.Path, *, data: int, fsdp: int, tensor: int) -> dict[str, float]:
    """PPO with a value model on the mesh of all devices of all processes. Returns the update's statistics."""
    adam = {"learning_rate": 1e-2, "warmup_steps": 1, "weight_decay": 0.0}
    ppo = settings.Settings().replace({
        "algorithm.gae_lambda": 0.9, "algorithm.importance_cap": 2.0, "algorithm.entropy_coefficient": 0.01,
        "learner.vocab_chunk": 16, "learner.micro_batch_rows": ROWS, "learner.offload": ("reference", "optimizer"),
        "learner.steps": 1, "model.attention": "xla", "model.remat": True,
        **{f"{model}.{key}": value for model in ("policy", "value") for key, value in adam.items()},
    })  # fmt: skip
    with jax.set_mesh(parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor)):
        shape = hf.read_config(model)
        learner = update.Learner(shape, ppo)
        state = learner.init(hf.load(model), hf.load(model, kind=decoder.Value))
        trajectories = [trajectory(i, shape.vocab_size) for i in range(12)]
        batch = packing.pack(
            trajectories, [i % 2 for i in range(12)], row_tokens=ROW_TOKENS, micro_batch_rows=ROWS, max_rows=12
        )
        batch = parallel.to_mesh(batch, None, "batch", None)
        scores = learner.score(state, learner.keep(hf.load(model)), batch)
        targets, _ = learner.estimate([batch], [scores], None, kl_coefficient=0.1)
        state, statistics = learner.update(state, batch, scores, targets[0], 0, kl_coefficient=0.1)
        hf.save(output, shape, state.policy)
        hf.save(output / "value", shape, state.value, kind=decoder.Value)
        return {name: float(value) for name, value in jax.device_get(statistics).items()}


if __name__ == "__main__":
    model, output, process, count, port = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    print(json.dumps(run(pathlib.Path(model), pathlib.Path(output), data=2, fsdp=2, tensor=2)))
