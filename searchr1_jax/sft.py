r"""Supervised training on demonstrations; in the quickstart it teaches a random model what a search looks like.

python -m searchr1_jax.sft --config=configs/quickstart.py --workdir=runs/quickstart

Reads the model `sft.model`, writes the model `sft.output`, both Hugging Face directories. What it learns comes from
the files `data.demonstrations` — demonstrations, trajectories, or questions with their answers, which is the papers'
SFT baseline — or from the invented world: drills first, then the mixture (see `data.demonstrations`). Interrupted, it
starts again from its last checkpoint.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
import os
import pathlib
import sys
import time

from absl import flags
import jax.numpy as jnp
import numpy as np

from searchr1_jax.core import parallel, settings as settings_lib, types
from searchr1_jax.data import demonstrations, packing
from searchr1_jax.data.invented import drills, world as world_lib
from searchr1_jax.learning import supervised
from searchr1_jax.models import config as model_config, hf
from searchr1_jax.run import checkpoint, command, metrics, model_files, run_directory, stop, tools
from searchr1_jax.text import tokenizer

_CHECKPOINT_EVERY = 200  # steps
_SAY_EVERY = 50  # steps


def rows_from_world(settings: settings_lib.Settings, workdir: pathlib.Path, step: int) -> Iterator[dict]:
    """The endless rows of the invented world's demonstrations, from a step on.

    Raises:
      ValueError: where the workdir's corpus is not that world's.
    """
    changed, c = run_directory.world_differences(settings, workdir), settings.sft
    if changed is None or changed:
        why = "; ".join(changed) if changed else "it holds none"
        raise ValueError(
            f"the world of {workdir} is not the config's ({why}); run python -m searchr1_jax.prepare in another"
            " --workdir, or name files in data.demonstrations"
        )
    world = world_lib.make_world(settings.world)
    questions, passages = world_lib.questions(world, "train"), settings.rollout.passages
    moves = drills.drills(world, questions, passages=passages, seed=c.seed)
    moves = itertools.islice(moves, c.drill_steps * c.batch)
    rows = itertools.chain(moves, drills.mixture(world, questions, c, passages=passages))
    return itertools.islice(rows, step * c.batch, None)


def read_files(
    settings: settings_lib.Settings, workdir: pathlib.Path, as_trajectory: Callable, vocab_size: int
) -> list[tuple[demonstrations.Rows, int]]:
    """All that the files of `data.demonstrations` hold and that is rewarded enough.

    Raises:
      ValueError: naming file and line of a row that cannot be learned, or where nothing is left.
    """
    chosen, left_out, limit = [], 0, settings.sft.min_reward
    for name in settings.data.demonstrations:
        path = run_directory.find(name, workdir, "data.demonstrations")
        found, less = demonstrations.read(path, as_trajectory, vocab_size=vocab_size, min_reward=limit)
        chosen += [(found, index) for index in range(len(found))]
        left_out += less
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
    settings: settings_lib.Settings,
    workdir: pathlib.Path,
    tokens: tokenizer.Tokenizer,
    model: model_config.ModelConfig,
    step: int,
) -> Iterator[demonstrations.Weighted]:
    """What a run learns, without end, from a step on. Files are read and checked at once."""
    as_trajectory = functools.partial(
        demonstrations.to_trajectory,
        tokenizer=tokens,
        protocol=settings.protocol,
        tools=tools.names(settings),
        max_information_tokens=settings.rollout.max_information_tokens,
        context=settings.rollout.context_tokens,
        content_weight=settings.sft.content_weight,
    )
    if not settings.data.demonstrations:
        return map(as_trajectory, rows_from_world(settings, workdir, step))
    chosen = read_files(settings, workdir, as_trajectory, model.vocab_size)
    places = itertools.islice(shuffled(chosen, settings.sft.seed), step * settings.sft.batch, None)
    return (rows[index] for rows, index in places)


def batches(settings: settings_lib.Settings, pairs: Iterator[demonstrations.Weighted]) -> Iterator[types.Batch]:
    """The endless batches of a run, on the mesh."""
    size = settings.sft.batch
    while True:
        trajectories, weights = zip(*itertools.islice(pairs, size))
        batch = packing.pack(
            trajectories,
            [0.0] * size,
            weights=weights,
            row_tokens=settings.learner.row_tokens[-1],
            micro_batch_rows=settings.learner.micro_batch_rows,
            max_rows=size,
        )
        yield parallel.to_mesh(batch, None, "batch", None)


def place(settings: settings_lib.Settings, workdir: pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints: one place for each model that is written into a workdir."""
    return workdir / "sft" / pathlib.PurePath(settings.sft.output).name


def resumed(
    settings: settings_lib.Settings, decisive: dict, workdir: pathlib.Path, checkpoints: checkpoint.Checkpoints
) -> int:
    """The step to go on from, 0 for a new run.

    Raises:
      ValueError: where the checkpoint is of a run with other settings.
    """
    step = checkpoints.latest or 0
    if step:
        where = place(settings, workdir)
        begun = run_directory.written(checkpoints.restore(step, {})[1]["config"], str(where))
        changed = [change for change in run_directory.changes(begun, settings) if change.key in decisive]
        if changed:
            raise ValueError(
                f"{where} holds a run with another config ({'; '.join(map(str, changed))}); go on with that config,"
                " choose another --workdir, or remove that directory"
            )
    return step


def train(
    settings: settings_lib.Settings,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """The whole run, or what is left of it. Returns whether it came to its end."""
    c = settings.sft
    start_from = model_files.find(c.model, workdir, "sft.model")
    model, tokens = hf.read_config(start_from, settings.model.family), tokenizer.Tokenizer.load(start_from)
    total = c.steps if settings.data.demonstrations else c.drill_steps + c.mixture_steps
    decisive = {key.name: key.value for key in settings_lib.keys(settings) if key.rules["base"]}
    step = resumed(settings, decisive, workdir, checkpoints)
    found = batches(settings, source(settings, workdir, tokens, model, step))
    learner = supervised.SupervisedLearner(model, settings, total_steps=total)
    state = learner.init(hf.load(start_from, model, dtype=jnp.dtype(settings.model.param_dtype)))
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
        stopping = step < total and asked_to_stop()
        if step % _CHECKPOINT_EVERY == 0 or step == total or stopping:
            checkpoints.save(step, state._asdict(), {"config": decisive})
        if stopping:
            metrics.say(f"stopped after step {step}; start again with the same command to go on")
            return False
    model_files.save(workdir / c.output, model, tokens, state.policy, tools=tools.names(settings))
    metrics.say(f"wrote {workdir / c.output}")
    return True


def run(
    settings: settings_lib.Settings, workdir: str | os.PathLike, *, asked_to_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Trains `sft.model` into `sft.output` in the workdir, or goes on there. Returns whether it came to its end.

    `asked_to_stop` is asked after each step, on all processes together.
    """
    with (
        command.session(settings, workdir) as directory,
        run_directory.locked(directory, "sft"),
        metrics.booked(directory, "sft"),
        checkpoint.Checkpoints(place(settings, directory), keep=1) as checkpoints,
    ):
        return train(settings, directory, checkpoints, asked_to_stop)


def main() -> None:
    stopping = stop.StopSignal()
    if not run(command.settings(), flags.FLAGS.workdir, asked_to_stop=stopping.agreed):
        sys.exit(stopping.exit_status)


if __name__ == "__main__":
    command.run(main, command.define_settings)
