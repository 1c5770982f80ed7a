"""An endless stream of shuffled questions that resumes exactly.

    sources ─▶ one list ─▶ shuffled again each epoch, without end ─▶ steps of batch_questions

An epoch asks each question once, and steps run across the borders of epochs, so every step is full. What a step asks
depends on the seed and the sources alone; processes divide it among themselves (`run.acting`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np

from searchr1_jax.core import types


class QuestionStream:
    """Iterates over steps: each `next` is a list of QAExamples, without end."""

    def __init__(self, sources: Sequence[Sequence[types.QAExample]], *, seed: int, batch_questions: int):
        """A stream at its beginning; `sources` are read by index, when a step needs them. ValueError for empty ones."""
        if batch_questions < 1:
            raise ValueError(f"a step of {batch_questions} questions asks nothing; set rollout.questions to at least 1")
        lengths = [len(source) for source in sources]
        if not lengths or 0 in lengths:
            raise ValueError(f"the sources hold {lengths} questions; give at least one source, none empty")
        self._settings = {"seed": seed, "batch_questions": batch_questions, "questions": lengths}
        self._step = 0
        # Grain shuffles epoch n of seed s like epoch 0 of seed s + n; hashed, nearby seeds share no epoch.
        hashed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        once = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])
        self._steps: Any = once.shuffle(seed=hashed_seed).repeat().batch(batch_questions, batch_fn=list)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[types.QAExample]:
        examples = self._steps[self._step]
        self._step += 1
        return examples

    def state(self) -> dict:
        """The position in the stream, the same on every process; goes through JSON unchanged."""
        return {"step": self._step, **self._settings}

    def restore(self, state: Mapping) -> None:
        """Continues where a stream with the same settings stood at `state`; ValueError names what differs."""
        for key, value in self._settings.items():
            if state[key] != value:
                remedy = "resume with the settings of the saved run, or start a new one"
                raise ValueError(f"the saved stream has {key} {state[key]} and this one {value}; {remedy}")
        self._step = state["step"]
