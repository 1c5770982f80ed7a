r"""Supervised training on demonstrations; in the quickstart it teaches a random model what a search looks like.

python -m searchr1_jax.sft --config=configs/quickstart.py --workdir=runs/quickstart

Reads the model `sft.model`, writes the model `sft.output`, both Hugging Face directories. What it learns comes from
the files `data.demonstrations` — demonstrations, trajectories, or questions with their answers, which is the papers'
SFT baseline — or from the invented world: drills first, then the mixture (see `data.demonstrations`). Interrupted, it
starts again from its last checkpoint.

Rejection sampling: candidates for every training question, a model taught by those that were right, and its figures.

python -m searchr1_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart \
    --model=runs/quickstart/base --split=train --decoding=sampled --samples=5 --name=candidates
python -m searchr1_jax.sft --config=configs/quickstart.py --workdir=runs/quickstart \
    --config.data.demonstrations="('eval/candidates-sampled.jsonl',)" --config.sft.min_reward=1 \
    --config.sft.model=base --config.sft.output=chosen
python -m searchr1_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart \
    --model=runs/quickstart/chosen --name=chosen
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import itertools
import json
import pathlib
import time

import numpy as np

from searchr1_jax.core import parallel
from searchr1_jax.core import settings as settings_lib
from searchr1_jax.core import types
from searchr1_jax.data import demonstrations
from searchr1_jax.data import packing
from searchr1_jax.data.invented import world as world_lib
from searchr1_jax.learning import supervised
from searchr1_jax.models import config as model_config
from searchr1_jax.models import hf
from searchr1_jax.run import checkpoint
from searchr1_jax.run import command
from searchr1_jax.run import metrics
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup
from searchr1_jax.text import tokenizer

_CONFIG, _WORKDIR = command.define_flags()
_CHECKPOINT_EVERY = 200  # steps
_SAY_EVERY = 50  # steps
# What a run must go on with.
_DECISIVE = (
    "sft.", "data.demonstrations", "world.", "protocol.", "rollout.passages", "rollout.max_information_tokens",
    "rollout.context_tokens", "learner.row_tokens", "learner.micro_batch_rows", "model.param_dtype",
    "model.compute_dtype",
)  # fmt: skip


def rows_from_world(config: setup.Config, workdir: pathlib.Path, step: int) -> Iterator[dict]:
    """The endless rows of the invented world's demonstrations, from a step on.

    Raises:
      ValueError: where the workdir's corpus is not that world's.
    """
    path, c = workdir / "world.json", config.sft
    there = json.loads(path.read_text()) if path.exists() else {}
    if changed := run_directory.differences(there, run_directory.invented_world(config)):
        raise ValueError(
            f"the world of {workdir} is not the config's ({'; '.join(changed.values())}); run python -m"
            " searchr1_jax.prepare in another --workdir, or name files in data.demonstrations"
        )
    world = setup.world(config)
    questions = world_lib.questions(world, "train")
    shares = demonstrations.Mixture(
        right=c.mixture_right,
        guess=c.mixture_guess,
        wrong_entity=c.mixture_wrong_entity,
        stopped_early=c.mixture_stopped_early,
        guess_weight=c.guess_weight,
    )
    made = dict(passages=config.rollout.passages, seed=c.seed)
    drills = itertools.islice(demonstrations.drills(world, questions, **made), c.drill_steps * c.batch)
    rows = itertools.chain(drills, demonstrations.mixture(world, questions, shares, **made))
    return itertools.islice(rows, step * c.batch, None)


def read_files(
    config: setup.Config, workdir: pathlib.Path, as_trajectory: Callable, vocab_size: int
) -> list[demonstrations.Weighted]:
    """All that the config's files hold and that is rewarded enough.

    Raises:
      ValueError: naming file and line of a row that cannot be learned, or where nothing is left.
    """
    chosen, left_out, limit = [], 0, config.sft.min_reward
    for name in config.data.demonstrations:
        path = run_directory.find(name, workdir, "data.demonstrations")
        found, less = demonstrations.read(path, as_trajectory, vocab_size=vocab_size, min_reward=limit)
        chosen, left_out = chosen + found, left_out + less
    if not chosen:
        raise ValueError(
            f"all {left_out} trajectories of data.demonstrations are rewarded less than sft.min_reward of {limit:g};"
            " lower it or sample more of them"
        )
    if left_out:
        metrics.say(f"left out {left_out} of {left_out + len(chosen)} trajectories: rewarded less than {limit:g}")
    return chosen


def shuffled(items: list, seed: int) -> Iterator:
    """The items without end, in another order each epoch."""
    for epoch in itertools.count():
        yield from (items[i] for i in np.random.default_rng((seed, epoch)).permutation(len(items)))


def source(
    config: setup.Config,
    workdir: pathlib.Path,
    tokens: tokenizer.Tokenizer,
    model: model_config.ModelConfig,
    step: int,
) -> Iterator[demonstrations.Weighted]:
    """What a run learns, without end, from a step on. Files are read and checked at once."""
    as_trajectory = functools.partial(
        demonstrations.to_trajectory,
        tokenizer=tokens,
        protocol=setup.texts(config),
        max_information_tokens=config.rollout.max_information_tokens,
        context=config.rollout.context_tokens,
        content_weight=config.sft.content_weight,
    )
    if not config.data.demonstrations:
        return map(as_trajectory, rows_from_world(config, workdir, step))
    chosen = read_files(config, workdir, as_trajectory, model.vocab_size)
    return itertools.islice(shuffled(chosen, config.sft.seed), step * config.sft.batch, None)


def batches(config: setup.Config, pairs: Iterator[demonstrations.Weighted]) -> Iterator[types.Batch]:
    """The endless batches of a run, on the mesh."""
    size = config.sft.batch
    while True:
        trajectories, weights = zip(*itertools.islice(pairs, size))
        batch = packing.pack(
            trajectories,
            [0.0] * size,
            weights=weights,
            row_tokens=config.learner.row_tokens[-1],
            micro_batch_rows=config.learner.micro_batch_rows,
            max_rows=size,
        )
        yield parallel.to_mesh(batch, None, "batch", None)


def directory(config: setup.Config, workdir: pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints: one place for each model that is written into a workdir."""
    return workdir / "sft" / pathlib.PurePath(config.sft.output).name


