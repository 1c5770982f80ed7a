"""The host loop: questions in, trajectories out, many at once over one engine.

    tasks ─▶ admit to free slots ─▶ extend (prompts, replies) ─▶ decode ─▶ read what stopped ─▶ environment
                 ▲                        ▲                                                        │
                 └── finished: yield      └── replies, at once or from worker threads ◀────────────┘

Nothing waits for the slowest: a slot that stops is served while the others decode, and freed slots take the
next question. The loop keeps every token with its mask and log-prob from the moment it is made; tokens that
were sampled are never encoded again. What a trajectory holds does not depend on scheduling (see `engine`).
"""

import collections
from concurrent import futures
import dataclasses
from typing import Iterable, Iterator, Sequence
import zlib

import numpy as np

from searchr1_jax.core import cluster, settings, types
from searchr1_jax.rollout import engine as engine_lib, environment as environment_lib, programs, sampling
from searchr1_jax.text import protocol as text_protocol, tokenizer as tokenizer_lib, transcript


class SamplerError(FloatingPointError):
    """A policy whose log-probs are not finite; says for which question, and in which dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of an episode. The engine holds the limits of a turn and of the context."""

    max_turns: int  # turns whose call of a tool is answered; one more turn follows
    max_information_tokens: int  # of the body of one reply, e.g. of its passages
    tool_threads: int  # that wait for tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A question to be answered `samples` times."""

    example: types.QAExample
    prompt: tuple[int, ...]  # token ids
    samples: int
    first_sample: int = 0  # their numbers go on from here; a question may come twice in a step


def make_tasks(
    examples: Iterable[types.QAExample],
    tokenizer: tokenizer_lib.Tokenizer,
    templates: settings.Protocol,
    *,
    samples: int,
    room: int,
) -> list[Task]:
    """Tokenised prompts; ValueError names a question whose prompt is longer than `room` tokens.

    A question that comes again goes on counting its samples, so that no two are alike.
    """
    tasks: list[Task] = []
    asked = collections.Counter()
    for example in examples:
        prompt = tuple(tokenizer.encode_prompt(text_protocol.render_prompt(templates, example.question), templates))
        if len(prompt) > room:
            raise ValueError(
                f"the prompt of question {example.id!r} has {len(prompt)} tokens, but only {room} leave room for a turn"
                " in the context; shorten the question or raise rollout.context_tokens"
            )
        first = asked[example.id] * samples
        tasks.append(Task(example=example, prompt=prompt, samples=samples, first_sample=first))
        asked[example.id] += 1
    return tasks


