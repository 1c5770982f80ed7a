"""The scripted engine against the real one: the same calls write, count and stop the same."""

import acting
import pytest
import scripted
import slow_decoder

from searchr1_jax.core import types
from searchr1_jax.rollout import programs, sampling
from searchr1_jax.text import stop_table

TURNS = 4
PROMPTS = {0: 1, 1: 5, 2: 50, 3: 13, 5: 20, 6: 30, 7: 7}  # slot -> tokens; slot 4 stays empty


def episode(slot):
    return types.QAExample(id=f"slot {slot}", question="", golden_answers=())


def calls_of(engine):
    """Everything that happened, call by call: of each slot its tokens and its status."""
    slots = acting.Acting(engine)
    for slot, length in PROMPTS.items():
        slots.begin(acting.text(slot, length), {slot: scripted.identity(episode(slot).id, 0)})
    calls, turns = [], []
    for turn in range(TURNS):
        before = {slot: len(sequence.tokens) for slot, sequence in slots.held.items()}
        while any(s.status == programs.RUNNING for s in slots.held.values()):
            slots.decode(sampling.Decoding(), leave_at=2)
            calls.append({slot: (list(s.tokens), s.status) for slot, s in slots.held.items()})
        turns.append({slot: (s.tokens[before[slot] :], s.status) for slot, s in slots.held.items()})
        for slot, sequence in list(slots.held.items()):
            if sequence.status == programs.CONTEXT_FULL or len(sequence.tokens) > acting.SHAPES.context - 4:
                del slots.held[slot]
        slots.append({slot: acting.text(100 + turn, 3) for slot in slots.held})
    return calls, turns


@pytest.fixture
def acted(laptop):
    engine = acting.make_engine()
    engine.load(slow_decoder.on_mesh(acting.CONFIG, slow_decoder.random_params(acting.CONFIG, 2)))
    return calls_of(engine)


def test_the_scripted_engine_does_what_the_real_one_did(acted):
    calls, turns = acted
    scripts = {
        episode(slot): [[
            written + [acting.EOS] * (status == programs.EOS)
            for written, status in (turn[slot] for turn in turns if slot in turn)
        ] + [[acting.A]]]
        for slot in PROMPTS
    }  # fmt: skip
    engine = scripted.Engine(
        acting.SHAPES,
        stop_table.build(acting.PIECES, acting.STOP_TAGS),
        eos_ids={acting.EOS},
        max_turn_tokens=acting.MAX_TURN_TOKENS,
        scripts=scripts,
        shards=1,
    )
    again, _ = calls_of(engine)
    assert again == calls
    stops = {status for turn in turns for _, status in turn.values()}
    assert stops == {programs.TAG, programs.EOS, programs.TURN_FULL, programs.CONTEXT_FULL}
