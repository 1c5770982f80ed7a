"""A run in small, inside this process: a world, a policy that searches by chance, compiled programs made once.

    prepare ─▶ world ─ babbler ─▶ base ─ train.build ─▶ Parts ─ fresh ─▶ train.Run, as a process that starts has it

The retriever may die at a query and be repaired. Verbs are called with flags as keyword arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import types
from unittest import mock

from absl import flags
import jax
import meshes
import orbax.checkpoint as ocp
import slow_decoder

from configs import quickstart
from searchr1_jax import prepare
from searchr1_jax import train
from searchr1_jax.core import parallel
from searchr1_jax.data import stream
from searchr1_jax.learning import guards
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.rollout import episodes
from searchr1_jax.run import checkpoint
from searchr1_jax.run import metrics
from searchr1_jax.run import retrievers
from searchr1_jax.run import run_directory
from searchr1_jax.run import setup
from searchr1_jax.text import rewards
from searchr1_jax.text import tokenizer

STEPS = 4
REWARD = rewards.resolve("searches")  # hardly an answer is right by chance, but some search more than others
SMALL = {
    "world.persons": 40, "world.companies": 40, "world.vocab_size": 300, "world.width": 32, "world.layers": 2,
    "world.mlp_width": 48, "data.train": ("few.jsonl",), "mesh.fsdp": 1, "log.compilation_cache": False,
    "log.trajectories_every": 1, "rollout.questions": 4, "rollout.samples": 2, "rollout.slots": 8,
    "rollout.extend_rows": 4, "rollout.context_tokens": 128, "rollout.max_turn_tokens": 12, "rollout.max_turns": 3,
    "rollout.max_information_tokens": 24, "rollout.decode_tokens": 8, "learner.steps": STEPS,
    "learner.row_tokens": (128,), "learner.vocab_chunk": 128, "learner.micro_batch_rows": 4,
    "policy.learning_rate": 5e-4,
    "retriever.index": "exact", "retriever.dimensions": 32, "retriever.threads": 1, "evaluation.every": 2,
    "checkpoint.every": 100, "sft.batch": 4, "sft.steps": 1,
}  # fmt: skip


def config(**changes):
    """The miniature's, GRPO; `changes` by dotted key."""
    c = quickstart.get_config("algorithm=grpo")
    c.update_from_flattened_dict(SMALL | changes)
    return c


def babbler(directory: pathlib.Path, output: pathlib.Path) -> None:
    """Writes a policy that says anything, tags often: the shape and the tokens of a model, weights of its own."""
    tokens = tokenizer.Tokenizer.load(directory)
    shape = dataclasses.replace(hf.read_config(directory), tied_embeddings=False)
    logits = {"<search>": 6.6, "</search>": 5.7, "<answer>": 4.2, "</answer>": 4.2}
    leaning = {tokens.encode(tag)[0]: logit for tag, logit in logits.items()}
    params = slow_decoder.leaning(slow_decoder.random_params(shape, 0), leaning)
    setup.save_model(output, shape, tokens, params)


class Mortal:
    """A retriever that fails for good from a query on."""

    def __init__(self, alive: retrieval.Retriever):
        self._alive = alive
        self.revive()

    def revive(self, *, dies_at: float = math.inf) -> None:
        """Counts queries from 1 again; from the query of that number on none is answered."""
        self.asked, self._dies_at = 0, dies_at

    def search(self, queries, k):
        self.asked += len(queries)
        if self.asked >= self._dies_at:
            raise retrieval.RetrievalError(queries[0], "status 500", attempts=4, batch=len(queries))
        return self._alive.search(queries, k)


