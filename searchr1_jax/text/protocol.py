"""The language that the policy and its environment speak: tags, prompt, parsing, rendering.

    question ─ render_prompt ─▶ user message          turn's text, tools ─ parse_action ─▶ Action
    passages ─ render_docs ─▶ docs, which information_parts() wraps into the block to append

A tool is called by its tags, `<name> … </name>`, so all tags follow from the names of the tools in use. The templates
are fields of `Protocol`; its defaults are the texts of Search-R1 to the letter (Jin et al., 2025, table 1 and section
3.2).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
import dataclasses
import re

from searchr1_jax.core import types

SEARCH = "search"
ANSWER = "answer"
INVALID = "invalid"
TRUNCATED = "truncated"  # by the end of the context
_OWN = ("think", "information", ANSWER, INVALID, TRUNCATED)  # no names of tools

PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you "
    "get new information. After reasoning, if you find you lack some knowledge, you can call a search engine "
    "by <search> query </search> and it will return the top searched results between <information> and "
    "</information>. You can search as many times as your want. If you find no further external knowledge "
    "needed, you can directly provide the answer inside <answer> and </answer>, without detailed "
    "illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)
CORRECTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and "
    "</search>. If I want to give the final answer, I should put the answer between <answer> and </answer>. "
    "Let me try again.\n"
)
INFORMATION = "\n\n<information>{docs}</information>\n\n"
PASSAGE = "Doc {i}(Title: {title}) {text}\n"

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

    Args:
      turn_text: what the policy wrote in this turn, and nothing before it.
      tools: names of those that may be called.
    """
    match = re.search(rf"<({'|'.join((*tools, ANSWER))})>(.*?)</\1>", turn_text, re.DOTALL)
    if match is None:
        return Action(kind=INVALID)
    kind, content = match[1], match[2].strip()
    if kind != ANSWER and not content:
        return Action(kind=INVALID)
    return Action(kind=kind, content=content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The templates of one run. A `{name}` is a placeholder; any other brace stands for itself.

    Raises ValueError, naming the template, for a placeholder that is missing, unknown, or (docs) repeated.
    """

    prompt: str = PROMPT  # with {question}; the user's message
    correction: str = CORRECTION  # appended after a turn without a valid action
    information: str = INFORMATION  # with one {docs}; appended after a call, around what the tool replied
    passage: str = PASSAGE  # with {text}, and {i} and {title} where wanted; one retrieved passage

    def __post_init__(self):
        _check("prompt", self.prompt, required={"question"})
        _check("correction", self.correction)
        _check("information", self.information, required={"docs"})
        _check("passage", self.passage, required={"text"}, optional={"i", "title"})
        if self.information.count("{docs}") > 1:
            raise ValueError(f"the information template {self.information!r} must hold {{docs}} exactly once")

    def render_prompt(self, question: str) -> str:
        """The user message that asks `question`, which is stripped and ends with a question mark."""
        question = question.strip()
        return _fill(self.prompt, question=question if question.endswith("?") else question + "?")

    def render_docs(self, passages: Sequence[types.Passage]) -> str:
        """The passages in their order, numbered from 1, without white space at either end."""
        return "".join(
            _fill(self.passage, i=str(i), title=passage.title, text=passage.text)
            for i, passage in enumerate(passages, start=1)
        ).strip()

    def information_parts(self) -> tuple[str, str]:
        """What stands before and after a tool's reply; the two stay whole when that is cut to fit."""
        prefix, _, suffix = self.information.partition("{docs}")
        return prefix, suffix


def _check(name: str, template: str, *, required: Set[str] = frozenset(), optional: Set[str] = frozenset()):
    found = set(_PLACEHOLDER.findall(template))
    for missing in sorted(required - found):
        raise ValueError(f"the {name} template {template!r} lacks {{{missing}}}; put it where that belongs")
    for unknown in sorted(found - required - optional):
        known = ", ".join(f"{{{key}}}" for key in sorted(required | optional)) or "no placeholder"
        raise ValueError(f"the {name} template {template!r} has an unknown {{{unknown}}}; it takes {known}")


def _fill(template: str, **values: str) -> str:
    """The template with its placeholders replaced in one pass, so that braces inside values stay braces."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
