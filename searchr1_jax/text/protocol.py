"""The language that the policy and its environment speak: tags, prompt, parsing, rendering.

    question ─ render_prompt ─▶ user message          turn's text ─ parse_action ─▶ Action
    passages ─ render_docs ─▶ docs, which information_parts() wraps into the block to append

The templates are fields of `Protocol`; its defaults are the texts of Search-R1 to the letter (Jin et al.,
2025, table 1 and section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
import dataclasses
import re

from searchr1_jax.core import types

SEARCH = "search"
ANSWER = "answer"
INVALID = "invalid"

STOP_TAGS = ("</search>", "</answer>")  # a turn ends at the token that completes one of them
TAGS = (
    "<think>", "</think>", "<search>", "</search>",
    "<information>", "</information>", "<answer>", "</answer>",
)  # fmt: skip

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The templates of one run. A `{name}` is a placeholder; any other brace stands for itself.

    Raises ValueError, naming the template, for a placeholder that is missing, unknown, or (docs) repeated.
    """

    prompt: str = PROMPT  # with {question}; the user's message
    correction: str = CORRECTION  # appended after a turn without a valid action
    information: str = INFORMATION  # with one {docs}; appended after a search
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
        """What stands before and after the passages; the two stay whole when passages are cut to fit."""
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
