"""An engine driven by hand: who sits in which slot, what they hold, and one decode call at a time.

    begin / append ─▶ extend calls      decode ─▶ each running slot's new tokens in its `Sequence`

Also the vocabulary of the engine's tests and a policy whose next token is a table's, not a model's, choice.
"""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.rollout import engine as engine_lib, programs, sampling
from searchr1_jax.text import protocol, stop_table

EOS, A, B, C, D, SLASH, SEA, RCH, CLOSE_AND_MORE, ANSWER, SEARCH_CLOSE, INSIDE, ANS, WER, CLOSE = range(15)
WRITTEN = [
    b"<|endoftext|>", b"a", b"b", b"c", b"d", b"</", b"sea", b"rch", b">\n and more", b"</answer>", b"search>",
    b"x</search>y", b"</ans", b"wer", b">",
]  # fmt: skip
CONFIG = slow_decoder.tiny_config(tied_embeddings=False)  # as wide as its vocabulary: see `table_policy`
STOP_TAGS = protocol.stop_tags(("search",))
PIECES = WRITTEN + [b"z%d" % i for i in range(len(WRITTEN), CONFIG.vocab_size)]
SHAPES = programs.Shapes(slots=8, context=64, decode_tokens=4, extend_rows=4, extend_chunks=(4, 12), group=3)
MAX_TURN_TOKENS = 10
GREEDY = sampling.Decoding(temperature=0.0)


def make_engine(shapes: programs.Shapes = SHAPES) -> engine_lib.Engine:
    """On the devices of the mesh in use, with as many shards of heads."""
    hosts = parallel.hosts_mesh(jax.sharding.get_mesh(), tensor=parallel.axis_size("heads"))
    return engine_lib.Engine(
        CONFIG, shapes, stop_table.build(PIECES, STOP_TAGS), hosts=hosts, eos_ids=frozenset({EOS}),
        max_turn_tokens=MAX_TURN_TOKENS, dtype=jnp.float32,
    )  # fmt: skip


def table_policy(logits_VV: np.ndarray):
    """Host weights of a policy whose logits after token i are row i, whatever came before.

    Attention and feed-forward write nothing; the norm makes √D of a one-hot embedding of width D.
    """
    params = jax.tree.map(np.zeros_like, slow_decoder.random_params(CONFIG, 0))
    params["decoder"]["norm"][:] = 1.0
    params["decoder"]["embedding"][:] = np.eye(CONFIG.vocab_size)
    params["head"][:] = logits_VV.T / CONFIG.width**0.5
    return params


def chain(*tokens: int):
    """A policy that, taken greedily, follows each of these tokens by the next."""
    logits = np.zeros((CONFIG.vocab_size, CONFIG.vocab_size))
    logits[tokens[:-1], tokens[1:]] = 30.0
    return table_policy(logits)


def text(seed: int, length: int) -> list[int]:
    """Tokens without meaning."""
    return np.random.default_rng(seed).integers(CONFIG.vocab_size, size=length).tolist()


@dataclasses.dataclass
class Sequence:
    """What a slot holds, in the alignment of all per-token arrays."""

    tokens: list[int]
    logp: list[float]  # NaN where not sampled
    status: int = programs.RUNNING

    @property
    def sampled(self) -> np.ndarray:
        return ~np.isnan(self.logp)

    def add(self, tokens) -> None:
        self.tokens += tokens
        self.logp += [np.nan] * len(tokens)


class Acting:
    """The books of an engine's slots."""

    def __init__(self, engine: engine_lib.Engine):
        engine.reset()
        self.engine = engine
        self.held: dict[int, Sequence] = {}

    def begin(self, prompt: list[int], identities: dict[int, tuple[int, int, int, int]]) -> None:
        """Puts one prompt into slots, by one row: slot -> (seed, step, question, sample)."""
        for slot in identities:
            self.held[slot] = Sequence(list(prompt), [np.nan] * len(prompt))
        self._extend([self._rows(tuple(identities), 0, tuple(identities.values()))])

    def append(self, replies: dict[int, list[int]]) -> None:
        """Writes tokens behind the sequences of some slots, in as few calls as there is room for."""
        queues = []
        for slot, tokens in replies.items():
            start = len(self.held[slot].tokens) - 1  # the pending token's place
            self.held[slot].add(tokens)
            queues.append(self._rows((slot,), start))
        self._extend(queues)

    def decode(self, decoding: sampling.Decoding, *, leave_at: int = SHAPES.slots) -> None:
        """One call."""
        decoded = self.engine.read(self.engine.decode(decoding, leave_at=leave_at))
        for slot, sequence in self.held.items():
            count = decoded.count[slot]
            assert count == 0 or sequence.status == programs.RUNNING
            sequence.tokens += decoded.tokens[slot, :count].tolist()
            sequence.logp += decoded.logp[slot, :count].tolist()
            sequence.status = int(decoded.status[slot])

    def turn(self, decoding: sampling.Decoding) -> None:
        """Calls until nobody is running."""
        while any(s.status == programs.RUNNING for s in self.held.values()):
            self.decode(decoding)

    def _rows(self, slots, start, identities=()) -> list[tuple[int, engine_lib.Row]]:
        """(chunk size, row) of the calls that write a sequence from `start` on; its last token is pending."""
        *known, pending = self.held[slots[0]].tokens[start:]
        rows = []
        while not rows or known:
            chunk = next((c for c in SHAPES.extend_chunks if c >= len(known)), SHAPES.extend_chunks[-1])
            part, known = known[:chunk], known[chunk:]
            row = engine_lib.Row(slots=slots, tokens=part, start=start, identities=identities)
            rows.append((chunk, row if known else dataclasses.replace(row, pending=pending)))
            start, identities = start + len(part), ()
        for slot in slots:
            self.held[slot].status = programs.RUNNING
        return rows

    def _extend(self, queues) -> None:
        while queues:
            size, call, used = queues[0][0][0], [], collections.Counter()
            for queue in queues:
                chunk, row = queue[0]
                shard = self.engine.shard_of(row.slots[0])
                if chunk == size and used[shard] < self.engine.rows_per_shard:
                    used[shard] += 1
                    call.append(row)
                    queue.pop(0)
            self.engine.extend(call, size)
            queues = [queue for queue in queues if queue]
