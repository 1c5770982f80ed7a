"""A scripted engine and a retriever of known passages, to run the host loop without a model.

    scripts {question: [sample's turns]} ─▶ Engine ⇄ episodes.Rollout ⇄ Library      play() puts them together

A turn is the token ids that a policy would write, an end of sequence perhaps the last of them. The engine stops
where the real one does, and asserts what the real one relies on: that rows fit, that they go on where the cache
ends, that no running slot is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import random
import threading
import time
import zlib

import numpy as np

from searchr1_jax.core import settings, types
from searchr1_jax.rollout import engine as engine_lib, environment, episodes, programs, sampling
from searchr1_jax.rollout.tools import search
from searchr1_jax.text import protocol as protocol_lib, stop_table, tokenizer as tokenizer_lib

EOS_MARK = "<eos>"  # ends the text of a turn that the policy ends itself
SEED_AND_STEP = (3, 7)

Script = list[list[int]]  # the turns of one episode
Scripts = Mapping[types.QAExample, list[Script]]  # one for each sample of a question


def logp(position: int) -> float:
    """The log-prob of every token at that position of a sequence; exact in float32, never 0."""
    return -(1 + position) / 1024


@dataclasses.dataclass
class _Slot:
    status: int = programs.IDLE
    cache: list[int] = dataclasses.field(default_factory=list)
    pending: int | None = None  # the token after them; None between the chunks of one append
    turns: Iterator[list[int]] = iter(())
    left: list[int] = dataclasses.field(default_factory=list)  # of the turn's script, the next token last
    automaton: int = 0
    turn_tokens: int = 0
    # (chunk, tokens in it) of each append
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Engine:
    """Has the interface of `engine.Engine` that the loop uses, and writes scripts instead of sampling."""

    def __init__(self, shapes, stops, *, eos_ids, max_turn_tokens, scripts: Scripts, shards: int):
        self.shapes, self.shards = shapes, shards
        self.rows_per_shard = shapes.extend_rows // shards
        self._slots_per_shard = shapes.slots // shards
        self._stops, self._eos_ids, self._max_turn_tokens = stops, eos_ids, max_turn_tokens
        self._scripts = {
            identity(example.id, sample): turns
            for example, samples in scripts.items()
            for sample, turns in enumerate(samples)
        }
        self.reset()

    def reset(self) -> None:
        self._slots = [_Slot() for _ in range(self.shapes.slots)]
        self._outputs: dict[int, programs.Written] = {}
        self._calls = 0
        self.most_in_flight = 0
        self.episodes: dict[tuple[int, ...], _Slot] = {}  # by identity, the slot as the episode left it

    def shard_of(self, slot: int) -> int:
        return slot // self._slots_per_shard

    def extend(self, rows: list[engine_lib.Row], chunk: int) -> None:
        assert rows and chunk in self.shapes.extend_chunks
        slots = [slot for row in rows for slot in row.slots]
        assert len(set(slots)) == len(slots), "a slot is written twice in one call"
        shards = [self.shard_of(row.slots[0]) for row in rows]
        assert max(map(shards.count, shards)) <= self.rows_per_shard, "too many rows for a shard"
        for row, shard in zip(rows, shards, strict=True):
            assert len(row.tokens) <= chunk, "a row exceeds its chunk"
            assert len(row.slots) <= self.shapes.group
            assert {self.shard_of(slot) for slot in row.slots} == {shard}
            for i, slot in enumerate(row.slots):
                self._append(slot, row, chunk, row.identities[i] if row.identities else None)

    def _append(self, number: int, row: engine_lib.Row, chunk: int, begins: tuple[int, ...] | None) -> None:
        slot = self._slots[number]
        assert slot.status != programs.RUNNING, "a running slot is written to"
        if begins is not None:
            assert begins in self._scripts and begins not in self.episodes, "an episode runs twice"
            slot = self._slots[number] = _Slot(turns=iter(self._scripts[begins]))
            self.episodes[begins] = slot
        assert row.start == len(slot.cache), "a row starts elsewhere than where the cache ends"
        first = [*row.tokens, row.pending][0]
        assert slot.pending in (None, first), "the pending token is lost"
        slot.cuts.append((chunk, len(row.tokens)))
        slot.cache += row.tokens
        slot.pending, slot.status = row.pending, programs.IDLE
        if row.pending is not None:
            assert len(slot.cache) + 1 < self.shapes.context, "there is no room for a token"
            slot.left = next(slot.turns)[::-1]
            slot.status, slot.automaton, slot.turn_tokens = programs.RUNNING, self._stops.start, 0

    def decode(self, decoding: sampling.Decoding, *, leave_at: int) -> int:
        s = self.shapes
        # What was not written is no token and no number: nobody may read it.
        tokens, count = np.full((s.slots, s.decode_tokens), -1, np.int32), np.zeros(s.slots, np.int32)
        log_probs = np.full((s.slots, s.decode_tokens), np.nan, np.float32)
        waiting_before = self._waiting()
        steps = 0
        for steps in range(s.decode_tokens + 1):
            if steps == s.decode_tokens or self._waiting() == s.slots or self._waiting() - waiting_before >= leave_at:
                break
            for number, slot in enumerate(self._slots):
                if slot.status == programs.RUNNING:
                    position = len(slot.cache) + 1
                    if self._write(slot):
                        tokens[number, count[number]] = slot.pending
                        log_probs[number, count[number]] = logp(position)
                        count[number] += 1
        self._calls += 1
        status = np.array([slot.status for slot in self._slots], np.int32)
        self._outputs[self._calls] = programs.Written(tokens, log_probs, count, status, np.int32(steps))
        self.most_in_flight = max(self.most_in_flight, len(self._outputs))
        return self._calls

    def read(self, output: int) -> programs.Written:
        return self._outputs.pop(output)

    def _waiting(self) -> int:
        return sum(slot.status != programs.RUNNING for slot in self._slots)

    def _write(self, slot: _Slot) -> bool:
        """Takes the script's next token; False where it ended the sequence and was dropped."""
        assert slot.left, "the script of a turn ends, but the turn does not"
        token = slot.left.pop()
        if token in self._eos_ids:
            slot.status = programs.EOS
            return False
        slot.cache.append(slot.pending)
        slot.pending = token
        slot.automaton = self._stops.table[slot.automaton, token]
        slot.turn_tokens += 1
        if slot.automaton == self._stops.stop:
            slot.status = programs.TAG
        elif len(slot.cache) + 1 >= self.shapes.context:
            slot.status = programs.CONTEXT_FULL
        elif slot.turn_tokens >= self._max_turn_tokens:
            slot.status = programs.TURN_FULL
        return True


