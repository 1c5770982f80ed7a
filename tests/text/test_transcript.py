"""Replies as tokens: what is cut, what stays, and what does not fit."""

import pytest

from searchr1_jax.core import settings, types
from searchr1_jax.text import transcript

PASSAGES = (
    types.Passage(id="7", title='"Emma"', text="A novel. "),
    types.Passage(id="3", title='"Zürich"', text="A city."),
)


def test_an_information_block_is_made_of_prefix_passages_and_suffix():
    assert transcript.information(settings.Protocol(), PASSAGES) == transcript.Reply(
        prefix="\n\n<information>",
        body='Doc 1(Title: "Emma") A novel. \nDoc 2(Title: "Zürich") A city.',
        suffix="</information>\n\n",
        passages=PASSAGES,
    )


def test_a_template_of_the_passages_alone_has_nothing_around_them():
    reply = transcript.information(settings.Protocol(information="{docs}"), "Kelu")
    assert reply == transcript.Reply(prefix="", body="Kelu", suffix="")


def test_a_correction_is_never_cut():
    correction = transcript.correction(settings.Protocol(correction="Again!"))
    assert correction == transcript.Reply(prefix="Again!", body="", suffix="", passages=())


def fit(tokenizer, reply, *, max_body=500, room):
    fitted = transcript.reply_tokens(reply, tokenizer, max_body=max_body, room=room)
    return fitted and (tokenizer.decode(fitted[0]), fitted[1])


LONG = transcript.Reply(prefix="<i>", body="x" * 99 + "y", suffix="</i>")  # 3 + 100 + 4 tokens
SHORT = transcript.Reply(prefix="<i>", body="abc", suffix="</i>")


@pytest.mark.parametrize(
    "reply, room, fitted",
    [
        (LONG, 1000, ("<i>" + "x" * 99 + "y</i>", False)),
        (LONG, 107, ("<i>" + "x" * 99 + "y</i>", False)),
        (LONG, 106, ("<i>" + "x" * 99 + "</i>", True)),
        (LONG, 39, ("<i>" + "x" * 32 + "</i>", True)),
        (LONG, 38, None),  # 31 tokens of passages would remain
        (LONG, 0, None),
        (LONG, -1, None),
        (SHORT, 10, ("<i>abc</i>", False)),  # whole, it may be shorter than 32
        (SHORT, 9, None),
    ],
)
def test_passages_are_cut_to_the_room_while_32_tokens_of_them_remain(byte_tokenizer, reply, room, fitted):
    assert fit(byte_tokenizer, reply, room=room) == fitted


@pytest.mark.parametrize(
    "max_body, room, fitted",
    [
        (100, 107, ("<i>" + "x" * 99 + "y</i>", False)),
        (99, 107, ("<i>" + "x" * 99 + "</i>", True)),
        (20, 107, ("<i>" + "x" * 20 + "</i>", True)),  # a budget may be below 32
        (20, 27, ("<i>" + "x" * 20 + "</i>", True)),
        (20, 26, None),
        (50, 56, ("<i>" + "x" * 49 + "</i>", True)),
        (50, 39, ("<i>" + "x" * 32 + "</i>", True)),
        (50, 38, None),
    ],
)
def test_passages_are_cut_to_their_budget_first(byte_tokenizer, max_body, room, fitted):
    assert fit(byte_tokenizer, LONG, max_body=max_body, room=room) == fitted


@pytest.mark.parametrize("room, fitted", [(6, ("Again!", False)), (5, None), (0, None), (-3, None)])
def test_a_reply_without_passages_fits_or_does_not(byte_tokenizer, room, fitted):
    assert fit(byte_tokenizer, transcript.Reply(prefix="Again!"), room=room) == fitted


@pytest.mark.parametrize("tags", ["split_tokenizer", "tagged_tokenizer"])
def test_a_cut_moves_no_other_token(tags, request):
    """What is around the passages is tokenised by itself: cutting at a token never changes another one."""
    tokenizer = request.getfixturevalue(tags)
    reply = transcript.information(settings.Protocol(), PASSAGES)
    prefix, suffix = tokenizer.encode("\n\n<information>"), tokenizer.encode("</information>\n\n")
    body = tokenizer.encode(reply.body)
    for budget in range(len(body) + 1):
        tokens, cut = transcript.reply_tokens(reply, tokenizer, max_body=budget, room=1000)
        assert tokens == prefix + body[:budget] + suffix
        assert cut == (budget < len(body))
