"""Names in a config: rows of a visible table, or what a module of the user's own defines."""

from collections.abc import Mapping
import importlib
from typing import TypeVar

T = TypeVar("T")


def resolve(name: str, table: Mapping[str, T], key: str, kind: type | None = None) -> T:
    """What a name of the config stands for: a row of the table, or what `package.module:name` defines.

    Args:
      key: of the config, for the error.
      kind: of what the name has to stand for; None: anything.
    Raises:
      ValueError: for any other name, a module that cannot be imported or does not define the name, or another kind.
    """
    if name in table:
        return table[name]
    choices = f"one of {', '.join(table)}, or package.module:name"
    module, _, defined = name.partition(":")
    if not (module and defined) or module.startswith("."):
        raise ValueError(f"{key} names {name!r}; make it {choices}")
    try:
        found = getattr(importlib.import_module(module), defined)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} names {name!r}, which could not be imported ({error}); make it {choices}") from error
    if kind is not None and not isinstance(found, kind):
        raise ValueError(f"{key} names {name!r}, which is {found!r}; make it a {kind.__module__}.{kind.__name__}")
    return found
