"""A workload whose turns have given lengths, and what makes the real engine and the real loop keep to them.

    Settings ─ make ─▶ Workload: prompts, turns and passages as token ids
                           ├─ tasks ─▶ a schedule (`episodes.Rollout`, or one of `lockstep`)
                           ├─▶ Engine: the same programs and weights; a turn ends after its number of tokens
                           └─▶ Environment: it reads the turn's action and its tool brings the passages, late

Turns are numbered through, and two tokens of the vocabulary belong to each: token i *opens* turn i, as the last of the
prompt or passages before it; its *closing* is the last that the policy writes, as `</search>` would be. The others are
sampled freely and mean nothing, so that all schedules do the same work: as many tokens, turns, searches and passages.
"""

import dataclasses
import time

import jax
import numpy as np

from searchr1_jax.core import parallel, settings as settings_lib, types
from searchr1_jax.rollout import engine as engine_lib, environment, episodes, programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the numbers are drawn from; ranges are uniform and hold both ends."""

    trajectories: int = 128
    searches: tuple[int, int] = (1, 4)
    prompt_tokens: tuple[int, int] = (100, 200)
    passage_tokens: tuple[int, int] = (100, 200)
    turn_median: float = 50.0  # tokens, of a log-normal
    turn_sigma: float = 0.7  # of the logarithm
    turn_tokens: tuple[int, int] = (10, 200)  # clipped to
    latency_s: float = 0.05  # of a call of the retriever, however many queries it brings
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the policy and what follows it."""

    tokens: int  # that the policy writes, the closing one included
    passages: tuple[int, ...]  # token ids that the search brings; empty where the turn answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Episodes to be played."""

    settings: Settings
    prompts: tuple[tuple[int, ...], ...]  # token ids of each trajectory
    turns: tuple[Turn, ...]  # those of a trajectory one after the other

    def closing(self, turn: int) -> int:
        """The token that ends a turn; token `turn` is the one that opens it."""
        return len(self.turns) + turn

    @property
    def sampled_tokens(self) -> int:
        """What the policy writes in all."""
        return sum(turn.tokens for turn in self.turns)

    def turns_of(self, trajectory: int) -> tuple[Turn, ...]:
        begins = [prompt[-1] for prompt in self.prompts] + [len(self.turns)]
        return self.turns[begins[trajectory] : begins[trajectory + 1]]

    def tasks(self) -> list[episodes.Task]:
        """One for each trajectory, as if each were a question of its own."""
        example = lambda number: types.QAExample(id=f"{number}", question="", golden_answers=())
        return [episodes.Task(example=example(i), prompt=p, samples=1) for i, p in enumerate(self.prompts)]

    def limits(self) -> episodes.Limits:
        """Of its episodes; none of them is met."""
        return episodes.Limits(
            max_turns=self.settings.searches[1], max_information_tokens=self.settings.passage_tokens[1], tool_threads=8
        )


def make(settings: Settings, vocab_size: int) -> Workload:
    """Draws a workload; raises ValueError where the vocabulary is too small for the tokens of all turns."""
    rng = np.random.default_rng(settings.seed)
    between = lambda limits: int(rng.integers(limits[0], limits[1], endpoint=True))
    searches = [between(settings.searches) for _ in range(settings.trajectories)]
    total = sum(searches) + len(searches)
    if 2 * total >= vocab_size:
        raise ValueError(
            f"{total} turns need {2 * total} tokens of their own, the vocabulary has {vocab_size}; lower trajectories"
        )

    def text(limits, turn):
        """Tokens that belong to no turn, and the one that opens the turn to follow."""
        return *rng.integers(2 * total, vocab_size, size=between(limits) - 1).tolist(), turn

    prompts, turns = [], []
    for searched in searches:
        prompts.append(text(settings.prompt_tokens, len(turns)))
        for left in reversed(range(searched + 1)):
            length = settings.turn_median * np.exp(settings.turn_sigma * rng.standard_normal())
            passages = text(settings.passage_tokens, len(turns) + 1) if left else ()
            turns.append(Turn(tokens=int(np.clip(round(length), *settings.turn_tokens)), passages=passages))
    return Workload(settings=settings, prompts=tuple(prompts), turns=tuple(turns))


class Words:
    """A tokenizer whose tokens are written as their numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens) -> str:
        return " ".join(map(str, tokens))


class Library:
    """The tool of a workload: the passages that follow a turn, after their time."""

    name = "search"

    def __init__(self, workload: Workload):
        self._workload = workload

    def call(self, calls: list[environment.Call]) -> list[str]:
        return [Words().decode(passages) for passages in self.find([int(call.content) for call in calls])]

    def find(self, turns: list[int]) -> list[tuple[int, ...]]:
        """The passages of each turn, as token ids."""
        time.sleep(self._workload.settings.latency_s)
        return [self._workload.turns[turn].passages for turn in turns]


class Environment(environment.Environment):
    """The environment of a workload: the closing token tells the turn, and passages have nothing around them."""

    def __init__(self, workload: Workload):
        super().__init__(settings_lib.Protocol(information="{docs}"), [Library(workload)])
        self._workload = workload

    def act(self, turn_text: str, turns_left: int) -> environment.Outcome:
        turn = Words().encode(turn_text)[-1] - self._workload.closing(0)
        if not self._workload.turns[turn].passages:
            return environment.Outcome(event="answer", stop="answered")
        return environment.Outcome(event="search", content=str(turn))


class Engine(engine_lib.Engine):
    """The engine, whose turns end after their number of tokens.

    The real programs run. Each turn starts with its token counter advanced so that the turn limit stops it after the
    drawn length; its last token is then replaced by the closing one.
    """

    def __init__(self, *args, workload: Workload, max_turn_tokens: int, **kwargs):
        self._workload, self._max_turn_tokens = workload, max_turn_tokens
        super().__init__(*args, max_turn_tokens=max_turn_tokens, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.budget: int | None = None  # tokens that every turn decodes; None: it stops at its closing
        self._turn = np.zeros(self.shapes.slots, np.int32)  # that each slot writes
        self._left = np.zeros(self.shapes.slots, np.int32)  # tokens to its closing
        self.waited_s = 0.0  # for the device
        self.wasted = 0  # tokens decoded after the closing of a turn

    def settle(self) -> None:
        """Waits for everything that was dispatched."""
        jax.block_until_ready(self._state)

    def extend(self, rows: list[engine_lib.Row], chunk: int) -> None:
        super().extend(rows, chunk)
        ahead = np.zeros(self.shapes.slots, np.int32)
        for row in rows:
            if row.pending is not None:
                slots, tokens = list(row.slots), self._workload.turns[row.pending].tokens
                self._turn[slots], self._left[slots] = row.pending, tokens
                ahead[slots] = self._max_turn_tokens - (self.budget or tokens)
        with jax.set_mesh(self.mesh):
            turn_tokens = self._state.turn_tokens + parallel.to_mesh(ahead, "batch")
            self._state = self._state._replace(turn_tokens=turn_tokens)

    def read(self, written: programs.Written) -> programs.Written:
        began = time.perf_counter()
        written = super().read(written)
        self.waited_s += time.perf_counter() - began
        kept = np.minimum(written.count, self._left)
        self.wasted += int((written.count - kept).sum())
        tokens = written.tokens.copy()
        for slot in np.flatnonzero((kept > 0) & (kept == self._left)):
            tokens[slot, kept[slot] - 1] = self._workload.closing(self._turn[slot])
        self._left -= kept
        return written._replace(tokens=tokens, count=kept)