class Library:
    """A retriever that knows what to find, remembers what it was asked, and may take its time."""

    def __init__(self, find: Callable[[str], list[types.Passage]], *, longest_delay_s: float = 0.0, seed: int = 0):
        self._find, self._longest_delay_s, self._rng = find, longest_delay_s, random.Random(seed)
        self._lock = threading.Lock()
        self.queries: list[str] = []

    def search(self, queries: list[str], k: int) -> list[list[types.Passage]]:
        with self._lock:
            self.queries += queries
            delay = self._rng.uniform(0, self._longest_delay_s)
        time.sleep(delay)
        return [self._find(query)[:k] for query in queries]


def script(tokenizer: tokenizer_lib.Tokenizer, *turns: str) -> Script:
    """Texts of turns as tokens; `EOS_MARK` at an end is the end of sequence."""
    (eos,) = tokenizer.eos_ids
    return [tokenizer.encode(turn.removesuffix(EOS_MARK)) + [eos] * turn.endswith(EOS_MARK) for turn in turns]


SHAPES = programs.Shapes(slots=2, context=2048, decode_tokens=16, extend_rows=2, extend_chunks=(16, 64), group=2)


def rollout(
    tokenizer: tokenizer_lib.Tokenizer,
    scripts: Scripts,
    retriever,
    *,
    protocol: settings.Protocol,
    max_turns: int = 4,
    max_turn_tokens: int = 500,
    max_information_tokens: int = 500,
    passages: int = 2,
    threads: int = 2,
    timeout_s: float | None = None,
    shards: int = 1,
    times: int = 1,
    tools: Sequence[environment.Tool] = (),
    **shapes,
) -> tuple[Iterator[types.Trajectory], Engine]:
    """A run of all scripts, not started yet, and its engine.

    Args:
      times: that each question is asked, for an equal part of its samples.
      tools: beside the search.
      **shapes: those that differ from SHAPES.
    """
    searching = search.Search(retriever=retriever, passages=passages, timeout_s=timeout_s)
    around = environment.Environment(protocol, [searching, *tools])
    engine = Engine(
        dataclasses.replace(SHAPES, **shapes),
        stop_table.build(tokenizer.token_bytes(), protocol_lib.stop_tags(tuple(around.tools))),
        eos_ids=tokenizer.eos_ids,
        max_turn_tokens=max_turn_tokens,
        scripts=scripts,
        shards=shards,
    )
    tasks = []
    for example, samples in scripts.items():
        asked, room = [example] * times, engine.shapes.context - 1
        tasks += episodes.make_tasks(asked, tokenizer, protocol, samples=len(samples) // times, room=room)
    limits = episodes.Limits(max_turns=max_turns, max_information_tokens=max_information_tokens, tool_threads=threads)
    seed, step = SEED_AND_STEP
    loop = episodes.Rollout(engine, around, tokenizer, limits)
    return loop.run(tasks, sampling.Decoding(), seed=seed, step=step), engine


def play(*args, **settings) -> tuple[dict[tuple[str, int], types.Trajectory], Engine]:
    """Runs all scripts to their ends. Returns the trajectories by key, their books checked."""
    running, engine = rollout(*args, **settings)
    trajectories = list(running)
    by_key = {t.key: t for t in trajectories}
    assert len(by_key) == len(trajectories) == len(engine.episodes)
    for trajectory in trajectories:
        assert_booked(trajectory, engine)
    assert engine.most_in_flight <= 2
    return by_key, engine


def play_one(
    tokenizer: tokenizer_lib.Tokenizer, question: types.QAExample, turns, find, **settings
) -> tuple[types.Trajectory, tuple[str, ...]]:
    """Plays one episode of these turns, texts or token ids. Returns it and the queries that were asked."""
    library = Library(find)
    ids = [turn if isinstance(turn, list) else script(tokenizer, turn)[0] for turn in turns]
    trajectories, _ = play(tokenizer, {question: [ids]}, library, **settings)
    return trajectories[question.id, 0], tuple(library.queries)


def identity(question_id: str, sample: int) -> tuple[int, int, int, int]:
    """What the engine's sampling key is folded from."""
    return *SEED_AND_STEP, zlib.crc32(question_id.encode()), sample


def assert_booked(trajectory: types.Trajectory, engine: Engine) -> None:
    """The trajectory's tokens are its slot's, and mask and log-probs stand at the tokens they speak of."""
    slot = engine.episodes[identity(*trajectory.key)]
    assert trajectory.tokens.tolist() == [*slot.cache, slot.pending]
    expected = [logp(t) if sampled else 0.0 for t, sampled in enumerate(trajectory.sampled)]
    assert trajectory.behaviour_logp.tolist() == expected
    assert not trajectory.sampled[: trajectory.prompt_tokens].any()
    kinds = trajectory.tokens.dtype, trajectory.sampled.dtype, trajectory.behaviour_logp.dtype
    assert kinds == (np.int32, np.bool_, np.float32)


def stretches(trajectory: types.Trajectory, tokenizer: tokenizer_lib.Tokenizer) -> list[tuple[str, str]]:
    """The episode as people read it: who wrote what, in turn."""
    pairs = zip(trajectory.sampled, trajectory.tokens, strict=True)
    return [
        ("policy" if sampled else "world", tokenizer.decode(token for _, token in stretch))
        for sampled, stretch in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def as_tuples(trajectories):
    """Trajectories by key, in a form that `==` compares."""
    arrays = ("tokens", "sampled", "behaviour_logp")
    return {
        key: {f.name: getattr(t, f.name) for f in dataclasses.fields(t)} | {a: getattr(t, a).tolist() for a in arrays}
        for key, t in trajectories.items()
    }
