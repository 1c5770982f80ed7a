"""The records that pass between the parts, and the letters that name array dimensions.

    QAExample ─▶ Trajectory (made of Turns, which hold Passages) ─▶ Batch

Dimensions, wherever a name or comment carries them:

    B batch rows      T time (token positions)   S key time, or slots of the rollout engine
    V vocabulary      D model width              L layers
    N query heads     K key/value heads          H head width      F feed-forward width

Alignment: entry t of every per-token array speaks of token t — its id, its log-probability given the
tokens before it, the value just before it, whether the policy wrote it.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class QAExample:
    """A question and every answer that counts as right."""

    id: str  # unique over all data sets of a run
    question: str
    golden_answers: tuple[str, ...]
    hops: int = 0  # searches that an ideal episode needs; 0 where the data does not say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """One row of the corpus as a search returned it."""

    id: str
    title: str  # first line of the row's contents, quotation marks included
    text: str  # the other lines
    score: float = 0.0  # of the search that found it; higher is better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One stretch of the policy's own tokens and what the environment made of it."""

    text: str  # what the policy wrote, decoded; the tokens themselves are in the trajectory
    event: str  # the name of the tool that was called, "answer", "invalid", or "truncated" by the end of the context
    content: str = ""  # of the call or the answer, stripped
    passages: tuple[Passage, ...] = ()
    reply: str = ""  # what the environment appended
    tokens: int = 0  # that the policy wrote in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One finished episode: a prompt, and after it the policy's tokens and the environment's."""

    example: QAExample
    sample: int  # which of the question's samples this is, from 0
    tokens: np.ndarray  # int32[T], prompt included
    sampled: np.ndarray  # bool[T], True where the policy wrote the token; set when the token was made
    behaviour_logp: np.ndarray  # float32[T], log-prob the sampler gave the token; 0 where not sampled
    prompt_tokens: int
    turns: tuple[Turn, ...]
    stop_reason: str  # "answered", "turn_limit" (of calls), "no_action" or "length"
    answer: str | None
    tools: tuple[str, ...] = ()  # names of those that it could call
    thinking: bool = False  # whether the prompt ends in <think>, as some chat templates do
    eos_dropped: int = 0  # turns that the policy ended with an end-of-sequence token
    passages_cut: int = 0  # replies whose body was cut to its budget or to the context

    @property
    def key(self) -> tuple[str, int]:
        """Sorts trajectories the same way whatever order they finished in."""
        return self.example.id, self.sample

    def calls(self, tool: str) -> int:
        """Calls of a tool that were answered."""
        return sum(turn.event == tool and turn.reply != "" for turn in self.turns)

    @property
    def turn(self) -> np.ndarray:
        """int32[T], the index of the turn that wrote a token, -1 where the policy did not.

        Where there are no turns, as in a trajectory that a file held, each run of written tokens is one.
        """
        turn = np.full(len(self.tokens), -1, np.int32)
        if self.turns:
            turn[self.sampled] = np.repeat(np.arange(len(self.turns)), [turn.tokens for turn in self.turns])
        else:
            begins = self.sampled & ~np.append(False, self.sampled[:-1])
            turn[self.sampled] = np.cumsum(begins)[self.sampled] - 1
        return turn

    @property
    def turn_count(self) -> int:
        return len(self.turns) or int(self.turn.max(initial=-1)) + 1

    @property
    def searches(self) -> int:
        """Searches that were answered."""
        return self.calls("search")


Worth = Any  # a trajectory's reward: a float, which counts for its last turn, or a sequence with one for each turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Trajectories packed into rows of one length, in M micro-batches of B rows.

    Arrays are numpy on the host and JAX arrays on the mesh; the record is a JAX pytree (`data.packing`
    registers it). Rows beyond the last trajectory are empty: segment 0 everywhere.
    """

    tokens: Any  # int32[M, B, T], 0 in empty places
    segment: Any  # int32[M, B, T], 1, 2, … for the trajectories of a row, 0 in empty places
    position: Any  # int32[M, B, T], restarts at 0 with each segment
    policy_mask: Any  # bool[M, B, T], the one mask of all losses and statistics
    sampled: Any  # bool[M, B, T], who wrote the token; differs from the mask in one ablation only
    response: Any  # bool[M, B, T], what follows the prompts, whoever wrote it
    behaviour_logp: Any  # float32[M, B, T]
    turn: Any  # int32[M, B, T], the turn that wrote a masked token, -1 elsewhere
    reward: Any  # float32[M, B, T], on the last masked token of each turn
    weight: Any  # float32[M, B, T], loss weight of a token
    trajectory: Any  # int32[M, B, T], index into the list that was packed, -1 in empty places
    micro_batches: Any  # int32[], how many of the M are in use; the others are padding
