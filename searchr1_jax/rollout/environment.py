"""What answers the policy's turns: a protocol and the tools that may be called.

    text of a turn, turns left ─▶ act ─▶ Outcome: a reply, a reason to stop, or the call of a tool
                                                  calls ─▶ fetch (in worker threads, a tool's together) ─▶ replies

`act` is immediate and runs in the host loop; a tool may take its time. An environment knows texts only: the loop
tokenises replies, cuts them to fit, and keeps the books.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Protocol

from searchr1_jax.core import settings, types
from searchr1_jax.text import protocol as text_protocol, transcript


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a turn asks of a tool, and whose turn it is.

    Same seed, same trajectories: a reply is to depend on nothing but what stands here. Chance is drawn from (seed,
    step, question, sample, turn), and whatever a tool remembers of an episode is kept in `memory`.
    """

    tool: str  # its name
    content: str  # what stands between the tags, stripped and not empty
    example: types.QAExample  # the question of the episode, and …
    sample: int  # … which of its samples the episode is
    turn: int  # of the episode, from 0, whatever the other turns were
    seed: int  # of the rollout, as is …
    step: int  # … its step
    # The tool's own in this episode: empty at its first call, and let go when the episode has ended. An episode's calls
    # come one after the other, so it needs no lock; an object in it that has to be closed does so when it is finalised.
    memory: dict[str, Any]


class Tool(Protocol):
    """Something that the policy calls by `<name> content </name>`; the reply goes into the information block.

    A rollout never outlives a step, so a run that resumes needs nothing of a tool but that it is made as before.
    """

    name: str  # of the tags and of the event of a turn; lower-case letters, digits, - and _

    def call(self, calls: list[Call]) -> Sequence[str] | Sequence[list[types.Passage]]:
        """Replies to calls of different episodes, in their order: texts, or passages.

        From worker threads, several at once. Which calls come together depends on scheduling; no reply may. What the
        policy did wrong is a reply that says so; what is raised ends the rollout with a `ToolError`.
        """
        ...


class ToolError(RuntimeError):
    """A tool that failed for good: its name, and on what and why."""

    def __str__(self) -> str:
        return "the tool {!r} failed {}".format(*self.args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a turn leads to: a stop or a reply; with neither, the tool that is called `event` is to reply."""

    event: str  # the name of a tool, "answer" or "invalid"
    content: str = ""  # of the call or the answer
    stop: str | None = None  # stop reason of the trajectory
    reply: transcript.Reply | None = None


class Environment:
    """Answers calls with the replies of the tools and other turns with a correction; an answer ends the episode.

    ValueError for a tool's name that cannot be a tag, or that two of them have.
    """

    def __init__(self, protocol: settings.Protocol, tools: Sequence[Tool]):
        text_protocol.check_tools([tool.name for tool in tools])
        self.protocol, self.tools = protocol, {tool.name: tool for tool in tools}

    def act(self, turn_text: str, turns_left: int) -> Outcome:
        """Judges a turn. With no turns left the outcome is a stop."""
        action = text_protocol.parse_action(turn_text, tuple(self.tools))
        outcome = functools.partial(Outcome, event=action.kind, content=action.content)
        if action.kind == text_protocol.ANSWER:
            return outcome(stop="answered")
        if turns_left == 0:
            return outcome(stop="turn_limit" if action.kind in self.tools else "no_action")
        return outcome() if action.kind in self.tools else outcome(reply=transcript.correction(self.protocol))

    def fetch(self, calls: list[Call]) -> list[transcript.Reply]:
        """Replies to calls of one tool, in their order, from worker threads; ToolError for what goes wrong there."""
        name, queries = calls[0].tool, [call.content for call in calls]
        try:
            found = self.tools[name].call(calls)
        except Exception as error:  # anything may stand behind a tool; its failure is named
            raise ToolError(name, f"on {_shown(queries)}: {type(error).__name__}: {error}") from error
        if not isinstance(found, (list, tuple)):
            raise ToolError(name, f"on {_shown(queries)}: the replies are not a list: {found!r:.200}")
        if len(found) != len(calls):
            raise ToolError(name, f"on {_shown(queries)}: {len(found)} replies to {len(calls)} calls")
        for query, reply in zip(queries, found, strict=True):
            if not isinstance(reply, str) and not _are_passages(reply):
                cause = f"on {query!r:.200}: the reply is neither a text nor a list of passages: {reply!r:.200}"
                raise ToolError(name, cause)
        return [transcript.information(self.protocol, reply) for reply in found]


def _shown(queries: list[str]) -> str:
    return f"{queries[0]!r:.200}" + (f" (one of {len(queries)} called together)" if len(queries) > 1 else "")


def _are_passages(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(p, types.Passage) and isinstance(p.title, str) and isinstance(p.text, str) for p in found
    )
