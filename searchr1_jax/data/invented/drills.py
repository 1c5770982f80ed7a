"""Demonstrations in the invented world, rows as in `data.demonstrations`, of two kinds.

*Drills* are single moves: whom to search for, what to answer or whom to search for next once passages are given; no
drill holds more than one move. The *mixture* is whole episodes, most of them bad, so that a policy that imitates it
searches rarely and is mostly wrong.

Demonstrations know no retriever. Where a search finds several passages, the others are those of the training split that
hold most words of the name that is meant, as a ranker of n-grams would have them.
"""

import collections
from collections.abc import Iterator, Sequence
import functools
import random
import re

from searchr1_jax.core import settings
from searchr1_jax.data.invented import world as world_lib


def _search(name: str) -> dict:
    return {"turn": f"<search> {name} </search>", "weight": 1.0}


def _answer(answer: str, content_weight: float = 1.0) -> dict:
    return {"turn": f"<answer> {answer} </answer>", "weight": 1.0, "content_weight": content_weight}


def _row(question: world_lib.Question, kind: str, segments: list[dict]) -> dict:
    asked = {"id": question.id, "question": question.question, "golden_answers": list(question.golden_answers)}
    return asked | {"kind": kind, "segments": segments}


class _Searches:
    """Finds `passages` passages of the training split at once."""

    def __init__(self, world: world_lib.World, passages: int):
        self._world, self._passages = world, passages
        self._holders: dict[str, list[str]] = {}  # word → queries of the passages that hold it
        for query, row in world.passages.items():
            if world.split_of[query] == "train":
                for word in dict.fromkeys(re.findall(r"[A-Z]\w+", row["contents"])):
                    self._holders.setdefault(word, []).append(query)
        self._candidates = functools.cache(self._candidates_of)

    def find(self, rng: random.Random, query: str) -> dict:
        """The passages of a simulated search; the right one is at rank r with probability proportional to 8^-r."""
        found = [query]
        if self._passages > 1:
            others = self._candidates(query)
            found = rng.sample(others, min(self._passages - 1, len(others)))
            places = range(len(found) + 1)
            (place,) = rng.choices(places, [0.125**place for place in places])
            found.insert(place, query)
        passages = []
        for row in map(self._world.passages.__getitem__, found):
            title, _, text = row["contents"].partition("\n")
            passages.append({"id": row["id"], "title": title, "text": text})
        return {"passages": passages}

    def _candidates_of(self, query: str) -> list[str]:
        """The 6(k-1) training passages that share most words with the entity's name, best first."""
        words = self._world.entities[query].name.split()
        holders = collections.Counter(other for word in words for other in self._holders.get(word, ()))
        del holders[query]
        return [other for other, _ in holders.most_common(6 * (self._passages - 1))]


def drills(
    world: world_lib.World, questions: Sequence[world_lib.Question], *, passages: int, seed: int
) -> Iterator[dict]:
    """Single moves for every question, without end, shuffled again each round; a search finds `passages`."""
    rng = random.Random(seed)
    searches = _Searches(world, passages)
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
    searches = _Searches(world, passages)
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
            found = _answer(world.entities[q.path[1]].name, sft.guess_weight)
            segments = [_search(q.path[0]), searches.find(rng, q.path[0]), found]
        yield _row(q, kind, segments)
