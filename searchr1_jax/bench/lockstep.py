"""The schedules that ours is compared with: all sequences do a turn together, and all wait for the slowest.

    admit a batch ─▶ append ─▶ decode until everyone has stopped ─▶ one search for all ─▶ append ─▶ … ─▶ next batch

They differ from the loop of `episodes` in nothing but the order of things: same engine, same books.
"""

import collections

from searchr1_jax.rollout import episodes


class Cached(episodes.Run):
    """Turns in lockstep over live caches: only the passages are appended."""

    def episodes(self, tasks, pool):
        waiting = collections.deque((task, 0) for task in tasks)
        while waiting or self.active:
            if not self.active:
                self.admit(waiting)
            self.extend()
            while decoding := [(e, len(e.turns)) for e in self.active.values() if e.decoding]:
                output = self.engine.decode(self.decoding, leave_at=self.engine.shapes.slots)
                self.read(self.engine.read(output), decoding)
            for callers, calls in self.calls_by_tool():
                for episode, reply in zip(callers, self.environment.fetch(calls), strict=True):
                    self.reply(episode, reply)
            yield from self.finished
            self.finished.clear()


class Rerun(Cached):
    """Turns in lockstep that run the whole prefix again, as a call of `generate` for each turn does."""

    def append(self, slots, tokens, start, identities=()):
        super().append(slots, tokens, 0, identities)
