"""A run in small, inside this process: a world, a policy that searches by chance, compiled programs made once.

    prepare ─▶ world ─ babbler ─▶ base ─ train.build ─▶ Parts ─ fresh ─▶ Experiment, as a process that starts has it

The retriever may die at a query and be repaired.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from unittest import mock

import jax
import orbax.checkpoint as ocp
import slow_decoder

from configs import quickstart
from searchr1_jax import prepare, train
from searchr1_jax.core import settings as settings_lib
from searchr1_jax.data import stream
from searchr1_jax.models import hf
from searchr1_jax.retrieval import base as retrieval
from searchr1_jax.rollout import episodes
from searchr1_jax.run import checkpoint, metrics, model_files, parts as run_parts, retrievers, run_directory, tools
from searchr1_jax.text import rewards, tokenizer

STEPS = 4
REWARD = rewards.resolve(
    settings_lib.Reward(name="searches")
)  # hardly an answer is right by chance, but some search more than others
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


def settings(**changes) -> settings_lib.Settings:
    """The miniature's, GRPO; `changes` by dotted key."""
    return settings_lib.Settings.of(quickstart.get_config("algorithm=grpo")).replace(SMALL | changes)


def babbler(directory: pathlib.Path, output: pathlib.Path, called=("search",), leaning=None) -> None:
    """Writes a policy that says anything, tags often: the shape and the tokens of a model, weights of its own.

    Args:
      called: the tools whose tags it knows.
      leaning: logits of other texts, or in place of the tags', each text one token.
    """
    tokens = tokenizer.Tokenizer.load(directory)
    shape = dataclasses.replace(hf.read_config(directory), tied_embeddings=False)
    logits = {"<answer>": 4.2, "</answer>": 4.2}
    for tool in called:
        logits |= {f"<{tool}>": 6.6, f"</{tool}>": 5.7}
    by_token = {tokens.encode(text)[0]: logit for text, logit in (logits | (leaning or {})).items()}
    params = slow_decoder.leaning(slow_decoder.random_params(shape, 0), by_token)
    model_files.save(output, shape, tokens, params, tools=called)


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
    experiment: train.Experiment

    def fresh(self, workdir: pathlib.Path, c: settings_lib.Settings, *, dies_at: float = math.inf) -> train.Experiment:
        """A run before its first step, and all of the retriever's queries before it."""
        self.retriever.revive(dies_at=dies_at)
        self.rollout.asked_before.clear()
        self.experiment.actor.engine.reset()
        sources = run_parts.questions(c, "train", workdir)
        return dataclasses.replace(
            self.experiment,
            settings=c,
            stream=stream.QuestionStream(sources, seed=c.seed, batch_questions=c.rollout.questions),
            initial=lambda: self.experiment.learner.init(hf.load(workdir / c.model.path), None),
        )

    def train(
        self,
        workdir: pathlib.Path,
        *,
        dies_at: float = math.inf,
        stop_at: int = -1,
        accept_changes: bool = False,
        **changes,
    ) -> bool:
        """What `python -m searchr1_jax.train` does in a workdir, begun or not, with a retriever that may die.

        Args:
          stop_at: the row of metrics.jsonl after which it is asked to stop.
        """
        c = settings(**changes)
        asked_to_stop = lambda: metrics.read(workdir)[-1]["step"] == stop_at
        with checkpoint.Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            found = []
            if checkpoints.latest:
                found = run_directory.check(c, workdir, accept_changes=accept_changes)
            return train.train(self.fresh(workdir, c, dies_at=dies_at), workdir, checkpoints, asked_to_stop, found)


def world(workdir: pathlib.Path, c: settings_lib.Settings) -> None:
    """Writes all that a run needs, on the mesh in use."""
    prepare.run(c, workdir)
    babbler(workdir / "init", workdir / "base", tools.names(c))
    first = (workdir / "train.jsonl").read_text().splitlines(keepends=True)[:3]  # fewer than a step asks
    (workdir / "few.jsonl").write_text("".join(first))


def make(workdir: pathlib.Path) -> Parts:
    """On the mesh in use."""
    c = settings()
    world(workdir, c)
    retriever = Mortal(retrievers.make(c, workdir))
    with mock.patch.object(retrievers, "make", lambda *_: retriever):
        experiment = train.build(c, workdir)
    rollout = Noted(experiment.actor.rollout, retriever)
    experiment = dataclasses.replace(experiment, actor=experiment.actor._replace(rollout=rollout), reward=REWARD)
    return Parts(workdir=workdir, retriever=retriever, rollout=rollout, experiment=experiment)


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
    """Every file below a directory and its bytes, but for those that say who is at work."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in found}
