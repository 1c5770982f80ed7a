import random

import numpy as np
import pytest

from searchr1_jax.text import protocol
from searchr1_jax.text import stop_table

# Pieces of tags, several cuts of one tag, text before and beyond it, overlaps, half characters, no bytes.
NASTY = [
    b"<", b"/", b">", b"</", b"</s", b"</a", b"s", b"e", b"a", b"r", b"c", b"h", b"n", b"w", b"se", b"ear",
    b"arch", b"rch>", b"search", b"answer", b"ans", b"wer", b"wer>", b"nswer>", b">\n", b">\n\n<", b"></",
    b"></s", b"search>", b"</search", b"</answer", b"</search>", b"</answer>", b"</search>\n",
    b"x</answer> y", b"</</search>", b"</</se", b"</ans</search>", b"</searc", b"</sea</", b"<search>",
    b"<answer>", b"</Search>", b"< /search>", b" ", b"\n", "é".encode(), "é".encode()[:1], "é".encode()[1:],
    "東".encode()[:2], "😀".encode(), b"\x00", b"\xff", b"",
]  # fmt: skip


def first_stop_by_search(sequence, tags):
    """Index of the token after which the joined bytes first hold a tag, None if they never do."""
    text = b""
    for t, piece in enumerate(sequence):
        text += piece
        if any(tag.encode() in text for tag in tags):
            return t
    return None


def first_stop_by_table(ids, stops):
    state = stops.start
    for t, i in enumerate(ids):
        state = stops.table[state, i]
        if state == stops.stop:
            return t
    return None


@pytest.mark.parametrize(
    "tags, sequences",
    [(protocol.STOP_TAGS, 30_000), (("</s", "s>", "</s>\n", "<</"), 5_000), (("aa",), 2_000)],
)
def test_table_stops_where_searching_the_bytes_does(tags, sequences):
    vocabulary = NASTY + [b"aa", b"ba", b"s>", b"<</"]
    stops = stop_table.build(vocabulary, tags)
    rng = random.Random(0)
    close = [i for i, piece in enumerate(vocabulary) if piece and piece.strip(b"</searchnw>") == b""]
    found = 0
    for _ in range(sequences):
        pool = close if rng.random() < 0.7 else range(len(vocabulary))
        ids = rng.choices(pool, k=rng.randint(1, 12))
        expected = first_stop_by_search([vocabulary[i] for i in ids], tags)
        assert first_stop_by_table(ids, stops) == expected, [vocabulary[i] for i in ids]
        found += expected is not None
    assert 0.1 * sequences < found < 0.99 * sequences  # both outcomes are common


def test_every_cut_of_a_tag_is_found_at_its_last_piece():
    tag = b"</search>"
    for cuts in range(1 << (len(tag) - 1)):  # bit k: a cut after byte k
        ends = [k + 1 for k in range(len(tag) - 1) if cuts >> k & 1] + [len(tag)]
        pieces = [tag[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        stops = stop_table.build(pieces)
        assert first_stop_by_table(range(len(pieces)), stops) == len(pieces) - 1


def test_a_tag_may_end_inside_a_token():
    stops = stop_table.build([b"</answer", b">\n<", b"x</search> and on"])
    assert first_stop_by_table([0, 1], stops) == 1
    assert first_stop_by_table([0, 2], stops) == 1


def test_the_drawn_example():
    stops = stop_table.build([b"<", b"</", b"s", b"/s>", b"></", b">\n", b"</</s>x"], ["</s>"])
    assert stops.start == 0 and stops.stop == 4
    np.testing.assert_array_equal(
        stops.table,
        [
            [1, 2, 0, 0, 2, 0, 4],
            [1, 2, 0, 4, 2, 0, 4],
            [1, 2, 3, 0, 2, 0, 4],
            [1, 2, 0, 0, 4, 4, 4],
            [4, 4, 4, 4, 4, 4, 4],
        ],
    )


def test_stop_is_the_last_state_and_absorbs():
    stops = stop_table.build(NASTY)
    assert stops.stop == len(stops.table) - 1 == 15  # "", "<", "</", 6 + 6 longer beginnings, and the stop
    assert (stops.table[stops.stop] == stops.stop).all()


def test_a_token_without_bytes_changes_nothing():
    stops = stop_table.build([b"", b"<"])
    np.testing.assert_array_equal(stops.table[:, 0], np.arange(len(stops.table)))


def test_states_above_127_take_two_bytes():
    assert stop_table.build(NASTY).table.dtype == np.int8
    assert stop_table.build(NASTY, ["x" * 126]).table.dtype == np.int8  # 126 beginnings and the stop
    long = stop_table.build([b"x", b"y"], ["x" * 200])
    assert long.table.dtype == np.int16
    assert first_stop_by_table([0] * 199 + [1] + [0] * 200, long) == 399


@pytest.mark.parametrize("tags", [(), ("</search>", "")])
def test_tags_without_text_are_refused(tags):
    with pytest.raises(ValueError, match="no empty one"):
        stop_table.build(NASTY, tags)
