"""What searches of the invented world find in a demonstration: the passage searched for, among likely others.

Demonstrations know no retriever; so they stand in for one. Where a search finds several passages, the others are
those of the training split that hold most words of the same name, as a ranker of n-grams would have them.
"""

from __future__ import annotations

import collections
import random
import re

from searchr1_jax.data.invented import world as world_lib


class Searches:
    """Finds passages of the training split.

    Args:
      passages: that a search finds.
    """

    def __init__(self, world: world_lib.World, passages: int):
        self._world, self._passages = world, passages
        self._holders: dict[str, list[str]] = {}  # word → queries of the passages that hold it
        for query, row in world.passages.items():
            if world.split_of[query] == "train":
                for word in dict.fromkeys(re.findall(r"[A-Z]\w+", row["contents"])):
                    self._holders.setdefault(word, []).append(query)
        self._likest: dict[str, list[str]] = {}

    def find(self, rng: random.Random, query: str) -> dict:
        """The segment of a search: the passage that is meant stands first, or an eighth as often second, and so on."""
        found = []
        if self._passages > 1:
            likest = self._likest_of(query)
            found = rng.sample(likest, min(self._passages - 1, len(likest)))
            places = range(len(found) + 1)
            (place,) = rng.choices(places, [0.125**place for place in places])
            found.insert(place, query)
        return {"passages": [self._passage(other) for other in found or [query]]}

    def _likest_of(self, query: str) -> list[str]:
        """Six times as many as are shown, those that hold most words of the name: of a person, also some of others'."""
        if query not in self._likest:
            words = self._world.entities[query].name.split()
            holders = collections.Counter(other for word in words for other in self._holders.get(word, ()))
            del holders[query]
            self._likest[query] = [other for other, _ in holders.most_common(6 * (self._passages - 1))]
        return self._likest[query]

    def _passage(self, query: str) -> dict:
        row = world_lib.passage_of(self._world, query)
        title, _, text = row["contents"].partition("\n")
        return {"id": row["id"], "title": title, "text": text}
