r"""A reward of turns: the first search that shows a right answer, and then the answer.

python -m searchr1_jax.train --config=configs/quickstart.py:algorithm=turn_grpo --workdir=runs/turns \
    --config.reward.name=examples.turn_reward:found_then_answered

A reward is a function of a `Trajectory`. It returns a number, which is what the whole is worth and counts for its last
turn, or, as here, one number for each turn. What is made of them depends on `algorithm.advantage`: "gae" and "return"
receive each at the last token of its turn, "turn_returns" credits a turn with its own and those after it, the others
add them up.
"""

from __future__ import annotations

from searchr1_jax.core import types
from searchr1_jax.text import rewards

FOUND = 0.2  # what finding it is worth, beside 1 for the answer


def found_then_answered(trajectory: types.Trajectory) -> list[float]:
    """One number for each turn."""
    golden, found, worth = trajectory.example.golden_answers, False, []
    for turn in trajectory.turns:
        shown = turn.event == "search" and rewards.sub_exact_match(turn.reply, golden) > 0
        worth.append(FOUND if shown and not found else 0.0)  # once, or it would pay never to stop searching
        found = found or shown
    worth[-1] += rewards.exact_match(trajectory.answer, golden)
    return worth
