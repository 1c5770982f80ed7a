r"""Supervised training on demonstrations; in the quickstart it teaches a random model what a search looks like.

python -m searchr1_jax.sft --config=configs/quickstart.py --workdir=runs/quickstart

Reads the model `sft.model`, writes the model `sft.output`, both Hugging Face directories. Demonstrations come from
the files `data.demonstrations`, or from the invented world: drills first, then the mixture (see
`data.demonstrations`). Interrupted, it starts again from its last checkpoint.
"""

from __future__ import annotations

import itertools
import time

import jax
import numpy as np

from searchr1_jax import checkpoint
from searchr1_jax import metrics
from searchr1_jax import parallel
from searchr1_jax import setup
from searchr1_jax.data import demonstrations
from searchr1_jax.data import packing
from searchr1_jax.data import world as world_lib
from searchr1_jax.learning import supervised
from searchr1_jax.models import hf
from searchr1_jax.text import tokenizer

_CONFIG, _WORKDIR = setup.define_flags()
_CHECKPOINT_EVERY = 200  # steps
_SAY_EVERY = 50  # steps


def rows_from_world(config, step: int):
    """The endless rows of the invented world's demonstrations, from a step on, and the total of steps."""
    c = config.sft
    world = world_lib.make_world(
        seed=config.world.seed, persons=config.world.persons, companies=config.world.companies
    )
    questions = world_lib.questions(world, "train")
    shares = demonstrations.Mixture(
        right=c.mixture_right,
        guess=c.mixture_guess,
        wrong_entity=c.mixture_wrong_entity,
        stopped_early=c.mixture_stopped_early,
        guess_weight=c.guess_weight,
    )
    drills = itertools.islice(demonstrations.drills(world, questions, seed=c.seed), c.drill_steps * c.batch)
    rows = itertools.chain(drills, demonstrations.mixture(world, questions, shares, seed=c.seed))
    return itertools.islice(rows, step * c.batch, None), c.drill_steps + c.mixture_steps


def rows_from_files(config, workdir, step: int):
    """The rows of the config's files in an order shuffled anew each epoch, from a step on, and the steps."""
    paths = [setup.find(name, workdir, "data.demonstrations") for name in config.data.demonstrations]
    rows = [row for path in paths for row in demonstrations.read(path)]
    epochs = (
        np.random.default_rng((config.sft.seed, epoch)).permutation(len(rows)) for epoch in itertools.count()
    )
    order = itertools.chain.from_iterable(epochs)
    return (rows[i] for i in itertools.islice(order, step * config.sft.batch, None)), config.sft.steps


def main(argv):
    del argv
    config = _CONFIG.value
    c = config.sft
    with setup.session(config, _WORKDIR.value) as workdir, metrics.verb(workdir, "sft"):
        start_from = setup.model_directory(c.model, workdir, "sft.model")
        model, tokens, texts = (
            hf.read_config(start_from),
            tokenizer.Tokenizer.load(start_from),
            setup.texts(config),
        )
        total = c.steps if config.data.demonstrations else c.drill_steps + c.mixture_steps
        learner = supervised.SupervisedLearner(
            model,
            setup.optimizer_config(c.optimizer, total),
            compute=setup.compute(config),
            vocab_chunk=config.learner.vocab_chunk,
        )
        state = learner.init(hf.load(start_from, dtype=setup.dtype(config.model.param_dtype)))
        checkpoints = checkpoint.Checkpoints(workdir / "sft", keep=1)
        step = checkpoints.latest or 0
        if step:
            state = supervised.SupervisedState(**checkpoints.restore(step, state._asdict())[0])
            metrics.say(f"resuming at step {step} of {total}")
        source = (
            rows_from_files(config, workdir, step)
            if config.data.demonstrations
            else rows_from_world(config, step)
        )
        rows = source[0]
        limits = dict(
            max_information_tokens=config.rollout.max_information_tokens,
            context=config.rollout.context_tokens,
            content_weight=c.content_weight,
        )
        began = time.time()
        while step < total:
            pairs = [
                demonstrations.to_trajectory(row, tokens, texts, **limits)
                for row in itertools.islice(rows, c.batch)
            ]
            batch = packing.pack(
                [trajectory for trajectory, _ in pairs],
                [0.0] * c.batch,
                weights=[weight for _, weight in pairs],
                row_tokens=config.learner.row_tokens,
                micro_batch_rows=config.learner.micro_batch_rows,
                max_rows=c.batch,
            )
            state, statistics = learner.update(state, parallel.to_mesh(batch, None, "batch", None), step)
            step += 1
            if step % _SAY_EVERY == 0 or step == total:
                values = jax.device_get(statistics)
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"the loss is {values['loss']} at step {step}; lower sft.optimizer.learning_rate"
                    )
                per_step = (time.time() - began) / (_SAY_EVERY if step % _SAY_EVERY == 0 else 1)
                began = time.time()
                metrics.say(
                    f"sft step {step}/{total}  loss {values['loss']:.4f}  {per_step * 1e3:.0f} ms/step"
                )
            if step % _CHECKPOINT_EVERY == 0 or step == total:
                checkpoints.save(step, state._asdict(), {})
        checkpoints.close()
        output = workdir / c.output
        setup.save_model(output, model, tokens, state.policy)
        metrics.say(f"wrote {output}")


if __name__ == "__main__":
    setup.run(main)