def train(config: setup.Config, workdir: pathlib.Path, checkpoints: checkpoint.Checkpoints) -> None:
    """The whole run, or what is left of it."""
    c = config.sft
    start_from = setup.model_directory(c.model, workdir, "sft.model")
    model, tokens = hf.read_config(start_from), tokenizer.Tokenizer.load(start_from)
    total = c.steps if config.data.demonstrations else c.drill_steps + c.mixture_steps
    flat = run_directory.flatten(run_directory.as_json(config))
    settings = {key: value for key, value in flat.items() if key.startswith(_DECISIVE)}
    step = checkpoints.latest or 0
    if step:
        _, extra = checkpoints.restore(step, {})
        if changed := run_directory.differences(extra["config"], settings):
            raise ValueError(
                f"{directory(config, workdir)} holds a run with another config ({'; '.join(changed.values())}); go on"
                " with that config, choose another --workdir, or remove that directory"
            )
    found = batches(config, source(config, workdir, tokens, model, step))
    learner = supervised.SupervisedLearner(model, settings_lib.Settings.of(config), total_steps=total)
    state = learner.init(hf.load(start_from, dtype=setup.dtype(config.model.param_dtype)))
    if step:
        state = supervised.SupervisedState(**checkpoints.restore(step, state._asdict())[0])
        metrics.say(f"resuming at step {step} of {total}")
    said, began = step, time.time()
    while step < total:
        state, statistics = learner.update(state, next(found), step)
        step += 1
        if step % _SAY_EVERY == 0 or step == total:
            loss = float(statistics["loss"])
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}; lower sft.optimizer.learning_rate")
            per_step = (time.time() - began) / (step - said)
            said, began = step, time.time()
            metrics.say(f"sft step {step}/{total}  loss {loss:.4f}  {per_step * 1e3:.0f} ms/step")
        if step % _CHECKPOINT_EVERY == 0 or step == total:
            checkpoints.save(step, state._asdict(), {"config": settings})
    setup.save_model(workdir / c.output, model, tokens, state.policy)
    metrics.say(f"wrote {workdir / c.output}")


def main(argv):
    del argv
    config = _CONFIG.value
    with (
        command.session(config, _WORKDIR.value) as workdir,
        metrics.verb(workdir, "sft"),
        checkpoint.Checkpoints(directory(config, workdir), keep=1) as checkpoints,
    ):
        train(config, workdir, checkpoints)


if __name__ == "__main__":
    command.run(main)
