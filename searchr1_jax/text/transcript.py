"""What the environment writes after a turn, as text and as tokens.

The rollout loop appends replies with these functions, and demonstrations for supervised training are built
with them, so both read alike to the last token.
"""

from collections.abc import Sequence
import dataclasses

from searchr1_jax.core import settings, types
from searchr1_jax.text import protocol as text_protocol, tokenizer as tokenizer_lib

MIN_PASSAGE_TOKENS = 32  # passages cut shorter than this to fit the context are not worth showing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """Text to append after a turn. Only the body may be cut to fit; what is around it stays."""

    prefix: str
    body: str = ""
    suffix: str = ""
    passages: tuple[types.Passage, ...] = ()


def information(templates: settings.Protocol, found: str | Sequence[types.Passage]) -> Reply:
    """The reply to a call of a tool that found a text or passages."""
    prefix, _, suffix = templates.information.partition("{docs}")
    if isinstance(found, str):
        return Reply(prefix=prefix, body=found, suffix=suffix)
    body = text_protocol.render_docs(templates, found)
    return Reply(prefix=prefix, body=body, suffix=suffix, passages=tuple(found))


def correction(templates: settings.Protocol) -> Reply:
    """The reply to a turn without a valid action."""
    return Reply(prefix=templates.correction)


def reply_tokens(
    reply: Reply, tokenizer: tokenizer_lib.Tokenizer, *, max_body: int, room: int
) -> tuple[list[int], bool] | None:
    """The tokens that append a reply, and whether its body was cut; None where it does not fit into `room`.

    The body is cut to `max_body` tokens, then to fit as long as `MIN_PASSAGE_TOKENS` of it remain.
    """
    prefix, suffix = tokenizer.encode(reply.prefix), tokenizer.encode(reply.suffix)
    whole = tokenizer.encode(reply.body)
    body = whole[:max_body]
    left = room - len(prefix) - len(suffix)
    if left < len(body):
        if left < MIN_PASSAGE_TOKENS:
            return None
        body = body[:left]
    return prefix + body + suffix, len(body) < len(whole)
