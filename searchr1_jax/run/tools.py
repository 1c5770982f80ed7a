"""The tools that a config names: rows of `TOOLS`, or `package.module:Class` for a user's own.

    settings.tools ─ names ─▶ tags: of the tokenizer that `prepare` makes, of exported stop strings
                 ─ make ──▶ the tools, for rollout.environment.Environment

A row is called with the settings and the workdir and gives the tool of its name. A user's own is a class that is called
likewise, with the tool's `name` as an attribute of the class: its tags are known before there is a corpus or an index.
"""

from collections.abc import Callable
import pathlib

from searchr1_jax.core import names as names_lib, settings as settings_lib
from searchr1_jax.rollout import environment
from searchr1_jax.rollout.tools import calculator, search
from searchr1_jax.run import retrievers
from searchr1_jax.text import protocol


def _search(settings: settings_lib.Settings, workdir: pathlib.Path) -> environment.Tool:
    c = settings.retriever
    return search.Search(
        retriever=retrievers.make(settings, workdir),
        passages=settings.rollout.passages,
        timeout_s=None if c.url else c.timeout_s,  # a server's client has its own, and more than one attempt
    )


TOOLS: dict[str, Callable[[settings_lib.Settings, pathlib.Path], environment.Tool]] = {
    "search": _search,
    "calculate": lambda settings, workdir: calculator.Calculator(),
}


def names(settings: settings_lib.Settings) -> tuple[str, ...]:
    """Of the tools in use, in the config's order.

    Raises:
      ValueError: for what is no tool, and for names that cannot be tags or that two tools have.
    """
    found = tuple(name if name in TOOLS else _name(name) for name in settings.tools)
    protocol.check_tools(found)
    return found


def _name(entry: str) -> str:
    maker = names_lib.resolve(entry, TOOLS, "tools")
    if not callable(maker) or not isinstance(name := getattr(maker, "name", None), str):
        raise ValueError(f"tools names {entry!r}, which is {maker!r}; make it a class with a name and a call")
    return name


def make(settings: settings_lib.Settings, workdir: pathlib.Path) -> tuple[environment.Tool, ...]:
    """The tools in use.

    Raises:
      ValueError: as `names` does, and where one lacks what it needs.
    """
    names(settings)  # whatever is wrong with one is found before another opens its index
    return tuple(names_lib.resolve(entry, TOOLS, "tools")(settings, workdir) for entry in settings.tools)
