"""The language that the policy and its environment speak: tags, prompt, parsing, rendering.

    question ─ render_prompt ─▶ user message          turn's text ─ parse_action ─▶ Action
    passages ─ render_docs ─▶ docs, which information_parts() wraps into the block to append

The templates are those of `settings.Protocol`: a `{name}` is a placeholder, any other brace stands for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re

from searchr1_jax.core import settings
from searchr1_jax.core import types

SEARCH = "search"
ANSWER = "answer"
INVALID = "invalid"

STOP_TAGS = ("</search>", "</answer>")  # a turn ends at the token that completes one of them
TAGS = (
    "<think>", "</think>", "<search>", "</search>",
    "<information>", "</information>", "<answer>", "</answer>",
)  # fmt: skip

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """What a turn of the policy asks of the environment."""

    kind: str  # SEARCH, ANSWER or INVALID
    content: str = ""  # the query or the answer, stripped; "" where invalid


def parse_action(turn_text: str) -> Action:
    """The first complete search or answer of a turn; a turn without one, or with an empty query, is invalid.

        <search> a </search>              search "a"         <answer></answer>   answer ""
        <search>a <answer>b</answer>      answer "b"         a</search>          invalid

    Args:
      turn_text: what the policy wrote in this turn, and nothing before it.
    """
    match = _ACTION.search(turn_text)
    if match is None:
        return Action(kind=INVALID)
    kind, content = match[1], match[2].strip()
    if kind == SEARCH and not content:
        return Action(kind=INVALID)
    return Action(kind=kind, content=content)


def render_prompt(templates: settings.Protocol, question: str) -> str:
    """The user message that asks `question`, which is stripped and ends with a question mark."""
    question = question.strip()
    return _fill(templates.prompt, question=question if question.endswith("?") else question + "?")


def render_docs(templates: settings.Protocol, passages: Sequence[types.Passage]) -> str:
    """The passages in their order, numbered from 1, without white space at either end."""
    return "".join(
        _fill(templates.passage, i=str(i), title=passage.title, text=passage.text)
        for i, passage in enumerate(passages, start=1)
    ).strip()


def information_parts(templates: settings.Protocol) -> tuple[str, str]:
    """What stands before and after the passages; the two stay whole when passages are cut to fit."""
    prefix, _, suffix = templates.information.partition("{docs}")
    return prefix, suffix


def _fill(template: str, **values: str) -> str:
    """The template with its placeholders replaced in one pass, so that braces inside values stay braces."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
