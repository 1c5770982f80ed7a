"""The token at which a stop tag is complete, found by one table look-up a token.

    token bytes, tags ─ build ─▶ StopTable ─▶ the decode program: state = table[state, token]

A byte automaton (Aho and Corasick, 1975) over the tags remembers how much of a tag the bytes so far end
with. A token is a string of bytes, so running the automaton over it from each state gives one row of the
table: a tag is found however the tokenizer cuts it, wherever in a token it ends. For the one tag `</s>`:

    state   0 start    1 "<"    2 "</"    3 "</s"    4 stop

              token:   "<"   "</"   "s"   "/s>"   "></"   ">\\n"   "</</s>x"
    from 0 start        1     2      0      0       2       0         4
    from 1 "<"          1     2      0     (4)      2       0         4        (4): "<" + "/s>"
    from 2 "</"         1     2      3      0       2       0         4
    from 3 "</s"        1     2      0      0      (4)     (4)        4        tag inside the token
    from 4 stop         4     4      4      4       4       4         4        absorbing
"""

from collections.abc import Sequence
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopTable:
    """The automaton over tokens. Each turn starts afresh at `start`; `stop` once a tag has been completed."""

    table: np.ndarray  # int8[states, V], the state after a token; int16 above 127 states
    start: int  # nothing of a tag matched yet
    stop: int  # a tag is complete; absorbing


def build(token_bytes: Sequence[bytes], tags: Sequence[str]) -> StopTable:
    """The table whose state becomes `stop` at exactly the token that completes the first of `tags`.

    `token_bytes` are those of each token, index = id; b"" leaves every state as it is (ids of a padded embedding that
    no token owns). ValueError for no tag or an empty one.
    """
    if not tags or "" in tags:
        raise ValueError(f"tags {tuple(tags)!r} must hold at least one text and no empty one")
    step = _byte_automaton([tag.encode() for tag in tags])  # int16[states, 256]
    states = len(step)

    lengths = np.array([len(piece) for piece in token_bytes], np.int64)
    starts = np.cumsum(lengths) - lengths
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    order = np.argsort(-lengths, kind="stable")  # longest first, so tokens with a byte k lead
    state = np.repeat(np.arange(states, dtype=np.int16)[:, None], len(lengths), axis=1)  # in that order
    for k in range(lengths.max(initial=0)):
        longer = np.count_nonzero(lengths > k)
        byte = text[starts[order[:longer]] + k]
        state[:, :longer] = step[state[:, :longer], byte]

    table = np.empty((states, len(lengths)), np.int8 if states <= 127 else np.int16)
    table[:, order] = state
    return StopTable(table=table, start=0, stop=states - 1)


def _byte_automaton(tags: list[bytes]) -> np.ndarray:
    """int16[states, 256], the state after a byte: 0 is the start, the last is absorbing, a tag was seen."""
    prefixes = {tag[:n] for tag in tags for n in range(len(tag))}
    unfinished = sorted(prefix for prefix in prefixes if not any(tag in prefix for tag in tags))
    number = {prefix: state for state, prefix in enumerate(unfinished)}  # b"" comes first
    stop = len(number)
    step = np.zeros((stop + 1, 256), np.int16)
    step[stop] = stop
    for prefix, state in number.items():
        for byte in set(b"".join(tags)):
            seen = prefix + bytes([byte])
            suffixes = (seen[n:] for n in range(len(seen) + 1))  # the longest first
            complete = any(seen.endswith(tag) for tag in tags)
            step[state, byte] = stop if complete else next(number[s] for s in suffixes if s in number)
    return step