@dataclasses.dataclass(eq=False)
class _Episode:
    """The books of one running episode."""

    task: Task
    sample: int
    slot: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    decoding: bool = False
    turn_start: int = 0
    turns: list[types.Turn] = dataclasses.field(default_factory=list)
    memories: dict[str, dict] = dataclasses.field(default_factory=dict)  # what each tool keeps of it
    eos_dropped: int = 0
    passages_cut: int = 0

    def add(self, tokens: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Tokens that the policy wrote, with their log-probs, or that were given to it."""
        self.tokens += tokens
        self.sampled += [logp is not None] * len(tokens)
        self.logp += logp or [0.0] * len(tokens)


@dataclasses.dataclass(kw_only=True)
class Counts:
    """Of a run so far."""

    slot_steps: int = 0  # steps of decode calls x slots
    written: int = 0  # tokens that the policy wrote in them


class Run:
    """The state of one `Rollout.run`."""

    def __init__(self, engine, environment, tokenizer, limits, decoding, seed_and_step):
        self.engine, self.environment, self.tokenizer, self.limits = engine, environment, tokenizer, limits
        self.decoding, self.seed_and_step = decoding, seed_and_step
        shapes = engine.shapes
        self.context, self.leave_at = shapes.context, max(1, shapes.slots // 8)
        self.free = [collections.deque() for _ in range(engine.shards)]
        for slot in range(shapes.slots):
            self.free[engine.shard_of(slot)].append(slot)
        self.active: dict[int, _Episode] = {}  # by slot
        self.appends: list[collections.deque[engine_lib.Row]] = []  # chunks of one append, in their order
        self.calls: list[tuple[_Episode, environment_lib.Call]] = []  # not handed to a thread yet
        self.fetching: dict[futures.Future, list[_Episode]] = {}  # who waits for its replies
        self.finished: list[types.Trajectory] = []
        self.counts = Counts()

    def episodes(self, tasks: list[Task], pool: futures.Executor) -> Iterator[types.Trajectory]:
        waiting = collections.deque((task, 0) for task in tasks)  # a task and the first sample to admit
        in_flight: collections.deque = collections.deque()
        while waiting or self.active:
            cluster.advance()
            cluster.leave_if_urgent()
            self.admit(waiting)
            self.extend()
            decoding = [(e, len(e.turns)) for e in self.active.values() if e.decoding]
            if decoding:
                in_flight.append((self.engine.decode(self.decoding, leave_at=self.leave_at), decoding))
            # One call stays in flight while the one before it is read, so that the device does not wait for us.
            while len(in_flight) > (1 if decoding else 0):
                output, snapshot = in_flight.popleft()
                self.read(self.engine.read(output), snapshot)
            for callers, calls in self.calls_by_tool():
                self.fetching[pool.submit(self.environment.fetch, calls)] = callers
            idle = not self.finished and not self.appends and not in_flight
            yield from self.finished  # before a failed tool can end the run
            self.finished.clear()
            if self.fetching:
                self.collect(wait=idle and not any(e.decoding for e in self.active.values()))
        yield from self.finished

    def admit(self, waiting: collections.deque) -> None:
        """Puts episodes into free slots; the samples of a question share the row that appends their prompt."""
        for free in self.free:
            while waiting and free:
                task, first = waiting.popleft()
                count = min(task.samples - first, len(free), self.engine.shapes.group)
                slots = [free.popleft() for _ in range(count)]
                if first + count < task.samples:
                    waiting.appendleft((task, first + count))
                identities = []
                for sample, slot in enumerate(slots, start=task.first_sample + first):
                    self.active[slot] = _Episode(task, sample, slot)
                    self.active[slot].add(task.prompt)
                    identities.append((*self.seed_and_step, zlib.crc32(task.example.id.encode()), sample))
                self.append(tuple(slots), list(task.prompt), 0, tuple(identities))

    def append(self, slots, tokens: list[int], start: int, identities=()) -> None:
        """Queues chunks that write `tokens` from `start` on; the last token becomes the pending one."""
        known, pending = tokens[start:-1], tokens[-1]
        chunks, rows = self.engine.shapes.extend_chunks, collections.deque[engine_lib.Row]()
        while not rows or known:
            size = next((c for c in chunks if c >= len(known)), chunks[-1])
            part, known = known[:size], known[size:]
            last = {"pending": pending} if not known else {}
            rows.append(engine_lib.Row(slots=slots, tokens=part, start=start, identities=identities, **last))
            start, identities = start + len(part), ()
        self.appends.append(rows)

    def extend(self) -> None:
        """Dispatches all queued chunks, as many sequences a call as it has rows."""
        chunks = self.engine.shapes.extend_chunks
        while self.appends:
            size = next(c for c in chunks if c >= len(self.appends[0][0].tokens))
            rows, used = [], [0] * self.engine.shards
            for append in self.appends:
                row = append[0]
                shard = self.engine.shard_of(row.slots[0])
                fits = next(c for c in chunks if c >= len(row.tokens)) == size
                if fits and used[shard] < self.engine.rows_per_shard:
                    rows.append(append.popleft())
                    used[shard] += 1
            self.engine.extend(rows, size)
            for row in rows:
                if row.pending is not None:
                    for slot in row.slots:
                        episode = self.active[slot]
                        episode.decoding, episode.turn_start = True, len(episode.tokens)
            self.appends = [append for append in self.appends if append]

    def read(self, decoded: programs.Written, snapshot: list[tuple[_Episode, int]]) -> None:
        """Books what a decode call wrote for the episodes, and their turns, that were decoding when it left."""
        self.counts.slot_steps += int(decoded.steps) * self.engine.shapes.slots
        self.counts.written += int(decoded.count.sum())
        for episode, turn in snapshot:
            if len(episode.turns) != turn:
                continue  # the turn ended in the call before, which had not been read when this one left
            slot = episode.slot
            if decoded.status[slot] == programs.NOT_FINITE:
                raise SamplerError(
                    f"the policy's log-probs for question {episode.task.example.id!r} are not finite at token"
                    f" {len(episode.tokens)}; model.actor_dtype is {np.dtype(self.engine.dtype).name}: choose one of a"
                    " wider range, or look for weights that are not finite"
                )
            count = int(decoded.count[slot])
            episode.add(decoded.tokens[slot, :count].tolist(), decoded.logp[slot, :count].tolist())
            if decoded.status[slot] != programs.RUNNING:
                episode.decoding = False
                self.turn_ended(episode, int(decoded.status[slot]))

    def turn_ended(self, episode: _Episode, status: int) -> None:
        written = episode.tokens[episode.turn_start :]
        text, count = self.tokenizer.decode(written), len(written)
        if status == programs.CONTEXT_FULL:
            episode.turns.append(types.Turn(text=text, event=text_protocol.TRUNCATED, tokens=count))
            self.finish(episode, "length")
            return
        episode.eos_dropped += status == programs.EOS
        outcome = self.environment.act(text, self.limits.max_turns - len(episode.turns))
        episode.turns.append(types.Turn(text=text, event=outcome.event, content=outcome.content, tokens=count))
        if outcome.stop:
            self.finish(episode, outcome.stop)
        elif outcome.reply:
            self.reply(episode, outcome.reply)
        else:
            seed, step = self.seed_and_step
            call = environment_lib.Call(
                tool=outcome.event,
                content=outcome.content,
                example=episode.task.example,
                sample=episode.sample,
                turn=len(episode.turns) - 1,
                seed=seed,
                step=step,
                memory=episode.memories.setdefault(outcome.event, {}),
            )
            self.calls.append((episode, call))

    def calls_by_tool(self) -> Iterator[tuple[list[_Episode], list[environment_lib.Call]]]:
        """Takes the calls that nobody has taken yet, and who made them; those of a tool together."""
        calls, self.calls = self.calls, []
        for tool in dict.fromkeys(call.tool for _, call in calls):
            yield [e for e, call in calls if call.tool == tool], [call for _, call in calls if call.tool == tool]

    def collect(self, *, wait: bool) -> None:
        """Takes in the replies that have come, or waits for the next one."""
        done, _ = futures.wait(self.fetching, timeout=None if wait else 0, return_when=futures.FIRST_COMPLETED)
        for future in done:
            for episode, reply in zip(self.fetching.pop(future), future.result(), strict=True):
                self.reply(episode, reply)

    def reply(self, episode: _Episode, reply: transcript.Reply) -> None:
        """Appends a reply to the episode, or ends it where there is no room for it and a token after it."""
        start = len(episode.tokens) - 1  # the pending token is not in the cache yet
        limit, room = self.limits.max_information_tokens, self.context - 1 - len(episode.tokens)
        fitted = transcript.reply_tokens(reply, self.tokenizer, max_body=limit, room=room)
        if fitted is None:
            self.finish(episode, "length")
            return
        tokens, cut = fitted
        episode.passages_cut += cut
        episode.add(tokens)
        text = self.tokenizer.decode(tokens)
        episode.turns[-1] = dataclasses.replace(episode.turns[-1], passages=reply.passages, reply=text)
        self.append((episode.slot,), episode.tokens, start)

    def finish(self, episode: _Episode, reason: str) -> None:
        del self.active[episode.slot]
        self.free[self.engine.shard_of(episode.slot)].append(episode.slot)
        trajectory = types.Trajectory(
            example=episode.task.example,
            sample=episode.sample,
            tokens=np.array(episode.tokens, np.int32),
            sampled=np.array(episode.sampled, bool),
            behaviour_logp=np.array(episode.logp, np.float32),
            prompt_tokens=len(episode.task.prompt),
            thinking=self.tokenizer.decode(episode.task.prompt[-8:]).rstrip().endswith("<think>"),
            turns=tuple(episode.turns),
            stop_reason=reason,
            answer=episode.turns[-1].content if reason == "answered" else None,
            tools=tuple(self.environment.tools),
            eos_dropped=episode.eos_dropped,
            passages_cut=episode.passages_cut,
        )
        self.finished.append(trajectory)


@dataclasses.dataclass(eq=False)
class Rollout:
    """Runs episodes on an engine; one `run` at a time."""

    schedule = Run  # the order of things
    engine: engine_lib.Engine
    environment: environment_lib.Environment
    tokenizer: tokenizer_lib.Tokenizer
    limits: Limits
    counts: Counts = dataclasses.field(default_factory=Counts)  # of the last run

    def run(
        self, tasks: list[Task], decoding: sampling.Decoding, *, seed: int, step: int
    ) -> Iterator[types.Trajectory]:
        """Yields each trajectory as it finishes, `samples` a task; the order is not to be relied on.

        ToolError when a tool failed for good, SamplerError when the policy did; what was yielded before is whole.
        """
        run = self.schedule(self.engine, self.environment, self.tokenizer, self.limits, decoding, (seed, step))
        self.counts = run.counts
        pool = futures.ThreadPoolExecutor(self.limits.tool_threads, "tool")
        try:
            yield from run.episodes(tasks, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a tool that hangs holds nobody else up
