"""The stop table against searching the joined bytes: over pieces made to be nasty, and over a real vocabulary."""

import random

import numpy as np
import pytest

from searchr1_jax.core import settings
from searchr1_jax.data.invented import world
from searchr1_jax.text import protocol, stop_table, tokenizer

STOP_TAGS = protocol.stop_tags(("search",))

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
    "tags, sequences", [(STOP_TAGS, 30_000), (("</s", "s>", "</s>\n", "<</"), 5_000), (("aa",), 2_000)]
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
        stops = stop_table.build(pieces, STOP_TAGS)
        assert first_stop_by_table(range(len(pieces)), stops) == len(pieces) - 1


def test_a_tag_may_end_inside_a_token():
    stops = stop_table.build([b"</answer", b">\n<", b"x</search> and on"], STOP_TAGS)
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
    stops = stop_table.build(NASTY, STOP_TAGS)
    assert stops.stop == len(stops.table) - 1 == 15  # "", "<", "</", 6 + 6 longer beginnings, and the stop
    assert (stops.table[stops.stop] == stops.stop).all()


def test_a_token_without_bytes_changes_nothing():
    stops = stop_table.build([b"", b"<"], STOP_TAGS)
    np.testing.assert_array_equal(stops.table[:, 0], np.arange(len(stops.table)))


def test_states_above_127_take_two_bytes():
    assert stop_table.build(NASTY, STOP_TAGS).table.dtype == np.int8
    assert stop_table.build(NASTY, ["x" * 126]).table.dtype == np.int8  # 126 beginnings and the stop
    long = stop_table.build([b"x", b"y"], ["x" * 200])
    assert long.table.dtype == np.int16
    assert first_stop_by_table([0] * 199 + [1] + [0] * 200, long) == 399


@pytest.mark.parametrize("tags", [(), ("</search>", "")])
def test_tags_without_text_are_refused(tags):
    with pytest.raises(ValueError, match="no empty one"):
        stop_table.build(NASTY, tags)


# Over a byte-level BPE that learned its merges from prompts and episodes.

PARTS = sorted({tag[a:b] for tag in STOP_TAGS for a in range(len(tag)) for b in range(a + 1, len(tag))})
NEAR_TAGS = [
    "</sea</search>", "</</answer>", "</search</answer>", "</answer</answe", "<</search>", "</search></answer>",
    "</searching>", "</answers>", "</Search>", "< /search>", "</search >", "</ answer>", "<search>", "<answer>",
]  # fmt: skip
TAGS = [*STOP_TAGS, *protocol.tags(("search",))]
SEQUENCES = 17_000  # of each of three kinds, no two alike


@pytest.fixture(scope="module")
def texts():
    """What policies of the invented world read and write."""
    places, prompts = world.make_world(settings.World(persons=300, companies=200)), settings.Protocol()
    texts = ["東京 – “Ærø”, 1923: naïve café 😀\n"]
    for q in world.questions(places, "train"):
        name, answer = q.path[0], q.golden_answers[0]
        found = places.passages[name]["contents"]
        texts += [
            protocol.render_prompt(prompts, q.question),
            f"<think>I need to find {name}.</think>\n<search> {name} </search>\n\n<information>{found}</information>",
            f"<think>It is {answer}</think><answer>{answer}</answer>\n",
        ]
    return texts


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    return tokenizer.train(texts, vocab_size=2000, added_tokens=(), directory=tmp_path_factory.mktemp("bpe"))


class Writer:
    """Ids of a vocabulary whose bytes are a text, or nearly one."""

    def __init__(self, bpe, rng):
        self._bpe, self._rng, pieces = bpe, rng, bpe.token_bytes()
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._longest = max(len(tag) for tag in TAGS)
        self._close = [i for i, piece in enumerate(pieces) if self._touches_a_tag(piece)]

    @staticmethod
    def _touches_a_tag(piece):
        """Lies in a stop tag, holds it, ends with its beginning, or begins with its end."""
        tags = [tag.encode() for tag in STOP_TAGS]
        ends = [(tag[:n], tag[-n:]) for tag in tags for n in range(1, len(tag) + 1)]
        return any(piece in tag or tag in piece for tag in tags) or any(
            piece.endswith(first) or piece.startswith(last) for first, last in ends
        )

    def canonical(self, text):
        return self._bpe.encode(text)

    def cut_at_random(self, text):
        text, ids, start = text.encode(), [], 0
        while start < len(text):
            ends = range(start + 1, min(start + self._longest, len(text)) + 1)
            end = self._rng.choice([end for end in ends if text[start:end] in self._ids])
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    def adversarial(self, _):
        """Pieces that touch tags, or tags of which most are spelt with one piece wrong."""
        rng = self._rng
        if rng.random() < 0.3:
            return rng.choices(self._close, k=rng.randint(1, 16))
        ids = []
        for _ in range(rng.randint(1, 3)):
            spelt = self.cut_at_random(rng.choice(STOP_TAGS))
            if rng.random() < 0.9:
                at = rng.randrange(len(spelt))
                spelt[at : at + 1] = rng.choice([[], [spelt[at]] * 2, [rng.choice(self._close)]])
            ids += spelt
        return ids


def first_stops_by_table(sequences, stops, nothing):
    """int[N], -1 where a sequence does not stop; `nothing` is a token without bytes, for the ends of short ones."""
    ids = np.full((len(sequences), max(map(len, sequences))), nothing)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    state, first = np.full(len(ids), stops.start), np.full(len(ids), -1)
    for t, column in enumerate(ids.T):
        state = stops.table[state, column]
        first = np.where((first < 0) & (state == stops.stop), t, first)
    return first


@pytest.mark.parametrize("kind", ["canonical", "cut_at_random", "adversarial"])
def test_over_a_real_vocabulary_it_stops_where_searching_the_bytes_does(bpe, texts, kind):
    vocabulary = [*bpe.token_bytes(), b""]
    assert {b"</", b"search", b">\n", b"><", b" </", b".</"} <= set(vocabulary)
    rng = random.Random(0)
    writer = Writer(bpe, rng)

    def fragment():
        start, text = rng.randrange(30), rng.choice(texts)
        return rng.choice([text[start : start + rng.randrange(12)], rng.choice(PARTS), rng.choice(NEAR_TAGS)])

    drawn = set()
    while len(drawn) < SEQUENCES:
        fragments = [fragment() for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.4:
            fragments.insert(rng.randrange(len(fragments) + 1), rng.choice(TAGS))
        drawn.add(tuple(getattr(writer, kind)("".join(fragments))))
    sequences = sorted(drawn)
    searched = (first_stop_by_search([vocabulary[i] for i in ids], STOP_TAGS) for ids in sequences)
    expected = np.array([-1 if stop is None else stop for stop in searched])
    got = first_stops_by_table(sequences, stop_table.build(vocabulary, STOP_TAGS), len(vocabulary) - 1)
    wrong = np.flatnonzero(got != expected)
    assert not len(wrong), [vocabulary[i] for i in sequences[wrong[0]]]
    assert 0.2 < (expected >= 0).mean() < 0.8  # both outcomes are common
