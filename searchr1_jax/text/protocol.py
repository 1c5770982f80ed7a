"""The language that the policy and its environment speak: tags, prompt, parsing, rendering.

    question ─ render_prompt ─▶ user message          turn's text, tools ─ parse_action ─▶ Action
    passages ─ render_docs ─▶ docs, which `transcript.information` wraps into the block to append

A tool is called by its tags, `<name> … </name>`, so all tags follow from the names of the tools in use. The templates
are those of `settings.Protocol`: a `{name}` is a placeholder, any other brace stands for itself.
"""

from collections.abc import Sequence
import dataclasses
import json
import re
from typing import Any

from searchr1_jax.core import settings, types

SEARCH = "search"
ANSWER = "answer"
INVALID = "invalid"
TRUNCATED = "truncated"  # by the end of the context
_OWN = ("think", "information", ANSWER, INVALID, TRUNCATED)  # no names of tools

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def check_tools(names: Sequence[str]) -> None:
    """Raises ValueError for a name that cannot be a tool's tag, or that two tools have."""
    for name in names:
        if not _NAME.fullmatch(name) or name in _OWN:
            raise ValueError(
                f"a tool is named {name!r}; use lower-case letters, digits, - and _, and none of {', '.join(_OWN)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"two tools are named {name!r}, and their calls would look alike; name each once in tools")


def stop_tags(tools: Sequence[str]) -> tuple[str, ...]:
    """A turn ends at the token that completes one of them."""
    return tuple(f"</{name}>" for name in (*tools, ANSWER))


def tags(tools: Sequence[str]) -> tuple[str, ...]:
    """All tags of an episode in which these tools may be called."""
    return tuple(tag for name in ("think", *tools, "information", ANSWER) for tag in (f"<{name}>", f"</{name}>"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """What a turn of the policy asks of the environment."""

    kind: str  # the name of a tool, ANSWER or INVALID
    content: str = ""  # of the call or the answer, stripped; "" where invalid


def parse_action(turn_text: str, tools: Sequence[str]) -> Action:
    """The first complete call or answer of a turn; a turn without one, or with an empty call, is invalid.

        <search> a </search>              search "a"         <answer></answer>   answer ""
        <search>a <answer>b</answer>      answer "b"         a</search>          invalid

    `turn_text` is what the policy wrote in this turn, and nothing before it; `tools` names those that may be called.
    """
    match = re.search(rf"<({'|'.join((*tools, ANSWER))})>(.*?)</\1>", turn_text, re.DOTALL)
    kind, content = (match[1], match[2].strip()) if match else (INVALID, "")
    return Action(kind=kind if kind == ANSWER or content else INVALID, content=content)


def render_prompt(templates: settings.Protocol, question: str) -> str:
    """The user message that asks `question`, which is stripped and ends with a question mark."""
    question = question.strip()
    return _fill(templates.prompt, question=question if question.endswith("?") else question + "?")


def template_arguments(templates: settings.Protocol) -> dict[str, Any]:
    """Those of the chat template, by name. Raises ValueError for one that is not written name=value, or is ours."""
    found: dict[str, Any] = {}
    for given in templates.template_arguments:
        name, equals, value = given.partition("=")
        if not equals or not name.isidentifier() or name in ("messages", "tokenize", "add_generation_prompt"):
            raise ValueError(
                f"protocol.template_arguments holds {given!r}; write name=value, as in enable_thinking=false"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def render_docs(templates: settings.Protocol, passages: Sequence[types.Passage]) -> str:
    """The passages in their order, numbered from 1, without white space at either end."""
    numbered = enumerate(passages, start=1)
    return "".join(_fill(templates.passage, i=str(i), title=p.title, text=p.text) for i, p in numbered).strip()


def _fill(template: str, **values: str) -> str:
    """The template with its placeholders replaced in one pass, so that braces inside values stay braces."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
