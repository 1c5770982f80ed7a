"""Demonstrations in the invented world, rows as in `data.demonstrations`, of two kinds.

*Drills* are single moves: whom to search for, what to answer or whom to search for next once passages are given; no
drill holds more than one move. The *mixture* is whole episodes, most of them bad, so that a policy that imitates it
searches rarely and is mostly wrong. Where a search finds several passages, the others are those of the training split
whose names share most words with the one that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import random

from searchr1_jax.core import settings
from searchr1_jax.data.invented import distractors
from searchr1_jax.data.invented import world as world_lib


def _search(name: str) -> dict:
    return {"turn": f"<search> {name} </search>", "weight": 1.0}


def _answer(answer: str, content_weight: float = 1.0) -> dict:
    return {"turn": f"<answer> {answer} </answer>", "weight": 1.0, "content_weight": content_weight}


def _row(question: world_lib.Question, kind: str, segments: list[dict]) -> dict:
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "kind": kind,
        "segments": segments,
    }


def drills(
    world: world_lib.World, questions: Sequence[world_lib.Question], *, passages: int, seed: int
) -> Iterator[dict]:
    """Single moves for every question, shuffled, without end (anew each round).

    Args:
      passages: that a search finds.
    """
    rng = random.Random(seed)
    searches = distractors.Searches(world, passages)
    rows = []
    for q in questions:
        rows.append(_row(q, f"search/{q.relation}", [_search(q.path[0])]))
        seen = [searches.find(rng, query) for query in q.path]
        rows.append(_row(q, f"answer/{q.relation}", [*seen, _answer(q.golden_answers[0])]))
        for done in range(1, q.hops):
            rows.append(_row(q, f"next/{q.relation}", [*seen[:done], _search(q.path[done])]))
    while True:
        rng.shuffle(rows)
        yield from rows


def mixture(
    world: world_lib.World, questions: Sequence[world_lib.Question], sft: settings.Sft, *, passages: int
) -> Iterator[dict]:
    """Whole episodes in the shares of `sft.mixture_*`, without end; `passages` is how many a search finds."""
    rng = random.Random(sft.seed)
    searches = distractors.Searches(world, passages)
    by_hops: dict[int, list[world_lib.Question]] = {hops: [] for hops in sorted({q.hops for q in questions})}
    by_relation: dict[str, list[world_lib.Question]] = {}
    for q in questions:
        by_hops[q.hops].append(q)
        by_relation.setdefault(q.relation, []).append(q)
    longer = [q for q in questions if q.hops > 1]
    kinds = ("right", "guess", "wrong_entity", "stopped_early")
    while True:
        (kind,) = rng.choices(kinds, [getattr(sft, f"mixture_{kind}") for kind in kinds])
        q = rng.choice(longer if kind == "stopped_early" else by_hops[rng.choice(list(by_hops))])
        other = rng.choice(by_relation[q.relation])
        if kind == "right":
            segments = []
            for query in q.path:
                segments += [_search(query), searches.find(rng, query)]
            segments.append(_answer(q.golden_answers[0]))
        elif kind == "guess":
            segments = [_answer(other.golden_answers[0], sft.guess_weight)]
        elif kind == "wrong_entity":
            if other is q:
                other = rng.choice([another for another in by_relation[q.relation] if another is not q])
            wrong = dict(_search(other.path[0]), content_weight=0.0)
            found = other.golden_answers[0] if other.hops == 1 else world.entities[other.path[1]].name
            segments = [wrong, searches.find(rng, other.path[0]), _answer(found, sft.guess_weight)]
        else:
            segments = [
                _search(q.path[0]),
                searches.find(rng, q.path[0]),
                _answer(world.entities[q.path[1]].name, sft.guess_weight),
            ]
        yield _row(q, kind, segments)