class Noted:
    """A rollout that notes how many queries its retriever had seen when each of its runs began."""

    def __init__(self, rollout: episodes.Rollout, retriever: Mortal):
        self._rollout, self._retriever = rollout, retriever
        self.asked_before: list[int] = []

    @property
    def counts(self) -> episodes.Counts:
        return self._rollout.counts

    def run(self, *args, **kwargs):
        self.asked_before.append(self._retriever.asked)
        return self._rollout.run(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What is shared because it takes long to make, or because it has to be watched."""

    workdir: pathlib.Path  # the world and the base; not to be written to
    retriever: Mortal
    rollout: Noted
    run: train.Run

    def fresh(self, workdir: pathlib.Path, c, *, dies_at: float = math.inf) -> train.Run:
        """A run before its first step, and all of the retriever's queries before it."""
        self.retriever.revive(dies_at=dies_at)
        self.rollout.asked_before.clear()
        self.run.engine.reset()
        base = hf.load(workdir / c.model.path)
        return dataclasses.replace(
            self.run,
            stream=stream.QuestionStream(
                setup.questions(c, "train", workdir), seed=c.seed, batch_questions=c.rollout.questions
            ),
            state=self.run.learner.init(base, None),
        )

    def train(
        self, workdir: pathlib.Path, *, dies_at: float = math.inf, exceeded=None, stop_at: int = -1, **changes
    ) -> bool:
        """What `python -m searchr1_jax.train` does in a workdir, begun or not, with a retriever that may die.

        Args:
          exceeded: in place of `guards.exceeded`.
          stop_at: the row of metrics.jsonl after which it is asked to stop.
        """
        c = config(**changes)
        stop = types.SimpleNamespace(agreed=lambda: metrics.read(workdir)[-1]["step"] == stop_at)
        with checkpoint.Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            if checkpoints.latest:
                run_directory.check(c, workdir)
            run = self.fresh(workdir, c, dies_at=dies_at)
            with mock.patch.object(guards, "exceeded", exceeded or guards.exceeded):
                return train.train(c, run, workdir, checkpoints, stop)


def world(workdir: pathlib.Path, c) -> None:
    """Writes all that a run needs, on the mesh in use."""
    call(prepare, config=c, workdir=workdir)
    babbler(workdir / "init", workdir / "base")
    first = (workdir / "train.jsonl").read_text().splitlines(keepends=True)[:3]  # fewer than a step asks
    (workdir / "few.jsonl").write_text("".join(first))


def make(workdir: pathlib.Path) -> Parts:
    """On the mesh in use."""
    c = config()
    world(workdir, c)
    retriever = Mortal(retrievers.make(c, workdir))
    with mock.patch.object(retrievers, "make", lambda *_: retriever):
        run = train.build(c, workdir)
    rollout = Noted(run.rollout, retriever)
    run = dataclasses.replace(run, rollout=rollout, state=None, reward=REWARD)
    return Parts(workdir=workdir, retriever=retriever, rollout=rollout, run=run)


@functools.cache
def verb(name: str):
    """The module of a verb. Two of them may define the same flag, so each gets a name space of its own."""
    own = {"flag_values": flags.FlagValues()}
    with contextlib.ExitStack() as patches:
        for define in ("string", "integer", "float", "bool", "list", "enum"):
            function = getattr(flags, f"DEFINE_{define}")
            patches.enter_context(mock.patch.object(flags, f"DEFINE_{define}", functools.partial(function, **own)))
        return importlib.import_module(f"searchr1_jax.{name}")


def call(module, **given) -> None:
    """Runs a verb with these flags, the others at their defaults, on one device."""
    mesh = meshes.make()
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(parallel, "make_mesh", lambda **_: mesh))
        for attribute, holder in list(vars(module).items()):
            if isinstance(holder, flags.FlagHolder):
                value = given.pop(attribute.lower().lstrip("_"), holder.default)
                patches.enter_context(mock.patch.object(module, attribute, types.SimpleNamespace(value=value)))
        assert not given, f"{module.__name__} has no flags {list(given)}"
        module.main([])


# What a workdir holds.


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "rollout/"))}
        for row in metrics.read(workdir)
    ]


def trajectories(workdir: pathlib.Path, name: str) -> list[dict]:
    return list(map(json.loads, (workdir / "trajectories" / name).read_text().splitlines()))


def saved_steps(workdir: pathlib.Path) -> list[int]:
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return checkpoints.steps


def last_checkpoint(workdir: pathlib.Path):
    """Policy and optimizer state after the last step."""
    directory = workdir / "checkpoints" / str(STEPS)
    names = ("policy", "policy_optimizer")
    return {name: jax.device_get(ocp.StandardCheckpointer().restore(directory / name)) for name in names}


def files(directory: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Every file below a directory and its bytes."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
