"""Loads a model, trains it one step on fixed trajectories, and exports it: on one process or on one of several.

python tests/one_step.py MODEL OUTPUT [PROCESS COUNT PORT]
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.core import types
from searchr1_jax.data import packing
from searchr1_jax.learning import optimizer
from searchr1_jax.learning import update
from searchr1_jax.models import decoder
from searchr1_jax.models import hf

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
    rate = optimizer.OptimizerConfig(
        learning_rate=1e-2, warmup_steps=1, final_lr_fraction=1.0, total_steps=1, b1=0.9, b2=0.999, weight_decay=0.0,
        max_gradient_norm=1.0,
    )  # fmt: skip
    config = update.UpdateConfig(
        advantage="gae", discount=1.0, gae_lambda=0.9, whiten=True, mask_estimates=True,
        policy_loss="ppo_clip", clip_low=0.2, clip_high=0.2, dual_clip=0.0, importance_cap=2.0, value_clip=0.5,
        has_reference=True, kl_in="reward", kl_estimator="k1", entropy_coefficient=0.01, value_warmup_steps=0,
        temperature=1.0, vocab_chunk=16, offload=update.OFFLOADABLE,
        compute=decoder.Compute(dtype=jnp.float32, remat=True, attention="xla"),
        policy_optimizer=rate, value_optimizer=rate,
    )  # fmt: skip
    with jax.set_mesh(parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor)):
        shape = hf.read_config(model)
        learner = update.Learner(shape, config)
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
